"""The loop as its user sees it: resume is exact, interruption saves, bad input is one sentence and
touches nothing.
"""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dcmdp_jax import (
    checkpoint,
    data,
    metrics,
    run_folder,
    starting,
    stopping,
    sync,
    tasks,
)
from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.inputs import read_inputs
from dcmdp_jax.models import weights
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from support.training import (
    ONE_DEVICE,
    QUICKSTART,
    assert_same_run,
    command,
    dcmdp,
    rows,
    saved,
    tiny,
    train,
)

pytestmark = pytest.mark.full


@pytest.fixture
def problems(tmp_path):
    """A file of chain problems, so that shuffling has something to do; 19 do not divide into
    batches of 4.
    """
    file = tmp_path / "problems.jsonl"
    task = load_experiment(QUICKSTART).data.task
    task = dataclasses.replace(task, operations=2)
    file.write_text(
        "".join(
            json.dumps({"problem": e.prompt, "answer": e.answer}) + "\n"
            for e in (task.example(i, 0) for i in range(19))
        )
    )
    return str(file)


def test_resumed_equals_uninterrupted(tmp_path, problems):
    """Parameters, optimizer, dual and data order, bit for bit, over an epoch's end with shuffling
    and two minibatches.
    """
    long = tiny(steps=10, **{"data.path": problems})
    short = tiny(steps=5, **{"data.path": problems})
    train(long, tmp_path / "whole")
    train(short, tmp_path / "parts")
    train(long, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", long)
    assert [row["step"] for row in rows(tmp_path / "parts")] == list(range(1, 11))
    asked = data.prompt_batches(
        data.read(problems),
        read_inputs(long, ONE_DEVICE).tokenizer,
        batch_size=4,
        max_prompt_tokens=6,
        seed=0,
    )
    assert len({example.prompt for _ in range(4) for example in next(asked).examples}) > 10


@pytest.mark.slow
def test_a_killed_process_resumes_bit_equal(tmp_path, problems):
    """SIGKILL two steps past a checkpoint."""
    changes = {"data.path": problems, "steps": 12}
    child = [
        sys.executable,
        "-c",
        "import sys; from dcmdp_jax.cli import main; sys.exit(main(sys.argv[1:]))",
    ]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    subprocess.run([*child, *command(tmp_path / "whole", **changes)], check=True, env=environment)
    process = subprocess.Popen([*child, *command(tmp_path / "parts", **changes)], env=environment)
    log = tmp_path / "parts" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 7):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run([*child, *command(tmp_path / "parts", **changes)], check=True, env=environment)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", tiny(**changes))


