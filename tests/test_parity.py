"""The parity check: figures from their definitions, the trainer's scoring, passing and failing."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder, weights
from dcmdp_jax.records import Rollout
from dcmdp_jax.run import checkpoint
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.tokens import tokenizer
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
    """A model far from uniform as a Hugging Face folder, with the chain task's characters."""
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
def test_an_exact_engine_is_within_1e_5_nats(changes, devices, monkeypatch):
    """On every token of two batches, through sampling, packing and scoring as in a run.

    A cut support is no gap.
    """
    run = tiny(**FLOAT, **changes)
    inputs = read_inputs(run, jax.devices()[:devices])
    result = parity.measure(run, inputs, sharp(inputs.model_config), 2)
    assert parity.default_limit(run, inputs) == 1e-5
    assert parity.failure(result, 1e-5) == ""
    assert 100 < result.gaps["all"].tokens == result.gaps["<= 64"].tokens <= 2 * 16 * 20
    assert 0 < float(result.calibration.floor) < 1e-6
    assert result.calibration.batches == 2


def test_scoring_returns_each_completions_own_log_probs():
    """Against the forward pass, one sequence at a time."""
    run = tiny()
    inputs = read_inputs(run, ONE_DEVICE)
    weights_ = sharp(inputs.model_config)
    rollout = sampled(run, inputs, weights_)
    logp = parity.scorer(run, inputs)(weights_.params, rollout, 0)
    forward = jax.jit(decoder.logits, static_argnums=2)
    for i, n in enumerate(rollout.lengths):
        prompt = rollout.prompts.tokens[i // 4, : rollout.prompts.lengths[i // 4]]
        row = np.zeros((1, 26), np.int32)
        row[0, : len(prompt) + n] = np.concatenate([prompt, rollout.tokens[i, :n]])
        logits = forward(weights_.params, row, inputs.model_config)[0]
        exact = np.asarray(jax.nn.log_softmax(logits / 0.8))
        predictions = exact[len(prompt) - 1 : len(prompt) - 1 + n]
        expected = predictions[np.arange(n), rollout.tokens[i, :n]]
        np.testing.assert_allclose(logp[i, :n], expected, atol=1e-5)
        assert not logp[i, n:].any()


@pytest.mark.parametrize("seed, split", [(1, 1), (0, 2), (0, 7)])
def test_scoring_does_not_depend_on_the_packing(seed, split):
    run = tiny()
    inputs = read_inputs(run, ONE_DEVICE)
    weights_ = sharp(inputs.model_config)
    rollout = sampled(run, inputs, weights_)
    score = parity.scorer(run, inputs)
    logp = score(weights_.params, rollout, 0)
    again = score(weights_.params, rollout, seed, split=split)
    np.testing.assert_allclose(again, logp, atol=1e-5)


class Reporting:
    """A sampler of three random tokens each, which reports too much by `excess` nats."""

    def __init__(self, config, model, tokenizer, mesh, excess):
        self.model = model
        self.excess = excess
        self.temperature = config.rollout.temperature

    def update_weights(self, params, version):
        self.params = params
        self.version = version

    def sample(self, prompts, *, samples, max_tokens, sampling, seed, **others):
        count = len(prompts.lengths) * samples
        tokens = np.zeros((count, max_tokens), np.int32)
        rng = np.random.default_rng(seed)
        tokens[:, :3] = rng.integers(2, self.model.vocab_size, (count, 3))
        rollout_logp = np.zeros((count, max_tokens), np.float32)
        for i in range(count):
            length = prompts.lengths[i // samples]
            row = np.concatenate([prompts.tokens[i // samples, :length], tokens[i, :3]])[None]
            logits = decoder.logits(self.params, row, self.model)[0] / self.temperature
            logp = np.asarray(jax.nn.log_softmax(logits))[length - 1 : -1]
            rollout_logp[i, :3] = logp[np.arange(3), tokens[i, :3]] + self.excess
        lengths = np.full(count, 3, np.int32)
        stopped = np.zeros(count, bool)
        return Rollout(
            prompts, tokens, lengths, lengths, rollout_logp, stopped, self.version, sampling
        )


@pytest.fixture
def black_box():
    """A run with a sampler of the user's, and its inputs."""
    run = tiny()
    rollout = dataclasses.replace(run.rollout, sampler=partial(Reporting, excess=0.125))
    run = dataclasses.replace(run, rollout=rollout)
    return run, read_inputs(run, ONE_DEVICE)


def test_any_sampler_is_measured(black_box):
    run, inputs = black_box
    result = parity.measure(run, inputs, sharp(inputs.model_config), 2)
    assert result.gaps["all"].tokens == 2 * 16 * 3
    assert result.gaps["all"].logp_diff_mean == pytest.approx(0.125, abs=1e-5)


def test_another_sampler_has_no_default_limit(black_box):
    run, inputs = black_box
    rollout = dataclasses.replace(run.rollout, precision=Precision())
    assert parity.default_limit(dataclasses.replace(run, rollout=rollout), inputs) is None


def test_another_samplers_precision_is_not_recorded(black_box, tmp_path):
    run, _ = black_box
    parity.write(result(), run, None, tmp_path)
    assert json.loads((tmp_path / "parity.json").read_text())["precision"] is None


@pytest.fixture
def tokens():
    """Trainer's and engine's log-probs, mask and positions, [30, 40] each.

    Padding holds garbage, and one token has no finite log-prob of the engine.
    """
    rng = np.random.default_rng(0)
    old = -rng.exponential(size=(30, 40))
    position = np.arange(40) * 170 + rng.integers(1, 40, (30, 1))
    engine = old + 0.2 * rng.normal(size=old.shape)
    mask = rng.random(old.shape) < 0.8
    old[~mask] = 1e2
    engine[~mask] = -1e4
    engine[3, 5] = np.nan
    mask[3, 5] = True
    return old, engine, mask, position


def test_figures_by_position_are_their_definitions(tokens):
    """In float64; a token without a finite log-prob counts, and is in no other figure."""
    old, engine, mask, position = tokens
    gaps = parity.by_context(old.astype(np.float32), engine.astype(np.float32), mask, position)
    buckets = {
        "<= 64": position <= 64,
        "<= 256": (position > 64) & (position <= 256),
        "<= 1024": (position > 256) & (position <= 1024),
        "<= 4096": (position > 1024) & (position <= 4096),
        "> 4096": position > 4096,
        "all": position > 0,
    }
    assert list(gaps) == list(buckets)
    for name, bucket in buckets.items():
        inside = bucket & mask & np.isfinite(engine)
        diff = (old - engine)[inside]
        delta = np.abs(np.exp(old) - np.exp(engine))[inside]
        expected = (
            abs(diff).mean(),
            abs(diff).max(),
            delta.max(),
            (np.exp(diff) - 1 - diff).mean(),
            (abs(np.exp(diff) - 1) > 0.2).mean(),
            delta.mean(),
        )
        assert gaps[name].tokens == (bucket & mask).sum()
        np.testing.assert_allclose(gaps[name][1:], expected, rtol=2e-5)


def test_buckets_without_tokens_are_left_out(tokens):
    old, engine, mask, position = tokens
    few = mask & (position <= 64)
    gaps = parity.by_context(old.astype(np.float32), engine.astype(np.float32), few, position)
    assert list(gaps) == ["<= 64", "all"]


def result(sums=(1.0, 3.0), counts=(100, 100), dropped=0, worst=2e-6):
    calibration = parity.constraint.calibrate_tolerance(np.array(sums), np.array(counts))
    return parity.Parity(
        "here",
        {"all": parity.GapStatistics(200, 1e-6, worst, 1e-6, 0.0, 0.0, 0.02)},
        dropped,
        calibration,
    )


def test_the_verdict_names_floor_error_and_suggested_tolerance():
    """Means 0.01 and 0.03: floor 0.02, standard error 0.01, tolerance max(1.2 floor, floor + 3
    errors) = 0.05.
    """
    measured = (
        "floor, is 0.02 ± 0.01 (standard error over 2 batches); the suggested tolerance is 0.05."
    )
    assert measured in parity.verdict(result(), 0.019)


def test_a_tolerance_under_the_floor_is_reported():
    verdict = parity.verdict(result(), 0.019)
    assert "tolerance of 0.019 lies under the floor: no multiplier can meet it" in verdict
    assert "lies above the floor" in parity.verdict(result(), 0.021)


@pytest.mark.parametrize(
    "result, limit, reason",
    [
        (result(), 1e-5, ""),
        (result(), None, ""),
        (result(), 1e-6, "2e-06 exceeds the limit of 1e-06"),
        (result(worst=np.nan), 1e-5, "nan exceeds"),
        (result(dropped=3), None, "no finite log-prob for 3 tokens"),
    ],
)
def test_reasons_for_a_failure(result, limit, reason):
    failure = parity.failure(result, limit)
    assert reason in failure and bool(reason) == bool(failure)


@pytest.mark.parametrize(
    "changes",
    [{}, FLOAT | {"model.compute.bfloat16": True}, FLOAT | {"rollout.precision.cache": "int8"}],
)
def test_only_an_exact_engine_has_a_default_limit(changes):
    run = tiny(**changes)
    assert parity.default_limit(run, read_inputs(run, ONE_DEVICE)) is None


def test_the_command_fails_above_the_limit(tmp_path, capsys, folder):
    """An int4 engine against a limit of 1e-5 nats."""
    words = command(
        "parity",
        tmp_path / "run",
        "--batches",
        "2",
        "--max-error",
        "1e-5",
        **{"model.folder": folder},
    )
    assert dcmdp(words) == 1
    output = capsys.readouterr()
    assert "exceeds the limit of 1e-05" in output.err
    assert "\n<= 64 " in output.out and "lies under the floor" in output.out
    record = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert record["passed"] is False and record["tolerance_under_floor"] is True
    assert record["weights"] == folder and record["precision"]["weights"] == "int4"
    assert record["sampling"]["temperature"] == 0.8
    assert record["context"]["all"]["logp_diff_max"] > 1e-2
    assert record["suggested_tolerance"] > record["floor"] > record["tolerance"] == 0.004


def test_the_command_passes_for_an_exact_engine(tmp_path, folder):
    """It leaves one file, and the folder free for a run."""
    words = command(
        "parity", tmp_path / "run", "--batches", "2", **FLOAT, **{"model.folder": folder}
    )
    assert dcmdp(words) == 0
    record = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert record["max_error"] == 1e-5 and record["passed"] is True
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["parity.json"]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    parity.write(result(worst=np.nan), tiny(), None, tmp_path)
    assert (
        json.loads((tmp_path / "parity.json").read_text())["context"]["all"]["logp_diff_max"]
        is None
    )


def test_one_batch_is_refused(tmp_path, capsys):
    assert dcmdp(command("parity", tmp_path, "--batches", "1")) == 2
    assert capsys.readouterr().err == "dcmdp: --batches 1 gives no standard error; take 2 or more\n"


@pytest.fixture
def stale_run(tmp_path):
    """A run with rollouts one step old and two checkpoints, and the prompts that follow them."""
    run = tiny(**{"rollout.staleness": 1})
    following = make_run(tmp_path, run, (1, 2))
    return run, read_inputs(run, ONE_DEVICE), tmp_path, following


def test_weights_are_those_that_the_next_batch_would_be_sampled_with(stale_run):
    run, inputs, workdir, _ = stale_run
    loaded = parity.load(run, inputs, workdir)
    assert loaded.version == 1
    assert loaded.origin == f"checkpoint 2 of {workdir}, weights of step 1"
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(loaded.params))


def test_a_checkpoint_that_is_being_written_is_ignored(stale_run):
    run, inputs, workdir, _ = stale_run
    unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert parity.load(run, inputs, workdir).origin.startswith("checkpoint 2")
    assert checkpoint.steps(workdir) == [1, 2] and unfinished.is_dir()


def test_loading_leaves_the_prompts_where_they_are(stale_run):
    run, inputs, workdir, _ = stale_run
    position = inputs.prompts.get_state()
    parity.load(run, inputs, workdir)
    assert inputs.prompts.get_state() == position


def test_prompts_go_on_after_those_of_the_checkpoint(stale_run):
    run, inputs, workdir, following = stale_run
    inputs.prompts.set_state(parity.load(run, inputs, workdir).prompt_state)
    np.testing.assert_array_equal(next(inputs.prompts).tokens, following.tokens)


def test_a_checkpoint_of_another_run_is_refused(stale_run):
    _, _, workdir, _ = stale_run
    with pytest.raises(ValueError, match="do not fit"):
        parity.load(tiny(), read_inputs(tiny(), ONE_DEVICE), workdir)


def test_without_a_checkpoint_the_folders_weights_are_loaded(tmp_path, folder):
    run = tiny(**{"model.folder": folder})
    loaded = parity.load(run, read_inputs(run, ONE_DEVICE), tmp_path)
    expected = sharp(run.model.architecture).params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
    assert loaded.origin == folder and not any(tmp_path.iterdir())


def test_without_a_folder_weights_are_random(tmp_path):
    loaded = parity.load(tiny(), read_inputs(tiny(), ONE_DEVICE), tmp_path)
    assert "random weights" in loaded.origin and not any(tmp_path.iterdir())
