"""The language-model experiment from a folder that transformers made, on GSM8K or our own rows."""

import json
import pathlib

import numpy as np
import pytest

from dcmdp_jax import cli
from support import own_data

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
    "--steps",
    "3",
    "--data.prompts_per_step",
    "4",
    "--rollout.samples",
    "4",
    "--rollout.max_tokens",
    "24",
    "--rollout.slots",
    "16",
    "--algorithm.microbatches",
    "2",
    "--algorithm.learning_rate",
    "0.01",
    "--eval.prompts",
    "8",
    "--rollout.precision.weights",
    "int4",
    "--mesh.data",
    "1",
    "--mesh.fsdp",
    "1",
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """(tokenizer, GSM8K): the real ones where they lie beside the checkout, else our own."""
    if own_data.SHARED.is_dir():
        return own_data.SHARED / "qwen3_tokenizer", own_data.SHARED / "gsm8k"
    folder = tmp_path_factory.mktemp("material")
    return own_data.write_tokenizer(folder / "tokenizer"), own_data.write_sets(folder) / "gsm8k"


def make_folder(path, sparse):
    """Random weights in Qwen3's shape and vocabulary, as transformers writes them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {
        "vocab_size": 151_936,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
    }
    if sparse:
        config = transformers.Qwen3MoeConfig(
            **shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        )
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(path)
    else:
        transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**shape, tie_word_embeddings=True)
        ).save_pretrained(path)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_train_convert_generate(tmp_path, material, capsys, monkeypatch, sparse):
    """Three steps, then the exported folder in transformers: equal logits, weights that moved, text
    that comes out.
    """
    import jax
    import torch
    import transformers

    from dcmdp_jax.models import decoder, weights

    devices = jax.devices()[:1]
    monkeypatch.setattr("dcmdp_jax.sharding.jax.devices", lambda *args: devices)
    make_folder(tmp_path / "model", sparse)
    experiment = str(ROOT / "experiments" / "gsm8k.py")
    run = str(tmp_path / "run")
    out = tmp_path / "out"
    words, problems = material
    assert (
        cli.main(
            [
                "train",
                experiment,
                "--workdir",
                run,
                "--model.folder",
                str(tmp_path / "model"),
                "--model.tokenizer",
                str(words),
                "--data.path",
                str(problems / "train.jsonl"),
                "--data.eval_path",
                str(problems / "test.jsonl"),
                *SMALL,
            ]
        )
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert (
        [row["step"] for row in rows] == [1, 2, 3]
        and rows[0]["delta_mean"] > 0
        and "reward_eval_train" in rows[2]
    )

    assert cli.main(["convert", experiment, str(out), "--workdir", run]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    (config, params) = weights.load(out)
    tokens = np.random.default_rng(0).integers(0, 151_936, (2, 16)).astype(np.int32)
    theirs = exported(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    np.testing.assert_allclose(decoder.logits(params, tokens, config), theirs, atol=1e-4)
    assert (
        exported.generation_config.eos_token_id
        == [151_645, 151_643]
        == exported.config.eos_token_id
    )
    before = weights.load(tmp_path / "model")[1]
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params))
    )

    capsys.readouterr()
    assert (
        cli.main(
            [
                "generate",
                str(out),
                "What is 2 + 2?",
                "--chat",
                "--max-tokens",
                "4",
                "--samples",
                "2",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.count("  -> ") == 2


def test_a_damaged_shard_is_refused_and_leaves_nothing(tmp_path, material, capsys):
    make_folder(tmp_path / "model", sparse=False)
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    capsys.readouterr()
    assert (
        cli.main(
            [
                "train",
                str(ROOT / "experiments" / "gsm8k.py"),
                "--workdir",
                str(tmp_path / "run"),
                "--model.folder",
                str(tmp_path / "model"),
                "--model.tokenizer",
                str(material[0]),
                "--data.path",
                str(material[1] / "train.jsonl"),
                *SMALL,
                "--mesh.fsdp",
                "0",
            ]
        )
        == 2
    )
    _, _, err = capsys.readouterr().err.partition("\n")  # after what was started
    assert "model.safetensors" in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--weights", "fp8"], "--weights='fp8' is not one of float32"),
        (["--max-tokens", "0"], "must be at least 1"),
        (["--samples", "0"], "must be at least 1"),
    ],
)
def test_bad_generation_options(tmp_path, material, capsys, options, message):
    make_folder(tmp_path / "model", sparse=False)
    asked = ["generate", str(tmp_path / "model"), "2 + 2", "--tokenizer", str(material[0])]
    assert cli.main([*asked, *options]) == 2
    assert message in capsys.readouterr().err
