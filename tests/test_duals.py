"""Every dual controller as an experiment file names it, in the step: two updates by hand."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import constraint, step, train_state
from dcmdp_jax.records import Batch
from support.steps import make_config

C = 0.05  # the tolerance
GAPS = (0.09, 0.051)  # mean delta of the first and the second batch
START = 0.2


def with_average(dual_lr, multiplier_init, multiplier_max):
    bounds = {"multiplier_init": multiplier_init, "multiplier_max": multiplier_max}
    return constraint.with_ema(constraint.projected_ascent(dual_lr, **bounds), 0.5)


def with_band(dual_lr, multiplier_init, multiplier_max):
    bounds = {"multiplier_init": multiplier_init, "multiplier_max": multiplier_max}
    return constraint.with_deadband(constraint.projected_ascent(dual_lr, **bounds), 0.05)


def controlled(proportional, derivative):
    """PID with dual_lr 1 and decay 0.9, in float64."""
    integral = START
    smoothed = 0.0
    multipliers = []
    for number, gap in enumerate(GAPS):
        before = smoothed
        integral = min(max(integral + gap - C, 0), 1)
        smoothed = 0.9 * smoothed + 0.1 * (gap - C)
        rise = max(smoothed - before, 0) if number else 0
        multipliers.append(integral + proportional * smoothed + derivative * rise)
    return multipliers


ASCENT = np.cumsum([START, *(gap - C for gap in GAPS)])[1:]
RELATIVE = np.cumsum([gap / C - 1 for gap in GAPS])
AVERAGE = (0.25 * GAPS[0] + 0.5 * GAPS[1]) / 0.75  # bias-corrected, after both
DUALS = {
    "projected_ascent": (constraint.projected_ascent, ASCENT),
    "relative_ascent": (constraint.relative_ascent, START + RELATIVE),
    "log_space_ascent": (constraint.log_space_ascent, START * np.exp(RELATIVE)),
    "pi": (functools.partial(constraint.pi, proportional=2.0), controlled(2.0, 0.0)),
    "pid": (functools.partial(constraint.pid, derivative=3.0), controlled(1.0, 3.0)),
    "with_ema": (with_average, [ASCENT[0], ASCENT[0] + AVERAGE - C]),
    "with_deadband": (with_band, [ASCENT[0], ASCENT[0]]),
}


def batch_of(gap):
    """Old log-probs of one completion of two tokens, and a sampler's whose probabilities are lower
    by `gap`.
    """
    old_logp = np.log(np.full((1, 1, 1, 2), 0.5, np.float32))
    batch = Batch(**dict.fromkeys(Batch._fields))._replace(
        mask=np.ones(old_logp.shape, bool),
        rollout_logp=np.log(np.full(old_logp.shape, 0.5 - gap, np.float32)),
    )
    return jnp.asarray(old_logp), batch


@pytest.mark.parametrize("name", DUALS)
def test_its_multiplier_is_the_formula_s(name):
    dual, expected = DUALS[name]
    config = make_config()
    options = dataclasses.replace(
        config.constraint, dual=dual, tolerance=C, dual_lr=1.0, multiplier_init=START
    )
    config = dataclasses.replace(config, constraint=options)
    state = train_state.controller(config).init()
    multipliers = []
    for gap in GAPS:
        state, metrics = step.update_dual(state, *batch_of(gap), config)
        multipliers.append(float(metrics["multiplier_next"]))
    np.testing.assert_allclose(multipliers, np.minimum(expected, 1.0), rtol=1e-5)


def test_a_multiplier_at_its_bound_over_the_tolerance_is_counted():
    config = make_config()
    options = dataclasses.replace(config.constraint, dual=with_average, multiplier_max=0.1)
    config = dataclasses.replace(config, constraint=options)
    state = train_state.controller(config).init()
    for _ in range(2):
        state, metrics = step.update_dual(state, *batch_of(0.3), config)
    assert metrics["saturated"] == 2
