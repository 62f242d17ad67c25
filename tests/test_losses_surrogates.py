"""Complete surrogates, TBPO and what sets the size of a step, against float64 and by their limits.

The expected numbers are those of `surrogates_float64` on the inputs of our own golden file.
"""

import functools

import jax
import numpy as np
import pytest

from dcmdp_jax.losses import corrections, policy, reduce, sequence, step_size, surrogates
from support import golden
from support import surrogates_float64 as expected

INPUTS = {name: case["inputs"] for name, case in golden.FILES["float64"]["cases"].items()}
SURROGATES = {
    "adaptive_clip": functools.partial(
        surrogates.adaptive_clip, clip_high=0.28, high=expected.HIGH
    ),
    "log_linear": functools.partial(
        surrogates.log_linear,
        surrogate=corrections.decoupled(policy.clipped, corrections.tis(expected.WEIGHT)),
        alpha=expected.ALPHA,
    ),
    "tbpo": corrections.decoupled(
        functools.partial(sequence.tbpo, clip_low=0.02, clip_high=0.03, dual_clip=expected.BAND)
    ),
}
REDUCERS = {"tbpo": reduce.sequence_mean_token_mean}

every_case = pytest.mark.parametrize("case", INPUTS)


def arrays(case):
    return {name: np.float32(value) for name, value in INPUTS[case].items()}


def pair(case):
    x = arrays(case)
    return x["old"], x["roll"], x["mask"]


@functools.cache
def value_and_gradient(name):
    def scalar(logp, x):
        loss, denominator = SURROGATES[name](logp, x["old"], x["roll"], x["adv"], x["mask"])
        return REDUCERS.get(name, reduce.token_mean)(loss, denominator)

    return jax.jit(jax.value_and_grad(scalar))


@every_case
@pytest.mark.parametrize("name", SURROGATES)
def test_value_and_gradient(name, case):
    x = arrays(case)
    value, gradient = value_and_gradient(name)(x["cur"], x)
    wanted, slope = expected.value_and_gradient(name, INPUTS[case])
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


@every_case
def test_factor_of_the_effective_sample_size(case):
    factor = step_size.sqrt_ess(*pair(case), reference=expected.REFERENCE)
    np.testing.assert_allclose(factor, expected.sqrt_ess(INPUTS[case]), rtol=1e-5)


@every_case
def test_inference_gap(case):
    x = arrays(case)
    gap = step_size.inference_gap(x["old"], x["roll"], x["adv"], x["mask"])
    np.testing.assert_allclose(gap, expected.inference_gap(INPUTS[case]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("above", [True, False])
def test_an_update_is_accepted_down_to_the_tolerance(above):
    x = arrays("base")
    gap = expected.inference_gap(INPUTS["base"])
    tolerance = -gap + (1e-4 if above else -1e-4)
    kept = step_size.accept(x["old"], x["roll"], x["adv"], x["mask"], tolerance=tolerance)
    assert kept == above


@every_case
def test_factor_of_the_length(case):
    factor = step_size.length_decay(
        *pair(case), length=expected.LENGTH, power=expected.POWER, minimum=expected.MINIMUM
    )
    np.testing.assert_allclose(factor, expected.length_decay(INPUTS[case]), rtol=1e-6)


@pytest.mark.parametrize("tokens, factor", [(4, 1.0), (8, 1.0), (16, 0.5), (64, 0.25)])
def test_the_rate_falls_with_the_length_down_to_the_minimum(tokens, factor):
    mask = np.arange(64) < np.array([[tokens], [tokens], [0]])
    logp = np.zeros(mask.shape, np.float32)
    assert step_size.length_decay(logp, logp, mask, length=8, minimum=0.25) == factor


def test_without_a_gap_the_adaptive_clip_is_the_clipped_surrogate():
    x = arrays("matched")
    cur = x["old"] + np.float32(0.3)
    adaptive, _ = surrogates.adaptive_clip(cur, x["old"], x["roll"], x["adv"], x["mask"])
    np.testing.assert_array_equal(adaptive, policy.clipped(cur, x["old"], x["adv"], x["mask"]))


@pytest.mark.parametrize("alpha, end", [(0.0, "roll"), (1.0, "cur")])
def test_the_proximal_policy_lies_between_sampler_and_trainer(alpha, end):
    x = arrays("base")
    found = surrogates.log_linear_proximal(x["cur"], x["roll"], x["mask"], alpha=alpha)
    np.testing.assert_allclose(found, np.where(x["mask"] > 0, x[end], 0), atol=1e-6)


def test_tbpo_with_a_wide_band_is_gspo():
    x = arrays("base")
    losses = x["cur"], x["old"], x["adv"], x["mask"]
    np.testing.assert_array_equal(sequence.tbpo(*losses, dual_clip=1e3), sequence.gspo(*losses))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: surrogates.adaptive_clip(*x, high=0.5), "high must be at least 1"),
        (lambda x: sequence.tbpo(x[0], x[1], x[3], x[4], dual_clip=1.0), "dual_clip must be above"),
        (lambda x: step_size.sqrt_ess(x[1], x[2], x[4], reference=0.0), "reference must be in"),
        (lambda x: step_size.length_decay(x[1], x[2], x[4], length=0), "length must be above 0"),
    ],
)
def test_bounds_that_make_no_sense_are_named(call, message):
    x = arrays("base")
    with pytest.raises(ValueError, match=message):
        call((x["cur"], x["old"], x["roll"], x["adv"], x["mask"]))