def test_interruption_saves_and_says_how_to_resume(tmp_path, capsys, monkeypatch):
    """A signal during the rollout of step 3: two steps are saved, the third's prompts are asked
    again.
    """
    sample = JetStreamSampler.sample
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **kwargs)

    monkeypatch.setattr(JetStreamSampler, "sample", interrupted)
    assert dcmdp(command(tmp_path / "a", steps=6)) == 130
    out = capsys.readouterr().out
    assert (
        "stopped after step 2 of 6" in out
        and f"dcmdp train {QUICKSTART} --workdir {tmp_path / 'a'}" in out
    )
    assert saved(tmp_path / "a", tiny(steps=6))[0].step == 2
    monkeypatch.setattr(JetStreamSampler, "sample", sample)
    assert dcmdp(["train", QUICKSTART, "--workdir", str(tmp_path / "a")]) == 0, (
        "the folder remembers its options"
    )
    train(tiny(steps=6), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b", tiny(steps=6))


def test_rows_hold_what_others_read(tmp_path):
    train(tiny(steps=3, **{"eval.every": 2}), tmp_path)
    read = rows(tmp_path)
    assert [row["step"] for row in read] == [1, 2, 3]
    for row in read:
        assert {
            "reward",
            "delta_mean",
            "multiplier",
            "entropy",
            "tokens",
            "k3",
            "grad_norm",
        } <= row.keys()
        assert ("reward_eval_infer" in row) == ("reward_eval_train" in row)
        assert row["delta_mean"] > 0
    # at the first step, each second, and the last
    assert all("reward_eval_train" in row for row in read)
    told = metrics.read_gaps(tmp_path)
    assert [row["step"] for row in told] == [1, 2, 3]
    for row, gap in zip(read, told):
        deltas = [(bucket["delta"], bucket["tokens"]) for bucket in gap["positions"]]
        assert sum(n for _, n in deltas) == row["tokens"]
        assert sum(delta * n for delta, n in deltas) / row["tokens"] == pytest.approx(
            row["delta_mean"], rel=1e-4, abs=1e-9
        )
        assert [token["delta"] for token in gap["worst"]][:1] == pytest.approx(
            [row["prob_diff_max"]], rel=1e-4
        )
    tolerance = 0.004
    for one, two in zip(read, read[1:]):
        assert two["multiplier"] == pytest.approx(
            min(max(one["multiplier"] + one["delta_mean"] - tolerance, 0), 0.2), abs=1e-6
        )
    assert (
        json.loads((tmp_path / "config.json").read_text())["rollout"]["precision"]["weights"]
        == "int4"
    )


EXPERTS = {
    "model.architecture.num_experts": 4,
    "model.architecture.experts_per_token": 2,
    "model.architecture.expert_size": 16,
}
CUT = {"rollout.top_p": 0.9, "rollout.top_k": 5, "rollout.min_p": 0.05}


@pytest.mark.parametrize(
    "changes",
    [{}, CUT, EXPERTS | {"algorithm.replay_routing": "yes"}],
    ids=["dense", "cut supports", "moe that replays"],
)
def test_a_float32_engine_has_no_discrepancy(tmp_path, changes):
    train(
        tiny(steps=2, **{"rollout.precision.weights": "float32", "eval.every": 1}, **changes),
        tmp_path,
    )
    for row in rows(tmp_path):
        assert row["logp_diff_max"] <= 1e-5 and row["delta_mean"] < 1e-6
        assert row["reward_eval_infer"] == row["reward_eval_train"]


def test_a_finished_run_stays_finished_and_can_go_on(tmp_path, capsys):
    assert dcmdp(command(tmp_path, steps=2)) == 0
    before = rows(tmp_path)
    assert dcmdp(command(tmp_path, steps=2)) == 0 and rows(tmp_path) == before
    assert dcmdp(["train", QUICKSTART, "--workdir", str(tmp_path), "--steps", "3"]) == 0
    assert rows(tmp_path)[:2] == before and len(rows(tmp_path)) == 3
    err = capsys.readouterr().err
    assert (
        f"{tmp_path} goes on with its own " in err
        and "data.task.operations=2" in err
        and "steps=3" not in err
    )
    out = tmp_path / "out"
    assert dcmdp(["convert", QUICKSTART, str(out), "--workdir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert dcmdp(["generate", str(out), "3+5*2=", "--max-tokens", "4"]) == 0
    assert "3+5*2=\n  -> " in capsys.readouterr().out, "the folder brings its characters along"


def test_a_run_is_converted_where_its_meshes_do_not_fit(tmp_path):
    """On one device, with eight that train over experts and four that sample by tensor."""
    state = train(tiny(steps=1), tmp_path)
    out = tmp_path / "out"
    meshes = "--mesh.expert 8 --mesh.fsdp 2 --rollout.devices -1 --rollout.mesh.tensor 4"
    words = ["convert", QUICKSTART, str(out), "--workdir", str(tmp_path), *meshes.split()]
    assert dcmdp(words) == 0
    _, params = weights.load(str(out))
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


NEVER_FINITE = """
import dataclasses
import jax.numpy as jnp
from dcmdp_jax.experiment import load_experiment

def penalty(logp, rollout_logp, mask, multiplier):
    return logp * jnp.nan

RUN = load_experiment({quickstart!r})
CONFIG = dataclasses.replace(RUN, constraint=dataclasses.replace(RUN.constraint, penalty=penalty))
"""


@pytest.mark.slow
def test_a_run_that_makes_no_update_stops_with_a_sentence_and_is_saved(tmp_path, capsys):
    experiment = tmp_path / "never_finite.py"
    workdir = tmp_path / "run"
    experiment.write_text(NEVER_FINITE.format(quickstart=QUICKSTART))
    words = ["train", str(experiment), *command(workdir, steps=9)[2:], "--algorithm.max_skipped=2"]
    assert dcmdp(words) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("dcmdp: the loss is not finite, and the last 2 steps made no update (")
    assert said.endswith(f"Everything up to step 2 is saved in {workdir}")
    assert [row["skipped"] for row in rows(workdir)] == [2, 4]
    assert checkpoint.steps(workdir) == [0, 2]
    assert dcmdp([*words[:-1], "--algorithm.max_skipped=0", "--steps=5"]) == 0, "0 goes on"
    assert [row["skipped"] for row in rows(workdir)] == [2, 4, 6, 8, 10]
    assert "Nothing was learnt: every update was left out." in (workdir / "report.html").read_text()


def test_weights_that_are_not_finite_are_named_before_the_first_step(tmp_path, monkeypatch):
    start = starting.starting_weights

    def damaged(*args):
        params = start(*args)
        return params | {"final_norm": params["final_norm"].at[0].set(np.nan)}

    monkeypatch.setattr(starting, "starting_weights", damaged)
    with pytest.raises(
        stopping.Failed, match="^the weight final_norm is not finite before the first step"
    ):
        train(tiny(**{"warmup.steps": 0}), tmp_path)
    assert not checkpoint.steps(tmp_path)


def test_interruption_in_the_warm_up_says_so(tmp_path, capsys, monkeypatch):
    supervised = data.supervised_batch
    monkeypatch.setattr(
        data,
        "supervised_batch",
        lambda *args: os.kill(os.getpid(), signal.SIGINT) or supervised(*args),
    )
    assert dcmdp(command(tmp_path, steps=1, **{"warmup.steps": 60})) == 130
    assert "stopped in the warm-up, at step 50 of 60; it starts anew" in capsys.readouterr().out


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
            "a prompt has 6 tokens, more than data.max_prompt_tokens=5",
        ),
        ({"checkpoint.keep": 0}, "checkpoint.keep=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, changes, message):
    assert dcmdp(command(tmp_path / "run", **changes)) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and err.startswith("dcmdp: ") and "\n" not in err
    assert not (tmp_path / "run").exists()


def test_fields_are_listed(capsys):
    assert dcmdp(["train", QUICKSTART, "--fields", "--constraint.tolerance", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "--constraint.tolerance 0.5  (float)" in out and "--data.task.operations 5  (int)" in out


def test_another_experiment_cannot_take_over_a_run(tmp_path):
    """Once there is a checkpoint; until then the folder is free."""
    run_folder.claim(tmp_path, tiny(**{"constraint.tolerance": 0.7}))
    run_folder.claim(tmp_path, tiny())
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    run_folder.claim(tmp_path, tiny(steps=99))
    with pytest.raises(ValueError, match=r"constraint\.tolerance=0\.004, not 0\.5"):
        run_folder.claim(tmp_path, tiny(**{"constraint.tolerance": 0.5}))


def broken_from(call, monkeypatch, what):
    """Has the quickstart's verifier do `what()` from that call on; returns the right one."""
    calls = []
    right = tasks.Chain.reward

    @functools.wraps(right)
    def reward(self, example, text):
        calls.append(None)
        return right(self, example, text) if len(calls) < call else what()

    monkeypatch.setattr(tasks.Chain, "reward", reward)
    return right


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_verifier_that_fails_leaves_every_step_before_saved(
    tmp_path, capsys, monkeypatch, staleness
):
    """The batch of step 4 cannot be judged; the run goes on from step 3 as if nothing had been."""
    changes = {"steps": 5, "checkpoint.every": 0, "rollout.staleness": staleness}
    right = broken_from(3 * 16 + 2, monkeypatch, lambda: 1 / 0)
    assert dcmdp(command(tmp_path / "a", **changes)) == 1
    out, err = capsys.readouterr()
    assert "the state after step 3 is saved" in out
    said = err.splitlines()[-1]
    assert (
        said.startswith("dcmdp: the verifier ")
        and "ZeroDivisionError: division by zero; go on with: dcmdp train" in said
    )
    assert "Traceback" not in err
    monkeypatch.setattr(tasks.Chain, "reward", right)
    assert dcmdp(["train", QUICKSTART, "--workdir", str(tmp_path / "a")]) == 0
    train(tiny(**changes), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b", tiny(**changes))


def test_a_verifier_that_hangs_is_left_and_its_batch_asked_again(tmp_path, monkeypatch, capsys):
    def hang():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    right = broken_from(16 + 3, monkeypatch, hang)
    began = time.monotonic()
    assert dcmdp(command(tmp_path / "a", steps=2)) == 130
    assert time.monotonic() - began < 300
    assert "stopped after step 1 of 2; everything is saved" in capsys.readouterr().out
    monkeypatch.setattr(tasks.Chain, "reward", right)
    assert dcmdp(["train", QUICKSTART, "--workdir", str(tmp_path / "a")]) == 0
    train(tiny(steps=2), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b", tiny(steps=2))


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path, capsys):
    changes = {"steps": 4, "checkpoint.every": 2}
    train(tiny(**changes), tmp_path / "a")
    newest = tmp_path / "a" / "checkpoints" / "4" / "state"
    for file in newest.rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    assert (
        dcmdp(["convert", QUICKSTART, str(tmp_path / "out"), "--workdir", str(tmp_path / "a")]) == 0
    )
    assert f"wrote step 2 to {tmp_path / 'out'}" in capsys.readouterr().out
    assert dcmdp(["train", QUICKSTART, "--workdir", str(tmp_path / "a")]) == 0
    err = capsys.readouterr().err
    assert "checkpoint 4 in" in err and "going on from checkpoint 2" in err
    train(tiny(**changes), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b", tiny(**changes))
    for folder in (tmp_path / "a" / "checkpoints").glob("[0-9]"):
        shutil.rmtree(folder / "state")
    assert dcmdp(["train", QUICKSTART, "--workdir", str(tmp_path / "a")]) == 2
    assert "dcmdp: no checkpoint in" in capsys.readouterr().err and len(rows(tmp_path / "a")) == 4


def record_of(workdir, change):
    file = workdir / "config.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def test_a_run_survives_another_version(tmp_path):
    """A field that its version did not know has today's default; one that is unknown today counts
    where it is set.
    """
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    run_folder.write_config(tmp_path, tiny())
    record_of(
        tmp_path,
        lambda r: (
            r.pop("wandb"),
            r["algorithm"].pop("offload"),
            r["rollout"].pop("precision"),
            r["data"]["task"].pop("noise"),
            r.update(nova=0),
            r["data"].update(extra={"a": None}),
        ),
    )
    with pytest.raises(ValueError, match=r"rollout\.precision\.weights=float32, not int4"):
        run_folder.claim(tmp_path, tiny())
    plain = {"rollout.precision.weights": "float32"}
    with pytest.raises(ValueError, match="algorithm.offload=False, not True"):
        run_folder.claim(tmp_path, tiny(**plain, **{"algorithm.offload": "true"}))
    run_folder.claim(tmp_path, tiny(**plain)).close()
    assert json.loads((tmp_path / "config.json").read_text())["algorithm"]["offload"] is False
    record_of(tmp_path, lambda r: r["algorithm"].update(nova={"factor": 3}))
    with pytest.raises(
        ValueError,
        match="a run of another version, with algorithm.nova={'factor': 3}, which this one does not know",
    ):
        run_folder.claim(tmp_path, tiny(**plain))


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"name": "quick', '{"a": ' * 9**5, None],
    ids=["empty", "list", "cut", "deep", "gone"],
)
def test_a_damaged_record_is_named_with_its_remedy(tmp_path, capsys, content):
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert dcmdp(command(tmp_path)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"dcmdp: {tmp_path / 'config.json'} ") and "put a copy back" in err
    assert err.count("\n") == 1


def test_an_absent_logger_is_refused_before_there_is_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert dcmdp(command(tmp_path / "run", wandb="yes")) == 2
    assert (
        capsys.readouterr().err == "dcmdp: wandb=True needs wandb; pip install wandb\n"
        and not (tmp_path / "run").exists()
    )


def test_rows_of_a_run_without_its_checkpoints_are_kept(tmp_path):
    train(tiny(steps=2, **{"eval.every": 1}), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "gaps.jsonl")}
    shutil.rmtree(tmp_path / "checkpoints")
    run_folder.claim(tmp_path, tiny(steps=2)).close()
    assert {name: (tmp_path / f"{name}.1").read_bytes() for name in before} == before


@pytest.mark.slow
def test_two_runs_cannot_share_a_folder_and_a_second_ctrl_c_and_closed_streams_cost_nothing(
    tmp_path,
):
    child = [
        sys.executable,
        "-c",
        "import sys; from dcmdp_jax.cli import main; sys.exit(main(sys.argv[1:]))",
    ]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(
        [*child, *command(tmp_path / "a", steps=10000)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "a" / "metrics.jsonl"
    while first.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 6):
        time.sleep(0.05)
    second = subprocess.run(
        [*child, *command(tmp_path / "a", steps=2, seed=1)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert second.returncode == 2
    assert (
        f"a is in use by process {first.pid} on " in second.stderr
        and "Traceback" not in second.stderr
    )
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in err and "shutdown" not in err
    steps = len(log.read_text().splitlines()) + 2
    with open("/dev/full", "w") as full:
        whole = subprocess.run(
            [*child, *command(tmp_path / "a", steps=steps)],
            env=environment,
            stdout=full,
            stderr=full,
        )
    assert whole.returncode == 0 and (tmp_path / "a" / "report.html").is_file()
    train(tiny(steps=steps), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b", tiny(steps=steps))


def test_a_step_that_leaves_a_weight_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """The last checkpoint stays the newest, also where it is the last step that overflows."""
    make = sync.converter

    def overflowing(*arguments):
        def to_engine(params, version):
            weights = make(*arguments)(params, version)
            return weights._replace(finite=weights.finite & (int(version) < 2))

        return to_engine

    monkeypatch.setattr(sync, "converter", overflowing)
    run = tiny(steps=2, **{"checkpoint.every": 1})
    with pytest.raises(
        stopping.Failed,
        match="^a weight of the engine is not finite after step 2, which is not saved",
    ):
        train(run, tmp_path)
    assert checkpoint.steps(tmp_path) == [0, 1] and len(rows(tmp_path)) == 1
