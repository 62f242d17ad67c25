"""What `dcmdp train` refuses, `dcmdp plan` refuses before it compiles anything."""

import dataclasses
import json
import pathlib
import threading

import pytest

from dcmdp_jax import cli
from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.tools import plan
from support import own_data

pytestmark = pytest.mark.full

QUICKSTART = str(pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py")


@pytest.mark.parametrize(
    "words, named",
    [
        (["--rollout.precision.weights", "int5"], "rollout.precision.weights='int5' is not one of"),
        (["--json", "nowhere/plan.json"], "nowhere/plan.json: its folder does not exist"),
    ],
)
def test_impossible_options_are_refused_before_compiling(words, named, capsys):
    assert cli.main(["plan", QUICKSTART, "--topology", "v5e:2x2", *words]) == 2
    assert named in capsys.readouterr().err


FOLDER = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 1e6,
    "max_position_embeddings": 100,
}


@pytest.mark.parametrize(
    "words, named",
    [
        ("--rollout.slots 6", "rollout.slots=6 does not divide over the mesh's 4 batch shards"),
        (
            "--rollout.max_tokens 60",
            "rollout.max_tokens = 110 positions are more than the model's 100",
        ),
        (
            "--algorithm.replay_routing yes",
            "replays the choices of a router, and this model is dense",
        ),
        ("--rollout.devices 3", "rollout.slots=64 does not divide over the mesh's 3 batch shards"),
        ("--rollout.devices 5", "rollout.devices=5 are more than the 4 there are"),
        ("--mesh.tensor 4", "kv_heads axis of size 2 does not divide over --mesh.tensor=4"),
        (
            "--rollout.precision.experts_per_token 2",
            "precision.experts_per_token=2 must lie in 1..0",
        ),
        ("--algorithm.microbatches 3", "completions do not divide into"),
        ("--rollout.precision.group 7", "group"),
        ("--warmup.steps 3", "warmup learns the solutions of data.task"),
        ("--seed -1", "seed=-1 must not be negative"),
        ("--rollout.staleness 99", "rollout.staleness=99 must be at most 16"),
    ],
)
def test_a_run_that_train_refuses_is_not_compiled(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "compile_program", None)
    (tmp_path / "config.json").write_text(json.dumps(FOLDER))
    gsm8k = str(pathlib.Path(QUICKSTART).with_name("gsm8k.py"))
    fitting = (
        "--data.path later.jsonl --rollout.samples 2 --algorithm.microbatches 2 "
        "--data.max_prompt_tokens 50 --rollout.max_tokens 50 --rollout.slots 64"
    )
    command = ["plan", gsm8k, "--topology", "v5e:2x2", "--model.folder", str(tmp_path)]
    assert cli.main([*command, *fitting.split(), *words.split()]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("dcmdp: ") and named in last_line


@pytest.mark.parametrize(
    "words, named",
    [
        (
            "--model.architecture.vocab_size 10",
            "the tokenizer has 18 ids but the model's vocab_size is 10",
        ),
        (
            "--data.max_prompt_tokens 5",
            "a prompt has 12 tokens, more than --data.max_prompt_tokens=5",
        ),
        ("--data.task.operations 1", "too few problems to hold out 512"),
    ],
)
def test_a_generated_task_is_read_before_compiling(words, named, capsys, monkeypatch):
    monkeypatch.setattr(plan, "compile_program", None)
    assert cli.main(["plan", QUICKSTART, "--topology", "v5e:2x2", *words.split()]) == 2
    assert named in capsys.readouterr().err


def refusal(words, capsys, monkeypatch):
    """What `dcmdp plan` says last, with nothing compiled, of gsm8k.py."""
    monkeypatch.setattr(plan, "compile_program", None)
    gsm8k = str(pathlib.Path(QUICKSTART).with_name("gsm8k.py"))
    assert cli.main(["plan", gsm8k, "--topology", "v5e:2x2", *words.split()]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_files_that_are_there_are_read_before_compiling(tmp_path, capsys, monkeypatch):
    folder = own_data.write_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(FOLDER | {"vocab_size": 2048}))
    problems = tmp_path / "problems.jsonl"
    words = f"--model.folder {folder} --data.path {problems}"
    problems.write_text('{"question": "Two and two?"}\n')
    said = refusal(words, capsys, monkeypatch)
    assert f"{problems} line 1" in said and "answer" in said
    problems.write_text('{"question": "Two and two?", "answer": "#### 4"}\n')
    (folder / "config.json").write_text(json.dumps(FOLDER | {"vocab_size": 10}))
    assert "the model's vocab_size is 10" in refusal(words, capsys, monkeypatch)
    (folder / "model.safetensors").write_text("damaged")
    assert str(folder / "model.safetensors") in refusal(words, capsys, monkeypatch)


def test_a_verifier_that_no_process_takes_is_refused_before_compiling(monkeypatch):
    config = load_experiment(QUICKSTART)
    lock = threading.Lock()
    data = dataclasses.replace(
        config.data, verifier=lambda example, text: float(lock.locked()), verifier_timeout=1.0
    )
    with pytest.raises(ValueError, match="data.verifier"):
        plan.plan_run(dataclasses.replace(config, data=data), config.model.architecture, "v5e:2x2")
