"""The loop as its user sees it: what a run writes, and that it resumes bit for bit."""

import json
import os
import signal
import subprocess

import jax
import numpy as np
import pytest

from dcmdp_jax import data, train_state
from dcmdp_jax.monitoring import metrics
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.run import checkpoint
from dcmdp_jax.run.inputs import read_inputs
from support.mismatch import EXPERTS
from support.training import (
    CHILD,
    ONE_DEVICE,
    QUICKSTART,
    assert_same_run,
    await_rows,
    child_environment,
    command,
    dcmdp,
    rows,
    saved,
    tiny,
    train,
    write_problems,
)

pytestmark = pytest.mark.full
CUT = {"rollout.top_p": 0.9, "rollout.top_k": 5, "rollout.min_p": 0.05}


@pytest.fixture
def problems(tmp_path):
    """A file of 19 problems, so that shuffling has something to do: 4 do not divide them."""
    return write_problems(tmp_path / "problems.jsonl", 19)


def test_resumed_equals_uninterrupted(tmp_path, problems):
    """Parameters, optimizer, dual and data order, over an epoch's end with shuffling and two
    minibatches.
    """
    long = tiny(steps=10, **{"data.path": problems})
    short = tiny(steps=5, **{"data.path": problems})
    train(long, tmp_path / "whole")
    train(short, tmp_path / "parts")
    train(long, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", long)
    assert [row["step"] for row in rows(tmp_path / "parts")] == list(range(1, 11))


def test_every_step_has_a_gradient_and_moves_the_parameters(tmp_path):
    """What tests that compare runs of this configuration need to say anything."""
    run = tiny(steps=2, **{"checkpoint.every": 1})
    train(run, tmp_path)
    inputs = read_inputs(run, ONE_DEVICE)
    like = train_state.abstract(run, inputs.model_config, inputs.mesh)
    before, _ = checkpoint.read(tmp_path, like, before=2)
    after, _ = checkpoint.read(tmp_path, like)
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, after.params)
    assert min(row["grad_norm"] for row in rows(tmp_path)) > 1e-2
    assert min(jax.tree.leaves(change)) > 1e-4


def test_the_problems_of_a_file_come_shuffled(problems):
    """What the test above needs to say anything about the order of data."""
    run = tiny(**{"data.path": problems})
    prompts = read_inputs(run, ONE_DEVICE).prompts
    drawn = [example.prompt for _ in range(4) for example in next(prompts).examples]
    assert len(set(drawn)) == 16 and drawn != [e.prompt for e in data.read(problems)[:16]]


@pytest.mark.slow
def test_a_killed_process_resumes_bit_equal(tmp_path, problems):
    """SIGKILL at least two steps past the first checkpoint after the start."""
    words = command(tmp_path / "parts", steps=10_000, **{"data.path": problems})
    process = subprocess.Popen([*CHILD, *words], env=child_environment())
    await_rows(tmp_path / "parts", 7, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    steps = len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) + 2
    changes = {"steps": steps, "data.path": problems}
    train(tiny(**changes), tmp_path / "parts")
    train(tiny(**changes), tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", tiny(**changes))


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys):
    """A run of six steps that got a signal during the rollout of step 3, and its output."""
    sample = JetStreamSampler.sample
    calls = []

    def signalled(*args, **options):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(JetStreamSampler, "sample", signalled)
        assert dcmdp(command(tmp_path / "run", steps=6)) == 130
    return tmp_path / "run", capsys.readouterr().out


def test_interruption_saves_the_steps_that_were_taken(interrupted):
    workdir, _ = interrupted
    assert saved(workdir, tiny(steps=6))[0].step == 2


def test_interruption_says_how_to_resume(interrupted):
    workdir, out = interrupted
    assert "stopped after step 2 of 6" in out
    assert f"dcmdp train {QUICKSTART} --workdir {workdir}" in out


def test_an_interrupted_run_goes_on_bit_for_bit_with_its_own_options(interrupted, tmp_path):
    workdir, _ = interrupted
    assert dcmdp(["train", QUICKSTART, "--workdir", str(workdir)]) == 0
    train(tiny(steps=6), tmp_path / "whole")
    assert_same_run(workdir, tmp_path / "whole", tiny(steps=6))


def test_interruption_in_the_warm_up_says_so(tmp_path, capsys, monkeypatch):
    supervised = data.supervised_batch

    def signalled(*args):
        monkeypatch.setattr(data, "supervised_batch", supervised)
        os.kill(os.getpid(), signal.SIGINT)
        return supervised(*args)

    monkeypatch.setattr(data, "supervised_batch", signalled)
    assert dcmdp(command(tmp_path, steps=1, **{"warmup.steps": 60})) == 130
    said = "at step 50 of 60; warm-up progress is not kept; begin it again with: dcmdp train"
    assert said in capsys.readouterr().out


