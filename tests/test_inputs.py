"""Bad input is one sentence, compiles nothing and leaves no folder."""

import sys

import pytest

from support.training import QUICKSTART, command, dcmdp


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model.architecture.vocab_size": 10},
            "the tokenizer has 18 ids but the model's vocab_size is 10",
        ),
        ({"mesh.tensor": 3}, "does not make 1, the number of devices"),
        ({"data.path": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"model.folder": "nowhere"}, "nowhere"),
        ({"model.tokenizer": "nowhere"}, "nowhere"),
        ({"rollout.samples": 3, "algorithm.microbatches": 4}, "12 completions do not divide into"),
        ({"algorithm.minibatches": 5}, "16 completions do not divide into"),
        (
            {"algorithm.replay_routing": "yes"},
            "replays the choices of a router, and this model is dense; leave it out",
        ),
        ({"stepz": 5}, "did you mean --steps?"),
        ({"model.architecture.max_position": 20}, "= 26 positions are more than the model's 20"),
        ({"eval.every": 1, "eval.prompts": 0}, "eval.prompts=0 must be at least 1"),
        (
            {"data.max_prompt_tokens": 5},
            "a prompt has 6 tokens, more than --data.max_prompt_tokens=5",
        ),
        ({"checkpoint.keep": 0}, "checkpoint.keep=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"warmup.path": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"warmup.path": "x", "warmup.steps": 0}, "--warmup.steps=0 learns nothing of it"),
        (
            {"warmup.path": "x", "warmup.microbatches": 3},
            "batch_size=32 does not divide into --warmup.microbatches=3 parts",
        ),
        ({"warmup.microbatches": 2}, "divides the pairs of warmup.path, which names no file"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, changes, message):
    assert dcmdp(command(tmp_path / "run", **changes)) == 2
    _, _, err = capsys.readouterr().err.partition("\n")  # after what was started
    assert message in err and err.startswith("dcmdp: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_absent_logger_is_refused_before_there_is_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert dcmdp(command(tmp_path / "run", wandb="yes")) == 2
    _, _, err = capsys.readouterr().err.partition("\n")  # after what was started
    assert err == "dcmdp: --wandb=True needs wandb; pip install wandb\n"
    assert not (tmp_path / "run").exists()


def test_fields_are_listed(capsys):
    assert dcmdp(["train", QUICKSTART, "--fields", "--constraint.tolerance", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "--constraint.tolerance 0.5  (float)" in out and "--data.task.operations 5  (int)" in out


def test_fields_that_are_refused_are_not_listed(capsys):
    assert dcmdp(["train", QUICKSTART, "--fields"]) == 0
    assert "model.architecture.compute" not in capsys.readouterr().out
