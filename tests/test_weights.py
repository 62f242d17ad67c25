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
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import decoder, inference, quantized, weights
from dcmdp_jax.tokens import tokenizer
from support.folders import edit
from support.random_params import random_params
from support.tiny_models import TINY, TINY_MOE

pytestmark = pytest.mark.full

CONFIGS = {
    "dense": dataclasses.replace(TINY, qkv_bias=True, o_bias=True, num_layers=3),
    "moe": dataclasses.replace(TINY_MOE, num_layers=5, mlp_only_layers=(1,), decoder_sparse_step=1),
}


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def folder(tmp_path):
    """A sharded folder of the dense config."""
    weights.save(
        tmp_path / "model",
        CONFIGS["dense"],
        random_params(CONFIGS["dense"]),
        max_shard_bytes=100_000,
    )
    return tmp_path / "model"


def test_transformers_loads_what_is_saved(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from support import reference_hf

    for case in reference_hf.CASES:
        model = reference_hf.make(case)
        model.save_pretrained(tmp_path / case)
        config, params = weights.load(tmp_path / case)
        weights.save(tmp_path / f"{case}-back", config, params, max_shard_bytes=10_000)
        back = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{case}-back", attn_implementation="eager", dtype=torch.float32
        ).eval()
        assert type(back) is type(model)
        want = model.state_dict()
        got = back.state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want), case
        tokens = reference_hf.tokens(case, 1, 30)
        np.testing.assert_array_equal(
            reference_hf.logits(back, tokens), reference_hf.logits(model, tokens)
        )