# ------------------------------------------------------------ what a run writes


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """The folder of a run of three steps, evaluated at every second."""
    workdir = tmp_path_factory.mktemp("three")
    train(tiny(steps=3, **{"eval.every": 2}), workdir)
    return workdir


def test_each_step_has_a_row(three_steps):
    assert [row["step"] for row in rows(three_steps)] == [1, 2, 3]


@pytest.mark.parametrize(
    "name",
    ["reward", "delta_mean", "multiplier", "entropy", "tokens", "k3", "grad_norm", "truncated"]
    + ["completed_rewarded", "reward_spread", "reward/chain", "clip_fraction", "approx_kl"],
)
def test_rows_hold_what_others_read(three_steps, name):
    assert all(name in row for row in rows(three_steps))


def test_a_rounded_engine_has_a_discrepancy(three_steps):
    assert all(row["delta_mean"] > 0 for row in rows(three_steps))


def test_both_policies_are_evaluated_at_the_first_step_each_second_and_the_last(three_steps):
    for row in rows(three_steps):
        assert "reward_eval_infer" in row and "reward_eval_train" in row


def test_gaps_by_position_add_up_to_the_row(three_steps):
    gaps = metrics.read_gaps(three_steps)
    assert [row["step"] for row in gaps] == [1, 2, 3]
    for row, gap in zip(rows(three_steps), gaps):
        deltas = [(bucket["delta"], bucket["tokens"]) for bucket in gap["positions"]]
        assert sum(n for _, n in deltas) == row["tokens"]
        mean = sum(delta * n for delta, n in deltas) / row["tokens"]
        assert mean == pytest.approx(row["delta_mean"], rel=1e-4, abs=1e-9)


def test_the_worst_token_has_the_largest_delta(three_steps):
    for row, gap in zip(rows(three_steps), metrics.read_gaps(three_steps)):
        assert gap["worst"][0]["delta"] == pytest.approx(row["prob_diff_max"], rel=1e-4)


def test_the_multiplier_follows_the_dual_update(three_steps):
    """lambda <- clip(lambda + eta (mean delta - c), 0, lambda_max), as the quickstart has them."""
    read = rows(three_steps)
    for before, after in zip(read, read[1:]):
        expected = np.clip(before["multiplier"] + before["delta_mean"] - 0.004, 0, 0.2)
        assert after["multiplier"] == pytest.approx(expected, abs=1e-6)


def test_the_configuration_is_written_beside_the_run(three_steps):
    record = json.loads((three_steps / "config.json").read_text())
    assert record["rollout"]["precision"]["weights"] == "int4"


@pytest.mark.parametrize(
    "changes",
    [{}, CUT, EXPERTS | {"algorithm.replay_routing": "yes"}],
    ids=["dense", "cut supports", "moe that replays"],
)
def test_a_float32_engine_has_no_discrepancy(tmp_path, changes):
    exact = {"rollout.precision.weights": "float32", "eval.every": 1}
    train(tiny(steps=2, **exact, **changes), tmp_path)
    for row in rows(tmp_path):
        assert row["logp_diff_max"] <= 1e-5 and row["delta_mean"] < 1e-6
        assert row["reward_eval_infer"] == row["reward_eval_train"]


# ------------------------------------------------------------ a run that has finished


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    assert dcmdp(command(workdir, steps=2)) == 0
    return workdir


def test_a_finished_run_has_its_page(finished):
    assert (finished / "report.html").is_file()


def test_a_finished_run_stays_finished_and_says_so(finished, capsys):
    before = rows(finished)
    assert dcmdp(command(finished, steps=2)) == 0
    assert rows(finished) == before
    assert capsys.readouterr().out == "already finished at step 2; raise --steps to go on\n"


def test_a_finished_run_with_fewer_steps_takes_none(finished):
    before = rows(finished)
    assert dcmdp(command(finished, steps=1)) == 0
    assert rows(finished) == before


def test_a_finished_run_can_go_on(finished, capsys):
    before = rows(finished)
    assert dcmdp(["train", QUICKSTART, "--workdir", str(finished), "--steps", "3"]) == 0
    assert rows(finished)[:2] == before[:2] and len(rows(finished)) == 3
    err = capsys.readouterr().err
    assert f"{finished} goes on with its own " in err
    assert "data.task.operations=2" in err and "steps=3" not in err


@pytest.mark.slow
def test_closed_streams_cost_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        words = [*CHILD, *command(tmp_path / "run", steps=2)]
        done = subprocess.run(words, env=child_environment(), stdout=full, stderr=full)
    assert done.returncode == 0 and (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_a_second_ctrl_c_costs_nothing(tmp_path):
    words = [*CHILD, *command(tmp_path / "run", steps=10_000)]
    process = subprocess.Popen(words, env=child_environment(), stderr=subprocess.PIPE, text=True)
    await_rows(tmp_path / "run", 6, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "shutdown" not in err
    steps = len(rows(tmp_path / "run")) + 2
    train(tiny(steps=steps), tmp_path / "run")
    train(tiny(steps=steps), tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole", tiny(steps=steps))
