"""Folders in and out: round trips through transformers, sharded reads, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig, Yarn
from dcmdp_jax.models import quantized, qwen3, sizes, weights
from random_params import random_params

CONFIGS = {
    "dense": dataclasses.replace(sizes.TINY, attention_bias=True, num_layers=3),
    "moe": dataclasses.replace(sizes.TINY_MOE, num_layers=5, mlp_only_layers=(1,), decoder_sparse_step=1),
}


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def folder(tmp_path):
    """A sharded folder of the dense config."""
    weights.save(tmp_path / "model", CONFIGS["dense"], random_params(CONFIGS["dense"]), max_shard_bytes=100_000)
    return tmp_path / "model"


def test_transformers_loads_what_is_saved(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import reference_hf

    for case in reference_hf.CASES:
        model = reference_hf.make(case)
        model.save_pretrained(tmp_path / case)
        config, params = weights.load(tmp_path / case)
        weights.save(tmp_path / f"{case}-back", config, params, max_shard_bytes=10_000)
        back = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{case}-back", attn_implementation="eager", dtype=torch.float32
        ).eval()
        assert type(back) is type(model)
        want, got = model.state_dict(), back.state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want), case
        tokens = reference_hf.tokens(case, 1, 30)
        np.testing.assert_array_equal(reference_hf.logits(back, tokens), reference_hf.logits(model, tokens))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [50_000, 5_000_000_000])
def test_save_then_load_is_exact(config, dtype, max_shard_bytes, tmp_path):
    params = random_params(config, dtype=dtype)
    weights.save(tmp_path / "model", config, params, max_shard_bytes=max_shard_bytes)
    loaded_config, loaded = weights.load(tmp_path / "model", dtype)
    assert loaded_config == config
    assert_equal(loaded, params)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == 50_000)
    pairs = zip(jax.tree.leaves(weights.leaves(config)), jax.tree.leaves(params), strict=True)
    biggest = max(x.nbytes // len(leaf.tensors) for leaf, x in pairs)
    assert all(path.stat().st_size <= max(max_shard_bytes, biggest) + 20_000 for path in shards)
    assert not [path for path in tmp_path.iterdir() if path.name != "model"]


def test_loading_casts(folder):
    _, exact = weights.load(folder)
    _, rounded = weights.load(folder, jnp.bfloat16)
    assert_equal(rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


def test_sharded_load_equals_unsharded(config, tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices; conftest.py simulates them")
    weights.save(tmp_path / "model", config, random_params(config))
    parts = MeshConfig(fsdp=2, expert=2, tensor=2) if config.num_experts else MeshConfig(data=2, fsdp=2, tensor=2)
    shapes = jax.eval_shape(lambda: qwen3.init(jax.random.key(0), config))
    places = sharding.params(qwen3.logical_axes(config), sharding.make_mesh(parts), sharding.TRAIN, shapes)
    _, params = weights.load(tmp_path / "model", shardings=places)
    assert_equal(params, weights.load(tmp_path / "model")[1])
    for array, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert array.sharding == place
        assert {shard.data.shape for shard in array.addressable_shards} == {place.shard_shape(array.shape)}
    # Donated parameters must not take the memory that the file was read into with them.
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(params)
    assert_equal(doubled, jax.tree.map(lambda x: 2 * x, random_params(config)))


class Counted:
    """A file whose tensors count the numbers read from them."""

    def __init__(self, file):
        self.file, self.read, self.name = file, 0, ""

    def get_slice(self, name):
        self.slice = self.file.get_slice(name)
        return self

    def __getitem__(self, index):
        block = self.slice[index]
        self.read += block.size
        return block


def test_a_slice_reads_no_more_than_itself(config, tmp_path):
    params = random_params(config)
    weights.save(tmp_path / "model", config, params)
    file = safetensors.safe_open(tmp_path / "model" / "model.safetensors", framework="np")
    for leaf, array in zip(jax.tree.leaves(weights.leaves(config)), jax.tree.leaves(params), strict=True):
        counted = Counted(file)
        index = tuple(slice(n // 2, n) if n > 1 else slice(0, 1) for n in array.shape)
        heads = next(iter(leaf.tensors.values())).heads
        if heads is not None:  # whole heads are read; a head is never split over devices
            place, tensor = next(iter(leaf.tensors.items()))
            within = len(place) + tensor.order.index(heads + 1)
            index = (*index[:within], slice(0, config.head_dim), *index[within + 1 :])
        files = dict.fromkeys(file.keys(), counted)
        block = leaf.read(files, index, np.float32)
        np.testing.assert_array_equal(block, np.asarray(array)[index])
        assert counted.read == block.size
        if heads is not None:
            index = tuple(slice(n // 2, n // 2 + 1) for n in array.shape)
            np.testing.assert_array_equal(leaf.read(files, index, np.float32), np.asarray(array)[index])


def edit(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in (raw | changes).items() if value != "drop"}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*supported are Qwen3ForCausalLM"),
        ({"architectures": "drop"}, "architectures"),
        ({"hidden_size": "drop"}, "hidden_size is missing"),
        ({"rope_theta": "drop"}, "rope_theta is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale=0.7"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_attention_heads": 3}, "num_heads=3 is not a multiple"),
        ({"num_hidden_layers": 4}, r"no tensor model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"model\.layers\.2\..*no place for"),
        ({"attention_bias": False}, r"self_attn\.\w_proj\.bias.*no place for"),
        ({"intermediate_size": 96}, r"_proj\.weight has shape \((64, 128|128, 64)\).*96"),
        ({"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message, folder):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


def test_both_spellings_of_rope_are_read(folder):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    want = Yarn(4.0, 32768)
    edit(folder, rope_theta=5e5, rope_scaling=scaling)
    old = weights.read_config(folder)
    edit(folder, rope_theta="drop", rope_scaling="drop", rope_parameters=scaling | {"rope_theta": 5e5})
    assert old == weights.read_config(folder) == dataclasses.replace(CONFIGS["dense"], yarn=want, rope_theta=5e5)
    edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert weights.read_config(folder) == dataclasses.replace(CONFIGS["dense"], rope_theta=5e5)


def test_missing_and_damaged_files_are_refused(folder):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        weights.load(folder / "nowhere")
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{shards[1].name} is damaged or cut short"):
        weights.load(folder)
    shards[1].write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(ValueError, match=f"{shards[1].name} is damaged or cut short"):
        weights.load(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"names the shard {shards[1].name}, which is missing"):
        weights.load(folder)
    (folder / weights.INDEX).write_text("{")
    with pytest.raises(ValueError, match="index.json is not valid JSON"):
        weights.load(folder)
    (folder / weights.INDEX).unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        weights.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled weights.*save_pretrained"):
        weights.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        weights.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        weights.load(folder)


def test_integer_tensors_are_refused(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = {name: x.astype(np.int8) for name, x in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match="is I8; only F32"):
        weights.load(folder)


def test_save_refuses_and_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    config = CONFIGS["dense"]
    params = random_params(config)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is not an empty folder"):
        weights.save(folder, config, params)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="do not fit this model config"):
        weights.save(tmp_path / "new", config, qwen3.unstack(params, config))
    axes = qwen3.contracting_axes(config)
    int8 = jax.tree.map(lambda w, a: quantized.quantize(w, jnp.int8, a) if a else w, params, axes)
    with pytest.raises(ValueError, match="quantized"):
        weights.save(tmp_path / "new", config, int8)

    def disk_full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="disk full"):
            weights.save(tmp_path / name, config, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]
    assert not list((tmp_path / "empty").iterdir())
