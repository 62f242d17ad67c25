"""A step that fails: what is saved, what is said, and that the run goes on bit for bit."""

import dataclasses
import errno
import functools
import os
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcmdp_jax import sync, tasks
from dcmdp_jax.run import checkpoint, starting
from dcmdp_jax.stopping import Failed
from support.training import QUICKSTART, assert_same_run, command, dcmdp, rows, tiny, train

pytestmark = pytest.mark.full

# ------------------------------------------------------------ the checkpoint of the start


def test_a_folder_that_holds_no_checkpoint_is_named_before_the_first_step(tmp_path, monkeypatch):
    """As plain gcsfuse does, the file system renames files and no folders."""
    rename = os.rename

    def refuse_folders(source, target):
        if os.path.isdir(source):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", source, None, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_folders)
    with pytest.raises(OSError, match="cannot rename a folder .*; mount a bucket .*--workdir"):
        train(tiny(**{"warmup.steps": 0}), tmp_path)
    assert not rows(tmp_path)


# ------------------------------------------------------------ numbers that are not finite

NEVER_FINITE = f"""
import dataclasses
import jax.numpy as jnp
from dcmdp_jax.experiment import load_experiment

def penalty(logp, rollout_logp, mask, multiplier):
    return logp * jnp.nan

RUN = load_experiment({QUICKSTART!r})
CONFIG = dataclasses.replace(RUN, constraint=dataclasses.replace(RUN.constraint, penalty=penalty))
"""


@pytest.fixture(scope="module")
def never_finite(tmp_path_factory):
    """An experiment whose loss is NaN, and the folder of its run, which may skip two steps."""
    folder = tmp_path_factory.mktemp("never_finite")
    experiment = folder / "experiment.py"
    experiment.write_text(NEVER_FINITE)
    return experiment, folder / "run"


def words_of(never_finite, **changes):
    experiment, workdir = never_finite
    return ["train", str(experiment), *command(workdir, **changes)[2:]]


@pytest.mark.slow
def test_a_run_that_makes_no_update_stops_with_a_sentence_and_is_saved(never_finite, capsys):
    _, workdir = never_finite
    assert dcmdp(words_of(never_finite, steps=9, **{"algorithm.max_skipped": 2})) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("dcmdp: the loss is not finite, and the last 2 steps made no update")
    assert message.endswith(f"Everything up to step 2 is saved in {workdir}")
    assert [row["skipped"] for row in rows(workdir)] == [2, 4]
    assert checkpoint.steps(workdir) == [0, 2]


@pytest.mark.slow
def test_without_a_limit_a_run_goes_on_without_updates_and_its_page_says_so(never_finite):
    _, workdir = never_finite
    assert dcmdp(words_of(never_finite, steps=3, **{"algorithm.max_skipped": 0})) == 0
    assert [row["skipped"] for row in rows(workdir)] == [2, 4, 6]
    assert "Nothing was learnt: every update was left out." in (workdir / "report.html").read_text()


def test_weights_that_are_not_finite_are_named_before_the_first_step(tmp_path, monkeypatch):
    start = starting.starting_weights

    def damaged(*args, **named):
        params = start(*args, **named)
        return params | {"final_norm": params["final_norm"].at[0].set(np.nan)}

    monkeypatch.setattr(starting, "starting_weights", damaged)
    with pytest.raises(Failed, match="^the weight final_norm is not finite before the first step"):
        train(tiny(**{"warmup.steps": 0}), tmp_path)
    assert not checkpoint.steps(tmp_path)


@pytest.fixture
def overflow_after_step_2(monkeypatch):
    """The engine's weights are not finite from version 2 on."""
    converter = sync.converter

    def overflowing(*arguments):
        def to_engine(params, version):
            weights = converter(*arguments)(params, version)
            return weights._replace(finite=weights.finite & (int(version) < 2))

        return to_engine

    monkeypatch.setattr(sync, "converter", overflowing)