@pytest.mark.parametrize("named", ["config.json", "generation_config.json"])
def test_what_is_converted_stops_in_transformers_where_the_source_does(named, tmp_path):
    """Greedy completions of a few prompts end after as many tokens, some at a stop token."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from support import reference_hf

    source = tmp_path / "source"
    out = tmp_path / "out"
    folder = tmp_path / "tokenizer"
    reference_hf.make("dense").save_pretrained(source)
    (source / "generation_config.json").unlink()
    size = reference_hf.CASES["dense"]["vocab_size"]
    stops = {"eos_token_id": list(range(0, size, 9)), "bos_token_id": 3, "pad_token_id": 2}
    if named == "config.json":
        edit(source, **stops)
    else:
        edit(source, eos_token_id="drop")
        (source / named).write_text(json.dumps(stops))
    folder.mkdir()
    tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    ).save(str(folder / "tokenizer.json"))

    found = tokenizer.load(folder, source)  # given apart, and silent about stops
    assert found.eos_ids == tuple(stops["eos_token_id"])
    weights.save(out, *weights.load(source), token_ids=tokenizer.special_token_ids(found))
    tokenizer.save(found, out)
    written = json.loads((out / "config.json").read_text())
    assert {name: written[name] for name in stops} == stops

    def lengths(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = torch.arange(1, size, 9)[:, None]
        return [
            model.generate(prompt[None], max_new_tokens=6, do_sample=False).shape[1]
            for prompt in prompts
        ]

    want = lengths(source)
    assert lengths(out) == want and len(set(want)) > 1
    (out / "generation_config.json").unlink()
    assert lengths(out) == want


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
    pairs = zip(
        jax.tree.leaves(weights.parameter_table(config)), jax.tree.leaves(params), strict=True
    )
    biggest = max(x.nbytes // len(leaf.tensors) for leaf, x in pairs)
    assert all(path.stat().st_size <= max(max_shard_bytes, biggest) + 20_000 for path in shards)
    assert not [path for path in tmp_path.iterdir() if path.name != "model"]
    config_mode = (tmp_path / "model" / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in shards} == {config_mode}, "a server may read them too"


def test_loading_casts(folder):
    _, exact = weights.load(folder)
    _, rounded = weights.load(folder, jnp.bfloat16)
    assert_equal(rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact))


def test_sharded_load_equals_unsharded(config, tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices; conftest.py simulates them")
    weights.save(tmp_path / "model", config, random_params(config))
    parts = (
        MeshConfig(fsdp=2, expert=2, tensor=2)
        if config.num_experts
        else MeshConfig(data=2, fsdp=2, tensor=2)
    )
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    places = sharding.param_shardings(
        decoder.logical_axes(config), sharding.make_mesh(parts), sharding.TRAIN, shapes
    )
    _, params = weights.load(tmp_path / "model", shardings=places)
    assert_equal(params, weights.load(tmp_path / "model")[1])
    for array, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert array.sharding == place
        assert {shard.data.shape for shard in array.addressable_shards} == {
            place.shard_shape(array.shape)
        }
    # Donated parameters must not take the memory that the file was read into with them.
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)(params)
    assert_equal(doubled, jax.tree.map(lambda x: 2 * x, random_params(config)))


class Counted:
    """A file whose tensors count the numbers read from them."""

    def __init__(self, file):
        self.file = file
        self.read = 0
        self.name = ""

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
    for leaf, array in zip(
        jax.tree.leaves(weights.parameter_table(config)), jax.tree.leaves(params), strict=True
    ):
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
            np.testing.assert_array_equal(
                leaf.read(files, index, np.float32), np.asarray(array)[index]
            )


def rewrite(folder, change):
    """The same folder in one file, with its tensors changed."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
        path.unlink()
    (folder / weights.INDEX).unlink(missing_ok=True)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    "head",
    [
        lambda embed: embed * 1.5,
        lambda embed: embed.astype(jnp.bfloat16),
        lambda embed: np.where(
            np.arange(embed.size).reshape(embed.shape) == embed.size - 1, 0, embed
        ),
    ],
)
def test_a_tied_head_that_is_stored_and_differs_is_refused(head, folder):
    rewrite(folder, lambda tensors: tensors.update({HEAD: head(tensors[EMBED])}))
    with pytest.raises(
        ValueError, match="tensor lm_head.weight is not model.embed_tokens.weight.*set it to false"
    ):
        weights.load(folder)
    edit(folder, tie_word_embeddings=False)
    config, params = weights.load(folder)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")[HEAD]
    np.testing.assert_array_equal(params["head"], stored.T.astype(np.float32))
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_tied_head_that_is_stored_and_equal_is_accepted(dtype, folder):
    rounded = weights.load(folder, jnp.bfloat16)[1]["embed"]

    def change(tensors):
        tensors[EMBED] = np.asarray(rounded).astype(np.float32)
        tensors[HEAD] = np.asarray(rounded).astype(dtype)

    rewrite(folder, change)
    weights.check(folder)
    config, params = weights.load(folder)
    np.testing.assert_array_equal(params["embed"], rounded.astype(jnp.float32))
    assert "head" not in params and config.tie_word_embeddings


def test_much_of_a_wrong_tied_head_is_found_before_weights_are_read(folder):
    rewrite(folder, lambda tensors: tensors.update({HEAD: -tensors[EMBED]}))
    with pytest.raises(ValueError, match="lm_head.weight is not"):
        weights.check(folder)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED][:9]}))
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(9, 64\)"):
        weights.check(folder)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(dtype, value, folder):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name].astype(dtype)
        tensors[name][3, 4] = value

    rewrite(folder, change)
    for wanted in (jnp.float32, jnp.bfloat16):
        with pytest.raises(ValueError, match=f"tensor {name} holds NaN, infinity"):
            weights.load(folder, wanted)


def test_weights_too_large_for_their_dtype_are_refused(folder):
    name = "model.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: np.full(tensors[name].shape, 1e300)}))
    with pytest.raises(ValueError, match=f"tensor {name} holds .* what float32 cannot hold"):
        weights.load(folder)


def test_a_sharded_load_finds_what_is_not_finite(folder):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices; conftest.py simulates them")
    rewrite(folder, lambda tensors: tensors[EMBED].__setitem__((200, 3), np.nan))
    config = CONFIGS["dense"]
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharding.param_shardings(decoder.logical_axes(config), mesh, sharding.TRAIN, shapes)
    with pytest.raises(ValueError, match=f"tensor {EMBED} holds NaN"):
        weights.load(folder, shardings=places)


