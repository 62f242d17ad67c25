"""The parity gate: figures from their definitions, the trainer's own scoring, what passes and what
does not.
"""

import json

import jax
import numpy as np
import pytest

from dcmdp_jax import checkpoint, tokenizer
from dcmdp_jax.inputs import read_inputs
from dcmdp_jax.models import decoder, weights
from dcmdp_jax.tools import parity
from support.mismatch import (
    EXPERTS,
    FLOAT,
    command,
    make_run,
    sampled,
    sharp,
    tiny,
)
from support.training import ONE_DEVICE, dcmdp

pytestmark = pytest.mark.full


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A sharp model as a Hugging Face folder with the chain task's characters."""
    run = tiny()
    path = tmp_path_factory.mktemp("model")
    weights.save(str(path), run.model.architecture, sharp(run.model.architecture).params)
    tokenizer.save(tokenizer.CharacterTokenizer(run.data.task.alphabet), str(path))
    return str(path)


@pytest.mark.parametrize(
    "changes, devices",
    [
        ({}, 1),
        ({"rollout.top_p": 0.9}, 1),
        ({"rollout.top_k": 3}, 1),
        ({"rollout.min_p": 0.2}, 1),
        (EXPERTS, 1),
        (EXPERTS | {"mesh.fsdp": 2, "mesh.expert": 2}, 4),
    ],
    ids=["dense", "top-p", "top-k", "min-p", "moe", "sharded moe"],
)
def test_an_exact_engine_passes_the_gate(changes, devices):
    """1e-5 nats on every token of two batches, through sampling, packing and scoring as in a run.

    A cut support is no gap.
    """
    run = tiny(**FLOAT, **changes)
    inputs = read_inputs(run, jax.devices()[:devices])
    found = parity.measure(run, inputs, sharp(inputs.model_config), 2)
    assert parity.default_limit(run, inputs) == 1e-5 and parity.failure(found, 1e-5) == ""
    assert (
        100 < found.gaps["all"].tokens <= 2 * 16 * 20
        and found.gaps["all"].tokens == found.gaps["<= 64"].tokens
    )
    assert 0 < float(found.calibration.floor) < 1e-6 and found.calibration.batches == 2


