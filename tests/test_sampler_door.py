"""Another sampler than the library's: forty lines in an experiment file train, resume, evaluate."""

import dataclasses

import numpy as np
import pytest

from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.run_folder import claim
from support.training import QUICKSTART, assert_same_run, options, rows, train

pytestmark = pytest.mark.full

# Samples from the trainer's own parameters: no cache, the whole sequence anew for each token.
EXPERIMENT = f"""
import dataclasses
import jax
import jax.numpy as jnp
import numpy as np
from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.models import decoder
from dcmdp_jax.records import Rollout
from dcmdp_jax.stopping import Interrupted


class PlainSampler:
    def __init__(self, config, model, tokenizer, mesh):
        self.stop_ids = tokenizer.eos_ids
        self.logits = jax.jit(lambda params, tokens: decoder.logits(params, tokens, model))

    def update_weights(self, params, version):
        self.params = jax.tree.map(jnp.copy, params)
        self.version = version

    def sample(
        self, prompts, *, samples, max_tokens, sampling, stop_strings, seed, offset, should_stop
    ):
        count = len(prompts.lengths) * samples
        start = np.repeat(prompts.lengths, samples)
        pad = ((0, 0), (0, max_tokens))
        tokens = np.pad(np.repeat(prompts.tokens, samples, axis=0), pad)
        out = np.zeros((count, max_tokens), np.int32)
        logp = np.zeros((count, max_tokens), np.float32)
        lengths = np.zeros(count, np.int32)
        stopped = np.zeros(count, bool)
        numbers = offset + jnp.arange(count)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
        for t in range(max_tokens):
            if should_stop():
                raise Interrupted
            logits = self.logits(self.params, tokens)[np.arange(count), start + t - 1]
            log_probs = jax.nn.log_softmax(logits / sampling.temperature)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            token = np.asarray(jax.vmap(jax.random.categorical)(step_keys, log_probs))
            live = np.flatnonzero(~stopped)
            out[live, t] = tokens[live, start[live] + t] = token[live]
            logp[live, t] = np.asarray(log_probs)[live, token[live]]
            lengths[live] += 1
            stopped[live] = np.isin(token[live], self.stop_ids)
        return Rollout(
            prompts, out, lengths, lengths - stopped, logp, stopped, self.version, sampling
        )


BASE = load_experiment({QUICKSTART!r})
CONFIG = dataclasses.replace(BASE, rollout=dataclasses.replace(BASE.rollout, sampler=PlainSampler))
"""


def even(example, text):
    """A reward that random weights earn now and then."""
    return float(sum(map(ord, text)) % 2 == 0)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    file = tmp_path_factory.mktemp("experiment") / "plain.py"
    file.write_text(EXPERIMENT)
    return file


def run_of(experiment, steps):
    changes = options(**{"steps": steps, "eval.every": 2, "rollout.precision.weights": "float32"})
    run = override(load_experiment(str(experiment)), changes)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, verifier=even))


@pytest.fixture(scope="module")
def four_steps(experiment, tmp_path_factory):
    """The folder of a run of four steps, and its last state."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(run_of(experiment, 4), workdir)


def test_it_takes_at_most_forty_lines():
    body = EXPERIMENT[EXPERIMENT.index("class PlainSampler") : EXPERIMENT.index("BASE =")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 40


def test_it_trains(four_steps):
    workdir, state = four_steps
    assert int(state.step) == 4 and int(state.skipped) == 0
    assert all(row["grad_norm"] > 0 for row in rows(workdir))


def test_it_has_no_discrepancy_with_the_trainer(four_steps):
    assert all(row["delta_mean"] < 1e-5 for row in rows(four_steps[0]))


def test_it_resumes_bit_for_bit(experiment, four_steps, tmp_path):
    train(run_of(experiment, 2), tmp_path)
    train(run_of(experiment, 4), tmp_path)
    assert_same_run(four_steps[0], tmp_path, run_of(experiment, 4))


def test_both_policies_are_evaluated_on_held_out_problems(four_steps):
    """By two samplers, of which the library's own draws from the trainer's parameters."""
    evaluated = [row for row in rows(four_steps[0]) if "reward_eval_infer" in row]
    assert [row["step"] for row in evaluated] == [1, 2, 4]
    for row in evaluated:
        assert 0 <= row["reward_eval_infer"] <= 1 and 0 <= row["reward_eval_train"] <= 1


def test_completions_differ_from_each_other_and_depend_on_their_number(experiment):
    """As the loop needs it of any sampler: completion i is drawn by `seed` and `offset + i`."""
    run = run_of(experiment, 1)
    from dcmdp_jax import starting
    from dcmdp_jax.batches import make_sampler, sampling
    from dcmdp_jax.inputs import read_inputs
    from dcmdp_jax.records import Prompts
    from support.training import ONE_DEVICE

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


def test_a_run_cannot_go_on_with_another_sampler(experiment, four_steps):
    run = run_of(experiment, 4)
    other = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, sampler=None))
    with pytest.raises(ValueError, match="rollout.sampler"):
        claim(four_steps[0], other)