@pytest.mark.parametrize(
    "index, message",
    [
        (
            {"weight_map": {"a": "../model-00001-of-00002.safetensors"}},
            "which is no .safetensors file of its own folder",
        ),
        (
            {"weight_map": {"a": "/etc/model.safetensors"}},
            "which is no .safetensors file of its own folder",
        ),
        (
            {"weight_map": {"a": "..\\model.safetensors"}},
            "which is no .safetensors file of its own folder",
        ),
        (
            {"weight_map": {"a": "sub/model.safetensors"}},
            "which is no .safetensors file of its own folder",
        ),
        (
            {"weight_map": {"a": "x\0.safetensors"}},
            "which is no .safetensors file of its own folder",
        ),
        (
            {"weight_map": {"a": "x" * 300 + ".safetensors"}},
            "which is no .safetensors file of its own folder",
        ),
        (
            {"weight_map": {"a": "pytorch_model.bin"}},
            "which is no .safetensors file of its own folder",
        ),
        ({"weight_map": {"a": 5}}, "not an index of safetensors"),
        ({"weight_map": ["model.safetensors"]}, "not an index of safetensors"),
        ({"weight_map": {}}, "not an index of safetensors"),
        ({}, "not an index of safetensors"),
        (["model.safetensors"], "holds a list, not a JSON object"),
    ],
)
def test_indices_that_are_none_or_lead_out_of_the_folder_are_refused(index, message, folder):
    (folder / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{weights.INDEX}.*{message}"):
        weights.load(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = safetensors.numpy.load_file(first)
    safetensors.numpy.save_file(safetensors.numpy.load_file(second) | tensors, second)
    with pytest.raises(ValueError, match=f"is in {first.name} and in {second.name}; keep one"):
        weights.load(folder)


def refused(folder, message):
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist")


@pytest.mark.parametrize(
    "damage", [lambda shard: shard[:-100], lambda shard: b"\xff" * 8 + shard[8:]]
)
def test_a_damaged_shard_is_refused(damage, folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(damage(shard.read_bytes()))
    refused(folder, f"{shard.name} is damaged or cut short")


def test_a_missing_shard_is_refused(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, f"names the shard {shard.name}, which is missing")


def test_an_index_that_is_not_json_is_refused(folder):
    (folder / weights.INDEX).write_text("{")
    refused(folder, "index.json is not valid JSON")


def test_a_folder_without_weights_is_refused(folder):
    (folder / weights.INDEX).unlink()
    refused(folder, "neither model.safetensors nor")


def test_pickled_weights_are_refused(folder):
    (folder / weights.INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "pickled weights.*save_pretrained")


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "not valid JSON")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_integer_tensors_are_refused(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = {name: x.astype(np.int8) for name, x in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match="is I8; only F32"):
        weights.load(folder)


def test_save_refuses_a_folder_that_is_not_empty(folder):
    config = CONFIGS["dense"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is not an empty folder"):
        weights.save(folder, config, random_params(config))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_save_refuses_parameters_of_another_form(tmp_path):
    config = CONFIGS["dense"]
    flat = inference.unstack(random_params(config), config)
    with pytest.raises(ValueError, match="do not fit this model config"):
        weights.save(tmp_path / "new", config, flat)


def test_save_refuses_quantized_parameters(tmp_path):
    config = CONFIGS["dense"]
    axes = decoder.contracting_axes(config)
    int8 = jax.tree.map(
        lambda w, a: quantized.quantize(w, jnp.int8, a) if a else w, random_params(config), axes
    )
    with pytest.raises(ValueError, match="quantized"):
        weights.save(tmp_path / "new", config, int8)


@pytest.mark.parametrize("name", ["new", "empty"])
def test_a_save_that_fails_leaves_nothing_behind(name, tmp_path, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="disk full"):
        weights.save(tmp_path / name, CONFIGS["dense"], random_params(CONFIGS["dense"]))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())
