"""The library's own sampler behind `records.Sampler`."""

import jax
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.records import NotFinite, Prompts, Sampling
from dcmdp_jax.rollout.generate import completion_keys
from dcmdp_jax.rollout.jetstream import JetStreamSampler
from dcmdp_jax.stopping import Interrupted
from dcmdp_jax.tokens import tokenizer
from support.engines import DENSE, G, P, T, make_params, make_prompts

pytestmark = pytest.mark.full

TEXT = tokenizer.CharacterTokenizer("".join(chr(ord("A") + i) for i in range(35)))


@pytest.fixture(scope="module")
def sampler():
    made = JetStreamSampler(
        DENSE, TEXT, sharding.single_device_mesh(), slots=8, max_length=P + T, steps=4
    )
    made.update_weights(make_params(DENSE), 3)
    return made


def sample(sampler, prompts, **options):
    options = {"samples": G, "max_tokens": T, "sampling": Sampling(0.8), "seed": 5} | options
    return sampler.sample(prompts, **options)


def test_a_part_of_a_batch_samples_what_the_batch_does(sampler):
    prompts = make_prompts()
    whole = sample(sampler, prompts)
    part = Prompts(*(column[4:] for column in prompts))
    np.testing.assert_array_equal(sample(sampler, part, offset=4 * G).tokens, whole.tokens[4 * G :])


def test_a_completion_s_key_depends_on_its_number_alone():
    key = jax.random.key(5)
    keys = completion_keys(key, 10)
    np.testing.assert_array_equal(completion_keys(key, 3, offset=7), keys[7:])
    assert len({tuple(row) for row in keys.tolist()}) == 10


def test_keys_of_another_offset_compile_nothing(caplog):
    key = jax.random.key(5)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        completion_keys(key, 11, offset=3)
        assert "Compiling" in caplog.text
        caplog.clear()
        completion_keys(key, 11, offset=14)
        assert "Compiling" not in caplog.text


def test_completions_with_keys_of_their_own_are_those_of_the_batch(sampler):
    prompts = make_prompts()
    whole = sample(sampler, prompts)
    rows = np.array([5, 2])
    chosen = Prompts(prompts.tokens[rows], prompts.lengths[rows], ())
    numbers = rows * G + 1
    keys = completion_keys(jax.random.key(5), len(whole.tokens))[numbers]
    part = sample(sampler, chosen, samples=1, keys=keys)
    np.testing.assert_array_equal(part.tokens, whole.tokens[numbers])


def test_another_seed_samples_other_tokens(sampler):
    prompts = make_prompts()
    assert (sample(sampler, prompts).tokens != sample(sampler, prompts, seed=6).tokens).any()


def test_seeds_use_all_of_their_32_bits(sampler):
    prompts = make_prompts()
    low, high = (sample(sampler, prompts, seed=seed).tokens for seed in (5, 5 + 2**31))
    assert (low != high).any()


def test_the_rollout_carries_the_version_of_the_update(sampler):
    out = sample(sampler, make_prompts())
    assert set(out.version[np.arange(T) < out.lengths[:, None]]) == {3}


def test_each_completion_is_reported_when_it_ends(sampler):
    ended = {}
    out = sample(
        sampler,
        make_prompts(),
        on_end=lambda i, text, stopped: ended.__setitem__(i, (text.tolist(), stopped)),
    )
    assert ended == {
        i: (out.tokens[i, :n].tolist(), out.stopped[i]) for i, n in enumerate(out.text_lengths)
    }


def test_should_stop_ends_the_rollout(sampler):
    with pytest.raises(Interrupted):
        sample(sampler, make_prompts(), should_stop=lambda: True)


def test_weights_outlive_the_donation_of_the_parameters(sampler):
    params = jax.tree.map(jax.numpy.copy, make_params(DENSE))
    before = sample(sampler, make_prompts()).tokens
    sampler.update_weights(params, 3)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    np.testing.assert_array_equal(sample(sampler, make_prompts()).tokens, before)


@pytest.fixture
def unset():
    return JetStreamSampler(DENSE, TEXT, sharding.single_device_mesh(), slots=8, max_length=P + T)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused(unset, bad):
    params = make_params(DENSE)
    with pytest.raises(NotFinite, match="weights that hold NaN"):
        unset.update_weights(params | {"embed": params["embed"].at[0, 0].set(bad)}, 0)


def test_a_sampler_without_weights_says_so(unset):
    with pytest.raises(ValueError, match="call update_weights first"):
        sample(unset, make_prompts())
