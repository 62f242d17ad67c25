"""The sampler of experiments/own_sampler.py: a run trains, resumes and is evaluated with it."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from dcmdp_jax.batches import check_rollout, make_sampler, sampling
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.records import Prompts
from dcmdp_jax.run import starting
from dcmdp_jax.run.folder import claim
from dcmdp_jax.run.inputs import read_inputs
from support.rollouts import make_rollout
from support.training import (
    MAIN,
    ONE_DEVICE,
    TINY,
    assert_same_run,
    child_environment,
    dcmdp,
    options,
    rows,
    tiny,
    train,
    words,
)

pytestmark = pytest.mark.full

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "own_sampler.py"


def even(example, text):
    """A reward that random weights earn now and then."""
    return float(sum(map(ord, text)) % 2 == 0)


def run_of(steps):
    changes = options(**{"steps": steps, "eval.every": 2})
    run = override(load_experiment(str(EXPERIMENT)), changes)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, verifier=even))


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The folder of a run of four steps, and its last state."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(run_of(4), workdir)


def test_it_takes_at_most_forty_lines():
    text = EXPERIMENT.read_text()
    body = text[text.index("class PlainSampler") : text.index("CONFIG =")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 40


def test_it_trains(four_steps):
    workdir, state = four_steps
    assert int(state.step) == 4 and int(state.skipped) == 0
    assert all(row["grad_norm"] > 0 for row in rows(workdir))


def test_it_has_no_discrepancy_with_the_trainer(four_steps):
    assert all(row["delta_mean"] < 1e-5 for row in rows(four_steps[0]))


def test_it_resumes_bit_for_bit(four_steps, tmp_path):
    train(run_of(2), tmp_path)
    train(run_of(4), tmp_path)
    assert_same_run(four_steps[0], tmp_path, run_of(4))


def test_its_policy_is_evaluated_on_held_out_problems(four_steps):
    evaluated = [row for row in rows(four_steps[0]) if "reward_eval_infer" in row]
    assert [row["step"] for row in evaluated] == [1, 2, 4]
    assert all(0 <= row["reward_eval_infer"] <= 1 for row in evaluated)


def test_no_engine_is_made_to_evaluate_the_trainers_policy(four_steps):
    assert not any("reward_eval_train" in row for row in rows(four_steps[0]))


def test_it_trains_without_google_jetstream(tmp_path):
    hide = "import sys; sys.modules['jetstream'] = None; "
    changes = words(**{"steps": 1, "eval.every": 1, "warmup.steps": 0})
    command = ["train", str(EXPERIMENT), "--workdir", str(tmp_path), *changes]
    subprocess.run(
        [sys.executable, "-c", hide + MAIN, *command], env=child_environment(), check=True
    )
    (row,) = rows(tmp_path)
    assert row["delta_mean"] < 1e-5 and "reward_eval_infer" in row


@pytest.mark.parametrize(
    "changes",
    [{"rollout.slots": 7}, {"rollout.precision.weights": "int3"}],
    ids=["slots", "precision"],
)
def test_properties_of_an_engine_that_is_not_there_are_not_checked(changes):
    changes = {"mesh.fsdp": "0"} | {name: str(value) for name, value in changes.items()}
    run = override(run_of(1), changes)
    default = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, sampler=None))
    two_devices = jax.devices()[:2]
    with pytest.raises(ValueError, match="rollout.(slots=7|precision.weights='int3')"):
        read_inputs(default, two_devices)
    read_inputs(run, two_devices)


def test_completions_differ_from_each_other_and_depend_on_their_number():
    """As the loop needs it of any sampler: completion i is drawn by `seed` and `offset + i`."""
    run = run_of(1)
    inputs = read_inputs(run, ONE_DEVICE)
    sampler = make_sampler(run, inputs)
    sampler.update_weights(starting.unwarmed_weights(run, inputs), 0)
    prompts = next(inputs.prompts)
    arguments = dict(
        samples=2,
        max_tokens=8,
        sampling=sampling(run.rollout),
        stop_strings=(),
        seed=5,
        should_stop=lambda: False,
    )
    batch = sampler.sample(prompts, offset=0, **arguments)
    part = Prompts(prompts.tokens[2:], prompts.lengths[2:], prompts.examples[2:])
    np.testing.assert_array_equal(
        sampler.sample(part, offset=4, **arguments).tokens, batch.tokens[4:]
    )
    assert len({tuple(row) for row in batch.tokens.tolist()}) > 4


def rollout_of(width=int(TINY["rollout.max_tokens"]), **reported):
    """A rollout of one token, with what a sampler may leave out."""
    prompts = Prompts(np.ones((1, 1), np.int32), np.ones(1, np.int32), ())
    tokens = np.ones((1, width), np.int32)
    logp = np.zeros((1, width), np.float32)
    return make_rollout(prompts, tokens, [1], logp, [False])._replace(**reported)


def test_completions_are_padded_to_the_longest_that_may_be():
    with pytest.raises(ValueError, match="^the sampler reports completions of 19 columns; pad"):
        check_rollout(rollout_of(width=19), tiny())


@pytest.mark.parametrize(
    "name, value", [("rollout.top_k", 5), ("rollout.top_p", 0.9), ("rollout.min_p", 0.1)]
)
def test_a_cut_support_must_be_reported(name, value):
    run = tiny(**{name: value})
    message = f"^{name}={value} cuts the support .* reports no support_mass"
    with pytest.raises(ValueError, match=message):
        check_rollout(rollout_of(), run)
    check_rollout(rollout_of(support_mass=np.ones((1, 1), np.float32)), run)


def test_a_support_that_is_not_cut_need_not_be_reported():
    check_rollout(rollout_of(), tiny())


def test_experts_that_are_replayed_must_be_reported():
    run = tiny(**{"algorithm.replay_routing": True})
    with pytest.raises(ValueError, match="^algorithm.replay_routing .* reports none"):
        check_rollout(rollout_of(), run)
    check_rollout(rollout_of(experts=np.zeros((1, 1, 1, 1), np.int32)), run)


def test_a_run_with_an_unreported_cut_ends_with_the_sentence(tmp_path, capsys):
    command = ["train", str(EXPERIMENT), "--workdir", str(tmp_path)]
    assert dcmdp([*command, *words(**{"rollout.top_p": 0.5, "warmup.steps": 0})]) == 1
    assert "dcmdp: rollout.top_p=0.5 cuts the support" in capsys.readouterr().err


def test_a_run_cannot_go_on_with_another_sampler(four_steps):
    run = run_of(4)
    other = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, sampler=None))
    with pytest.raises(ValueError, match="rollout.sampler"):
        claim(four_steps[0], other)