def test_scoring_puts_every_completion_back_in_its_place():
    """Against the forward pass, one sequence at a time; the packing's seed and size change nothing."""
    run = tiny()
    inputs = read_inputs(run, ONE_DEVICE)
    policy = sharp(inputs.model_config)
    score = parity.scorer(run, inputs)
    out = sampled(run, inputs, policy)
    logp = score(policy.params, out, 0)
    forward = jax.jit(decoder.logits, static_argnums=2)
    for i, n in enumerate(out.lengths):
        prompt = out.prompts.tokens[i // 4, : out.prompts.lengths[i // 4]]
        row = np.zeros((1, 26), np.int32)
        row[0, : len(prompt) + n] = np.concatenate([prompt, out.tokens[i, :n]])
        exact = np.asarray(
            jax.nn.log_softmax(forward(policy.params, row, inputs.model_config)[0] / 0.8)
        )
        predicted = exact[len(prompt) - 1 : len(prompt) - 1 + n][np.arange(n), out.tokens[i, :n]]
        np.testing.assert_allclose(logp[i, :n], predicted, atol=1e-5)
        assert not logp[i, n:].any()
    for seed, split in ((1, 1), (0, 2), (0, 7)):
        np.testing.assert_allclose(score(policy.params, out, seed, split=split), logp, atol=1e-5)


def test_figures_by_position_are_their_definitions():
    """float64 NumPy; padding holds garbage, and a token without a finite engine log-prob is in no
    figure.
    """
    rng = np.random.default_rng(0)
    old = -rng.exponential(size=(30, 40))
    position = np.arange(40) * 170 + rng.integers(1, 40, (30, 1))
    engine = old + 0.2 * rng.normal(size=old.shape)
    mask = rng.random(old.shape) < 0.8
    old[~mask], engine[~mask] = 1e2, -1e4
    engine[3, 5], mask[3, 5] = np.nan, True
    found = parity.by_position(old.astype(np.float32), engine.astype(np.float32), mask, position)
    assert list(found) == ["<= 64", "<= 256", "<= 1024", "<= 4096", "> 4096", "all"]
    inside = {
        "<= 64": position <= 64,
        "<= 256": (position > 64) & (position <= 256),
        "> 4096": position > 4096,
        "<= 1024": (position > 256) & (position <= 1024),
        "<= 4096": (position > 1024) & (position <= 4096),
        "all": position > 0,
    }
    for name, where in inside.items():
        kept = where & mask & np.isfinite(engine)
        diff = (old - engine)[kept]
        delta = np.abs(np.exp(old) - np.exp(engine))[kept]
        expected = (
            abs(diff).mean(),
            abs(diff).max(),
            delta.max(),
            (np.exp(diff) - 1 - diff).mean(),
            (abs(np.exp(diff) - 1) > 0.2).mean(),
            delta.mean(),
        )
        assert found[name].tokens == (where & mask).sum()
        np.testing.assert_allclose(found[name][1:], expected, rtol=2e-5)
    few = parity.by_position(
        old.astype(np.float32), engine.astype(np.float32), mask & (position <= 64), position
    )
    assert list(few) == ["<= 64", "all"]


def result(sums=(1.0, 3.0), counts=(100, 100), dropped=0, worst=2e-6):
    calibration = parity.constraint.calibrate_tolerance(np.array(sums), np.array(counts))
    return parity.Parity(
        "here",
        {"all": parity.GapStatistics(200, 1e-6, worst, 1e-6, 0.0, 0.0, 0.02)},
        dropped,
        calibration,
    )


def test_a_tolerance_under_the_floor_is_called_one():
    """Means 0.01 and 0.03: floor 0.02, standard error 0.01, tolerance max(1.2 floor, floor + 3
    errors) = 0.05.
    """
    said = parity.verdict(result(), 0.019)
    assert (
        "floor, is 0.02 ± 0.01 (standard error over 2 batches); the suggested tolerance is 0.05."
        in said
    )
    assert "tolerance of 0.019 lies under the floor: no multiplier can meet it" in said
    assert "lies above the floor" in parity.verdict(result(), 0.021)


@pytest.mark.parametrize(
    "found, limit, says",
    [
        (result(), 1e-5, ""),
        (result(), None, ""),
        (result(), 1e-6, "2e-06 exceeds the limit of 1e-06"),
        (result(worst=np.nan), 1e-5, "nan exceeds"),
        (result(dropped=3), None, "no finite log-prob for 3 tokens"),
    ],
)
def test_what_the_gate_refuses(found, limit, says):
    assert says in parity.failure(found, limit) and bool(says) == bool(parity.failure(found, limit))


@pytest.mark.parametrize(
    "changes",
    [{}, FLOAT | {"model.compute.bfloat16": True}, FLOAT | {"rollout.precision.cache": "int8"}],
)
def test_only_an_exact_engine_has_a_limit_of_its_own(changes):
    run = tiny(**changes)
    assert parity.default_limit(run, read_inputs(run, ONE_DEVICE)) is None


def test_the_command(tmp_path, capsys, folder):
    """int4 ends with status 1 under a limit, float32 with 0 under its own; the JSON says so; the
    folder stays free.
    """
    named = {"model.folder": folder}
    assert (
        dcmdp(command("parity", tmp_path / "run", "--batches", "2", "--max-error", "1e-5", **named))
        == 1
    )
    seen = capsys.readouterr()
    assert (
        "exceeds the limit of 1e-05" in seen.err
        and "\n<= 64 " in seen.out
        and "lies under the floor" in seen.out
    )
    record = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert (
        record["passed"] is False
        and record["tolerance_under_floor"] is True
        and record["weights"] == folder
    )
    assert record["precision"]["weights"] == "int4" and record["sampling"]["temperature"] == 0.8
    assert record["positions"]["all"]["logp_diff_max"] > 1e-2
    assert record["suggested_tolerance"] > record["floor"] > record["tolerance"] == 0.004
    assert dcmdp(command("parity", tmp_path / "run", "--batches", "2", **FLOAT, **named)) == 0
    record = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert record["max_error"] == 1e-5 and record["passed"] is True
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["parity.json"]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    parity.write(result(worst=np.nan), tiny(), None, tmp_path)
    assert (
        json.loads((tmp_path / "parity.json").read_text())["positions"]["all"]["logp_diff_max"]
        is None
    )


def test_one_batch_is_refused(tmp_path, capsys):
    assert dcmdp(command("parity", tmp_path, "--batches", "1")) == 2
    assert capsys.readouterr().err == "dcmdp: --batches 1 gives no standard error; take 2 or more\n"


def test_the_newest_checkpoint_is_what_the_next_batch_is_sampled_from(tmp_path):
    run = tiny(**{"rollout.staleness": 1})
    following = make_run(tmp_path, run, (1, 2))
    inputs = read_inputs(run, ONE_DEVICE)
    unfinished = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    found = parity.load(run, inputs, tmp_path)
    assert checkpoint.steps(tmp_path) == [1, 2] and unfinished.is_dir(), (
        "what a run is writing is left alone"
    )
    assert found.version == 1 and found.origin == f"checkpoint 2 of {tmp_path}, weights of step 1"
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(found.params))
    np.testing.assert_array_equal(next(inputs.prompts).tokens, following.tokens)
    with pytest.raises(ValueError, match="do not fit"):
        parity.load(tiny(), read_inputs(tiny(), ONE_DEVICE), tmp_path)


def test_without_a_run_the_folder_is_looked_at_and_else_random_weights(tmp_path, folder):
    run = tiny(**{"model.folder": folder})
    loaded = parity.load(run, read_inputs(run, ONE_DEVICE), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, sharp(run.model.architecture).params)
    assert loaded.origin == folder
    assert "random weights" in parity.load(tiny(), read_inputs(tiny(), ONE_DEVICE), tmp_path).origin
    assert not any(tmp_path.iterdir())