@pytest.mark.usefixtures("overflow_after_step_2")
@pytest.mark.parametrize(
    "staleness, every, saved, logged",
    [(0, 3, [0], 1), (1, 3, [0], 2), (0, 1, [0, 1], 1)],
)
def test_a_step_that_leaves_a_weight_that_is_not_finite_is_not_saved(
    tmp_path, staleness, every, saved, logged
):
    """The last checkpoint stays the newest, also where the last step overflows."""
    steps = 2 + 2 * staleness
    run = tiny(steps=steps, **{"checkpoint.every": every, "rollout.staleness": staleness})
    message = "^a weight of the engine is not finite after step 2, which is not saved"
    with pytest.raises(Failed, match=message):
        train(run, tmp_path)
    assert checkpoint.steps(tmp_path) == saved
    assert len(rows(tmp_path)) == logged


def test_weights_that_are_not_finite_are_not_saved_with_staleness(tmp_path):
    """The sampler sees the weights of a step only when the next step begins."""

    def overflowing(algorithm):  # in step 2
        updates_of_one_step = algorithm.minibatches
        return optax.scale_by_schedule(lambda n: jnp.where(n < updates_of_one_step, 1e-3, jnp.inf))

    run = tiny(steps=4, **{"checkpoint.every": 1, "rollout.staleness": 1})
    run = dataclasses.replace(
        run, algorithm=dataclasses.replace(run.algorithm, optimizer=overflowing)
    )
    message = "^the weight .* is not finite after step 2, which is not saved"
    with pytest.raises(Failed, match=message):
        train(run, tmp_path)
    assert checkpoint.steps(tmp_path) == [0, 1]


@pytest.mark.usefixtures("overflow_after_step_2")
def test_a_checkpoint_whose_weights_turn_out_not_finite_is_named(tmp_path):
    """A sampler may hold what overflows alone: adapters, say."""
    run = tiny(steps=4, **{"checkpoint.every": 1, "rollout.staleness": 1})
    with pytest.raises(Failed) as failure:
        train(run, tmp_path)
    assert str(failure.value) == (
        f"a weight of the engine is not finite in checkpoint 2 of {tmp_path}; start "
        "anew in another --workdir, with a smaller algorithm.learning_rate"
    )


# ------------------------------------------------------------ verifiers


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
    err = capsys.readouterr().err
    assert "the state after step 3 is saved" in err
    (message,) = [line for line in err.splitlines() if line.startswith("dcmdp: the verifier ")]
    assert "Traceback" not in err
    assert (
        "ZeroDivisionError: division by zero; fix the verifier; go on with: dcmdp train" in message
    )
    monkeypatch.setattr(tasks.Chain, "reward", right)
    assert dcmdp(["train", QUICKSTART, "--workdir", str(tmp_path / "a")]) == 0
    train(tiny(**changes), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b", tiny(**changes))


def test_a_verifier_that_hangs_is_left_and_its_batch_comes_again(tmp_path, monkeypatch, capsys):
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


# ------------------------------------------------------------ damaged checkpoints

EVERY_SECOND = {"steps": 4, "checkpoint.every": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps."""
    workdir = tmp_path_factory.mktemp("whole")
    train(tiny(**EVERY_SECOND), workdir)
    return workdir


@pytest.fixture
def damaged(whole, tmp_path):
    """The same run with its newest checkpoint full of zeros."""
    workdir = shutil.copytree(whole, tmp_path / "damaged")
    for file in (workdir / "checkpoints" / "4" / "state").rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    return workdir


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(damaged, whole, capsys):
    assert dcmdp(["train", QUICKSTART, "--workdir", str(damaged)]) == 0
    err = capsys.readouterr().err
    assert "checkpoint 4 in" in err and "going on from checkpoint 2" in err
    assert_same_run(damaged, whole, tiny(**EVERY_SECOND))


def test_the_checkpoint_before_a_damaged_one_is_converted(damaged, tmp_path, capsys):
    out = tmp_path / "out"
    assert dcmdp(["convert", QUICKSTART, str(out), "--workdir", str(damaged)]) == 0
    assert f"wrote step 2 to {out}" in capsys.readouterr().out


def test_where_all_checkpoints_are_damaged_the_run_is_refused_and_its_rows_stay(damaged, capsys):
    for folder in (damaged / "checkpoints").glob("[0-9]"):
        shutil.rmtree(folder / "state")
    assert dcmdp(["train", QUICKSTART, "--workdir", str(damaged)]) == 2
    assert "dcmdp: no checkpoint in" in capsys.readouterr().err and len(rows(damaged)) == 4
