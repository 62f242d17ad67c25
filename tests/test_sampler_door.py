"""The sampler of experiments/own_sampler.py: a run trains, resumes and is evaluated with it."""

import dataclasses
import pathlib

import numpy as np
import pytest

from dcmdp_jax import starting
from dcmdp_jax.batches import make_sampler, sampling
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.inputs import read_inputs
from dcmdp_jax.records import Prompts
from dcmdp_jax.run_folder import claim
from support.training import ONE_DEVICE, assert_same_run, options, rows, train

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


def test_both_policies_are_evaluated_on_held_out_problems(four_steps):
    """By two samplers, of which the library's own draws from the trainer's parameters."""
    evaluated = [row for row in rows(four_steps[0]) if "reward_eval_infer" in row]
    assert [row["step"] for row in evaluated] == [1, 2, 4]
    for row in evaluated:
        assert 0 <= row["reward_eval_infer"] <= 1 and 0 <= row["reward_eval_train"] <= 1


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


def test_a_run_cannot_go_on_with_another_sampler(four_steps):
    run = run_of(4)
    other = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, sampler=None))
    with pytest.raises(ValueError, match="rollout.sampler"):
        claim(four_steps[0], other)
