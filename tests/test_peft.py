"""Adapters in PEFT's format: there and back, against peft itself, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dcmdp_jax.config import Lora
from dcmdp_jax.models import decoder, derived, lora, peft, weights
from support.random_params import random_params
from support.steps import MODEL, MOE

SETTINGS = Lora(rank=2, alpha=5.0)


def adapters(model, settings=SETTINGS):
    rng = np.random.default_rng(1)
    shapes = lora.abstract(settings, model)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def written(folder, model=MODEL, settings=SETTINGS):
    """A folder of adapters, and they themselves."""
    made = adapters(model, settings)
    peft.save(folder, made, settings, model, "base")
    return folder, made


@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "moe"])
def test_what_is_written_is_read(model, tmp_path):
    folder, made = written(tmp_path / "adapter", model)
    jax.tree.map(np.testing.assert_array_equal, peft.load(folder, SETTINGS, model), made)


def test_the_base_model_and_its_commit_have_fields_of_their_own(tmp_path):
    peft.save(tmp_path / "adapter", adapters(MODEL), SETTINGS, MODEL, "own/tiny", "abc")
    found = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert (found["base_model_name_or_path"], found["revision"]) == ("own/tiny", "abc")


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        written(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 4}, "has r=4, and model.lora.rank=2"),
        ({"lora_alpha": 16}, "has lora_alpha=16, and model.lora.alpha=5.0"),
        ({"target_modules": ["q_proj"]}, "model.lora.targets"),
        ({"use_dora": True}, "use_dora=True, which these adapters do not have"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which these adapters"),
    ],
)
def test_other_adapters_are_refused(changes, message, tmp_path):
    folder, _ = written(tmp_path / "adapter")
    file = folder / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        peft.check(folder, SETTINGS, MODEL)


def test_adapters_of_another_model_are_refused(tmp_path):
    folder, _ = written(tmp_path / "adapter")
    with pytest.raises(ValueError, match="lacks a tensor .*layers.2"):
        peft.check(folder, SETTINGS, dataclasses.replace(MODEL, num_layers=3))
    with pytest.raises(ValueError, match=r"has shape \(2, 16\); this model's has \(2, 32\)"):
        peft.check(folder, SETTINGS, dataclasses.replace(MODEL, hidden_size=32))


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    made = adapters(MODEL)
    made["stacks"][0]["mlp"]["up_proj"]["up"][1, 0, 0] = np.nan
    peft.save(tmp_path / "adapter", made, SETTINGS, MODEL, "base")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.lora_B.weight holds NaN"):
        peft.load(tmp_path / "adapter", SETTINGS, MODEL)


@pytest.mark.parametrize("missing", [peft.CONFIG, peft.TENSORS])
def test_a_folder_that_is_not_complete_is_refused(missing, tmp_path):
    folder, _ = written(tmp_path / "adapter")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"has no {missing}"):
        peft.check(folder, SETTINGS, MODEL)


@pytest.mark.full
def test_peft_computes_the_sum(tmp_path):
    """Logits of transformers' model with our adapter, loaded and applied by peft."""
    theirs = pytest.importorskip("peft", reason="peft is not installed")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = random_params(MODEL, 0.3, norms=1.0)
    weights.save(tmp_path / "model", MODEL, params)
    folder, made = written(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    with_adapter = theirs.PeftModel.from_pretrained(base, folder)
    tokens = np.arange(12).reshape(2, 6) % MODEL.vocab_size
    with torch.no_grad():
        expected = with_adapter(torch.tensor(tokens)).logits.numpy()
    summed = derived.arrays(lora.with_adapters(made, params, SETTINGS))
    got = decoder.logits(summed, tokens.astype(np.int32), MODEL)
    assert np.abs(expected - decoder.logits(params, tokens.astype(np.int32), MODEL)).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.full
def test_what_peft_writes_is_read(tmp_path):
    theirs = pytest.importorskip("peft", reason="peft is not installed")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights.save(tmp_path / "model", MODEL, random_params(MODEL, 0.3, norms=1.0))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = Lora(rank=3, alpha=7.0, targets=("q_proj", "down_proj"))
    model = theirs.get_peft_model(
        base,
        theirs.LoraConfig(
            r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        ),
    )
    model.save_pretrained(tmp_path / "adapter")
    made = peft.load(tmp_path / "adapter", settings, MODEL)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        lora_a = layer.lora_A["default"].weight.numpy()
    np.testing.assert_array_equal(made["stacks"][0]["mlp"]["down_proj"]["down"][1], lora_a.T)
