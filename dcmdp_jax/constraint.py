"""The discrepancy constraint: both ends of the multiplier.

    max E[reward]  s.t.  E[delta] <= c,  delta_t = |pi_train(o_t | s_t) - pi_infer(o_t | s_t)|

This module measures delta, applies the multiplier (`shape_advantage` and its variants, `penalty`),
updates it (the controllers) and calibrates c.

Notation: `old_logp` is the trainer's own log-prob at the weights that sampled, `rollout_logp` the
sampler's; both are float32 nats, `[N, T]`. `advantage` is `[N, T]` or `[N, 1]`, after group
normalisation. `mask` is 1 on response tokens that are trained. A token is *measured* if it is in
the mask and its `rollout_logp` is finite; other tokens have delta = 0 and are not counted.
`multiplier` is lambda, `tolerance` is c, `dual_lr` is eta.

Order of one step: shape with the current multiplier, then update it once, from sums over the mask
before any rejection.

Paper: Liu et al., "Reformulate LLM Reinforcement Learning for Efficient Training under Black-box
Discrepancy", arXiv 2606.08779. It leaves open the update order, the bounds of lambda, and whether
delta carries gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.losses import _arguments, _numerics
from dcmdp_jax.losses._separable import separable

Array = jax.Array
Number = jax.Array | float
Numbers = float | tuple[float, ...]  # a setting of one constraint, or of each of K


def _measured(old_logp: Array, rollout_logp: Array, mask: Array) -> Array:
    _arguments.tokens(old_logp=old_logp, rollout_logp=rollout_logp)
    return _numerics.measured(rollout_logp, _arguments.mask(mask, rollout_logp))


_gap = jax.custom_jvp(_numerics.probability_gap)


@_gap.defjvp
def _gap_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    a, b, valid = primals
    # cheaper than through the product form
    slope_a, slope_b = (jnp.exp(jnp.where(valid, x, -jnp.inf)) for x in (a, b))
    return _gap(a, b, valid), slope_a * tangents[0] - slope_b * tangents[1]


def delta(old_logp: Array, rollout_logp: Array, mask: Array) -> Array:
    """Probability gap of each sampled token, `[N, T]`, in [0, 1].

    Formula: |e^a - e^b| = e^max(a,b) * -expm1(-|a - b|), a = old_logp, b = rollout_logp; 0 where
        not measured
    Needs: old_logp, rollout_logp, mask
    Paper: DCMDP, arXiv 2606.08779

    The product form neither cancels nor overflows. Its derivative in a is e^a where a >= b, else
    -e^a; every shaping detaches it.
    """
    gap = signed_delta(old_logp, rollout_logp, mask)
    return jnp.where(old_logp < rollout_logp, -gap, gap)


def signed_delta(old_logp: Array, rollout_logp: Array, mask: Array) -> Array:
    """Signed probability gap of each sampled token, `[N, T]`, in [-1, 1].

    Formula: e^a - e^b, a = old_logp, b = rollout_logp; 0 where not measured
    Needs: old_logp, rollout_logp, mask
    Paper: a variant; arXiv 2606.08779 uses the absolute gap
    """
    return _gap(old_logp, rollout_logp, _measured(old_logp, rollout_logp, mask))


def measure(old_logp: Array, rollout_logp: Array, mask: Array) -> tuple[Array, Array]:
    """Returns what a controller's `update` takes, `(delta_sum, mask_count)`; both add over devices.

    Formula: (sum delta, number of measured tokens)
    Needs: old_logp, rollout_logp, mask (before any rejection: rejecting would hide the violation)
    Paper: DCMDP, arXiv 2606.08779
    """
    count = jnp.sum(_measured(old_logp, rollout_logp, mask), dtype=jnp.float32)
    return jnp.sum(delta(old_logp, rollout_logp, mask)), count


def _shaped(advantage: Array, cost: Array, multiplier: Number, mask: Array) -> Array:
    """Returns A - multiplier * cost on the mask, 0 elsewhere, without gradient."""
    advantage = _arguments.advantage(advantage, cost)
    return jax.lax.stop_gradient(
        _numerics.select(_arguments.mask(mask, cost), advantage - multiplier * cost)
    )


@separable
def shape_advantage(
    advantage: Array,
    old_logp: Array,
    rollout_logp: Array,
    multiplier: Number,
    tolerance: Number,
    mask: Array,
) -> Array:
    """The paper's shaped advantage, `[N, T]`, detached; 0 outside the mask.

    Formula: A - lambda * delta
    Needs: advantage, old_logp, rollout_logp, multiplier, mask
    Paper: DCMDP, arXiv 2606.08779

    All shapings have this signature; only `shape_hinge` reads `tolerance`. `diagnostics.sign_flip`
    measures the effect.
    """
    return _shaped(advantage, delta(old_logp, rollout_logp, mask), multiplier, mask)


@separable
def shape_signed(
    advantage: Array,
    old_logp: Array,
    rollout_logp: Array,
    multiplier: Number,
    tolerance: Number,
    mask: Array,
) -> Array:
    """Variant: charges tokens that the trainer gives a higher probability than the sampler, and
    credits the others.

    Formula: A - lambda * (e^old_logp - e^rollout_logp)
    Needs: advantage, old_logp, rollout_logp, multiplier, mask
    Paper: a variant, not in arXiv 2606.08779
    """
    return _shaped(advantage, signed_delta(old_logp, rollout_logp, mask), multiplier, mask)


@separable
def shape_credit(
    advantage: Array,
    old_logp: Array,
    rollout_logp: Array,
    multiplier: Number,
    tolerance: Number,
    mask: Array,
) -> Array:
    """Variant: credits tokens that the sampler gives a higher probability than the trainer, and
    charges none.

    Formula: A + lambda * max(e^rollout_logp - e^old_logp, 0)
    Needs: advantage, old_logp, rollout_logp, multiplier, mask
    Paper: a variant, not in arXiv 2606.08779, whose charge lowers these tokens further
    """
    overrated = jnp.minimum(signed_delta(old_logp, rollout_logp, mask), 0.0)
    return _shaped(advantage, overrated, multiplier, mask)


def shape_centred(
    advantage: Array,
    old_logp: Array,
    rollout_logp: Array,
    multiplier: Number,
    tolerance: Number,
    mask: Array,
) -> Array:
    """Variant: subtracts the mean of delta, a baseline that removes the constant shift of -lambda *
    mean delta.

    Formula: A - lambda * (delta - mean delta), mean over the measured tokens of the batch
    Needs: advantage, old_logp, rollout_logp, multiplier, mask
    Paper: a variant, not in arXiv 2606.08779
    """
    total, count = measure(old_logp, rollout_logp, mask)
    gap = delta(old_logp, rollout_logp, mask)
    centred = _numerics.select(
        _measured(old_logp, rollout_logp, mask), gap - total / jnp.maximum(count, 1.0)
    )
    return _shaped(advantage, centred, multiplier, mask)


@separable
def shape_hinge(
    advantage: Array,
    old_logp: Array,
    rollout_logp: Array,
    multiplier: Number,
    tolerance: Number,
    mask: Array,
) -> Array:
    """Variant: only the part of delta above the tolerance is charged; tokens inside it are
    untouched.

    Formula: A - lambda * max(delta - c, 0)
    Needs: advantage, old_logp, rollout_logp, multiplier, tolerance, mask
    Paper: a variant, not in arXiv 2606.08779
    """
    return _shaped(
        advantage,
        jnp.maximum(delta(old_logp, rollout_logp, mask) - tolerance, 0.0),
        multiplier,
        mask,
    )


@separable
def shape_cost_to_go(
    advantage: Array,
    old_logp: Array,
    rollout_logp: Array,
    multiplier: Number,
    tolerance: Number,
    mask: Array,
) -> Array:
    """Variant: charges a token for the gaps of all tokens from it on, the undiscounted return of
    the cost.

    Formula: A_t - lambda * sum_{u >= t} delta_u
    Needs: advantage, old_logp, rollout_logp, multiplier, mask
    Paper: a variant; the cost-to-go of a constrained MDP, where arXiv 2606.08779 charges the
        immediate cost alone

    The sum grows with the response: a multiplier that suits `shape_advantage` is too large here.
    """
    gap = jnp.flip(delta(old_logp, rollout_logp, mask), axis=-1)
    return _shaped(advantage, jnp.flip(jnp.cumsum(gap, axis=-1), axis=-1), multiplier, mask)


@separable
def shape_normalised(
    advantage: Array,
    old_logp: Array,
    rollout_logp: Array,
    multiplier: Number,
    tolerance: Number,
    mask: Array,
) -> Array:
    """Variant: the paper's shaping divided by 1 + lambda, which bounds the step as lambda grows.

    Formula: (A - lambda * delta) / (1 + lambda)
    Needs: advantage, old_logp, rollout_logp, multiplier, mask
    Paper: Stooke et al. 2020, arXiv 2007.03964 (PID Lagrangian)
    """
    return shape_advantage(advantage, old_logp, rollout_logp, multiplier, tolerance, mask) / (
        1.0 + multiplier
    )


@separable
def penalty(logp: Array, rollout_logp: Array, mask: Array, multiplier: Number) -> Array:
    """Variant: delta as a differentiable loss term, `[N, T]`, added to the policy loss (as
    `ConstraintConfig.penalty`).

    Formula: lambda * |e^logp - sg(e^rollout_logp)|
    Needs: logp (differentiated), rollout_logp, mask, multiplier
    Paper: a variant; arXiv 2606.08779 detaches delta. Meaningful only when the sampler is stale or
        frozen

    Where there is no gap the slope is lambda e^logp, as from above (see `delta`): under an exact
    sampler it lowers every token.
    """
    _arguments.tokens(logp=logp, rollout_logp=rollout_logp)
    return multiplier * delta(logp, jax.lax.stop_gradient(rollout_logp), mask)


class DualState(NamedTuple):
    """State of a controller; every field has the shape of `multiplier`, a scalar or `[K]` for K
    constraints.
    """

    multiplier: Array  # float32, lambda, the one to apply next
    integral: Array  # float32, integral part of pi and pid
    smoothed: Array  # float32, moving average of the violation (pi, pid)
    filtered: Array  # float32, moving average of the measurement (with_ema)
    updates: Array  # int32, updates that had something to measure
    # int32, latest updates in a row that ended at multiplier_max and still over the tolerance
    saturated: Array


class Controller(NamedTuple):
    """Pure functions: `init() -> DualState`, `update(state, delta_sum, mask_count, tolerance) ->
    DualState`.

    `delta_sum` and `mask_count` are global sums. A count of 0 or a non-finite sum leaves the state
    unchanged.
    """

    init: Callable[[], DualState]
    update: Callable[..., DualState]


def _mean(delta_sum: Number, mask_count: Number) -> tuple[Array, Array]:
    """Returns the mean of delta, and True if it exists."""
    delta_sum = jnp.asarray(delta_sum, jnp.float32)
    mask_count = jnp.asarray(mask_count, jnp.float32)
    usable = (mask_count > 0) & jnp.isfinite(delta_sum)
    return jnp.where(usable, delta_sum, 0.0) / jnp.where(usable, mask_count, 1.0), usable


def _controller(
    advance: Callable[[DualState, Array, Array], DualState],
    dual_lr: Numbers,
    multiplier_init: Numbers,
    multiplier_min: Numbers,
    multiplier_max: Numbers,
) -> Controller:
    """Returns a controller that moves the multiplier by `advance(state, mean, tolerance)`.

    It adds what all controllers share: the bounds, the guard against empty or non-finite
    measurements, and the counts. Raises ValueError for settings that make no sense.
    """
    low, start, high = (
        np.asarray(value, np.float32) for value in (multiplier_min, multiplier_init, multiplier_max)
    )
    if not np.all(np.isfinite(dual_lr) & (np.asarray(dual_lr) >= 0)):
        raise ValueError(f"dual_lr must be finite and >= 0, got {dual_lr}")
    if not (np.all(low >= 0) and np.all(low <= start) and np.all(start <= high)):
        given = f"{multiplier_min}, {multiplier_init}, {multiplier_max}"
        raise ValueError(
            f"need 0 <= multiplier_min <= multiplier_init <= multiplier_max, got {given}"
        )
    size = np.broadcast_shapes(np.shape(dual_lr), low.shape, start.shape, high.shape)

    def init() -> DualState:
        multiplier = jnp.broadcast_to(jnp.asarray(start), size)
        zero = jnp.zeros(size, jnp.float32)
        none = jnp.zeros(size, jnp.int32)
        return DualState(multiplier, multiplier, zero, zero, none, none)

    def update(
        state: DualState, delta_sum: Number, mask_count: Number, tolerance: Number
    ) -> DualState:
        mean, usable = _mean(delta_sum, mask_count)
        tolerance = jnp.asarray(tolerance, jnp.float32)
        new = advance(state, mean, tolerance)
        usable &= ~jnp.isnan(new.multiplier)  # 0 / 0: a relative controller given tolerance 0
        multiplier = jnp.clip(new.multiplier, low, high)
        saturated = jnp.where((multiplier >= high) & (mean > tolerance), state.saturated + 1, 0)
        new = new._replace(multiplier=multiplier, updates=state.updates + 1, saturated=saturated)
        return jax.tree.map(lambda after, before: jnp.where(usable, after, before), new, state)

    return Controller(init, update)


def projected_ascent(
    dual_lr: Numbers = 1.0,
    *,
    multiplier_init: Numbers = 0.1,
    multiplier_min: Numbers = 0.0,
    multiplier_max: Numbers = 1.0,
) -> Controller:
    """The paper's dual update: with dual_lr 1, a violation of 1e-3 moves lambda by 1e-3.

    Formula: lambda <- clip(lambda + eta * (mean delta - c), lambda_min, lambda_max)
    Needs: delta_sum, mask_count, tolerance
    Default: dual_lr 1.0, multiplier_init 0.1 (8B; 0.05 for 30B-A3B), bounds [0, 1]
    Paper: DCMDP, arXiv 2606.08779
    """

    def advance(state: DualState, mean: Array, tolerance: Array) -> DualState:
        return state._replace(
            multiplier=state.multiplier + np.asarray(dual_lr, np.float32) * (mean - tolerance)
        )

    return _controller(advance, dual_lr, multiplier_init, multiplier_min, multiplier_max)


def relative_ascent(
    dual_lr: Numbers = 0.0037,
    *,
    multiplier_init: Numbers = 0.1,
    multiplier_min: Numbers = 0.0,
    multiplier_max: Numbers = 1.0,
) -> Controller:
    """Ascent on the violation relative to the tolerance: dual_lr does not depend on the unit of the
    cost.

    Formula: lambda <- clip(lambda + eta * (mean delta / c - 1), lambda_min, lambda_max)
    Needs: delta_sum, mask_count, tolerance > 0
    Default: dual_lr 0.0037 (at c = 0.0037 the same as projected_ascent with 1.0), multiplier_init
        0.1, bounds [0, 1]
    Paper: a variant; equal to arXiv 2606.08779 up to the scale of eta
    """

    def advance(state: DualState, mean: Array, tolerance: Array) -> DualState:
        return state._replace(
            multiplier=state.multiplier + np.asarray(dual_lr, np.float32) * (mean / tolerance - 1.0)
        )

    return _controller(advance, dual_lr, multiplier_init, multiplier_min, multiplier_max)


def log_space_ascent(
    dual_lr: Numbers = 0.5,
    *,
    multiplier_init: Numbers = 0.1,
    multiplier_min: Numbers = 1e-6,
    multiplier_max: Numbers = 1.0,
) -> Controller:
    """Multiplicative ascent: scale-free, quick to engage again, and never zero.

    Formula: log lambda <- clip(log lambda + eta * (mean delta / c - 1), log lambda_min, log
        lambda_max)
    Needs: delta_sum, mask_count, tolerance > 0
    Default: dual_lr 0.5, multiplier_init 0.1, bounds [1e-6, 1]
    Paper: a variant; exponentiated-gradient form of the dual update

    Raises ValueError when multiplier_min is 0.
    """
    if np.any(np.asarray(multiplier_min) <= 0):
        raise ValueError(
            f"log_space_ascent needs multiplier_min > 0, got {multiplier_min}: a zero cannot grow"
        )

    def advance(state: DualState, mean: Array, tolerance: Array) -> DualState:
        # 80 < log(float32 max): the product stays finite and is clipped right after.
        factor = jnp.exp(
            jnp.minimum(np.asarray(dual_lr, np.float32) * (mean / tolerance - 1.0), 80.0)
        )
        return state._replace(multiplier=state.multiplier * factor)

    return _controller(advance, dual_lr, multiplier_init, multiplier_min, multiplier_max)


def pid(
    dual_lr: Numbers = 1.0,
    *,
    multiplier_init: Numbers = 0.1,
    multiplier_min: Numbers = 0.0,
    multiplier_max: Numbers = 1.0,
    proportional: float = 1.0,
    derivative: float = 1.0,
    decay: float = 0.9,
) -> Controller:
    """PID control of the multiplier; the derivative acts on rising cost alone.

    Formula: v = mean delta - c; I <- clip(I + eta v, min, max); s <- decay s + (1 - decay) v;
        lambda = clip(I + Kp s + Kd max(s - s_prev, 0), min, max)
    Needs: delta_sum, mask_count, tolerance
    Default: dual_lr (Ki) 1.0, proportional (Kp) 1.0, derivative (Kd) 1.0, decay 0.9,
        multiplier_init 0.1, bounds [0, 1]
    Paper: Stooke et al. 2020, arXiv 2007.03964, with a lag of one update in the derivative

    I is kept within the bounds (anti-windup). s starts at 0; the first update has no derivative.
    """
    if not (0.0 <= decay < 1.0):
        raise ValueError(f"decay must be in [0, 1), got {decay}")

    def advance(state: DualState, mean: Array, tolerance: Array) -> DualState:
        violation = mean - tolerance
        integral = state.integral + np.asarray(dual_lr, np.float32) * violation
        integral = jnp.clip(
            integral, np.asarray(multiplier_min, np.float32), np.asarray(multiplier_max, np.float32)
        )
        smoothed = decay * state.smoothed + (1.0 - decay) * violation
        rise = jnp.where(state.updates > 0, jnp.maximum(smoothed - state.smoothed, 0.0), 0.0)
        multiplier = integral + proportional * smoothed + derivative * rise
        return state._replace(multiplier=multiplier, integral=integral, smoothed=smoothed)

    return _controller(advance, dual_lr, multiplier_init, multiplier_min, multiplier_max)


def pi(
    dual_lr: Numbers = 1.0,
    *,
    multiplier_init: Numbers = 0.1,
    multiplier_min: Numbers = 0.0,
    multiplier_max: Numbers = 1.0,
    proportional: float = 1.0,
    decay: float = 0.9,
) -> Controller:
    """PI control of the multiplier: the proportional part damps the oscillation of pure
    integration.

    Formula: lambda = clip(I + Kp s, min, max), I and s as in pid
    Needs: delta_sum, mask_count, tolerance
    Default: dual_lr (Ki) 1.0, proportional (Kp) 1.0, decay 0.9, multiplier_init 0.1, bounds [0, 1]
    Paper: Stooke et al. 2020, arXiv 2007.03964
    """
    return pid(
        dual_lr,
        multiplier_init=multiplier_init,
        multiplier_min=multiplier_min,
        multiplier_max=multiplier_max,
        proportional=proportional,
        derivative=0.0,
        decay=decay,
    )


def with_ema(controller: Controller, decay: float = 0.9) -> Controller:
    """The same controller, fed a bias-corrected moving average of the measurement: for small, noisy
    batches.

    Formula: f <- decay f + (1 - decay) mean delta; the controller sees f / (1 - decay^k) at its
        k-th update
    Needs: controller
    Default: decay 0.9
    Paper: the bias correction of Adam, arXiv 1412.6980
    """
    if not (0.0 <= decay < 1.0):
        raise ValueError(f"decay must be in [0, 1), got {decay}")

    def update(
        state: DualState, delta_sum: Number, mask_count: Number, tolerance: Number
    ) -> DualState:
        mean, usable = _mean(delta_sum, mask_count)
        filtered = decay * state.filtered + (1.0 - decay) * mean
        seen = filtered / (1.0 - decay ** (state.updates + 1).astype(jnp.float32))
        new = controller.update(state, seen, usable, tolerance)
        return new._replace(filtered=jnp.where(usable, filtered, state.filtered))

    return Controller(controller.init, update)


def with_deadband(controller: Controller, fraction: float = 0.05) -> Controller:
    """The same controller, for which a measurement within a fraction of the tolerance equals it.

    Formula: the controller sees c where |mean delta - c| <= fraction * c, else mean delta
    Needs: controller
    Default: fraction 0.05
    Paper: the deadband of process control
    """
    if not fraction >= 0:
        raise ValueError(f"fraction must be >= 0, got {fraction}")

    def update(
        state: DualState, delta_sum: Number, mask_count: Number, tolerance: Number
    ) -> DualState:
        mean, usable = _mean(delta_sum, mask_count)
        tolerance = jnp.asarray(tolerance, jnp.float32)
        seen = jnp.where(jnp.abs(mean - tolerance) <= fraction * tolerance, tolerance, mean)
        return controller.update(state, seen, usable, tolerance)

    return Controller(controller.init, update)


class Calibration(NamedTuple):
    """Noise floor of a run whose weights do not change; float32 scalars in the unit of delta."""

    floor: Array  # mean delta over all tokens of all batches
    std_error: Array  # of the floor
    tolerance: Array  # the c to use
    batches: Array  # batches that had tokens


def calibrate_tolerance(delta_sums: Array, counts: Array, *, slack: float = 0.2) -> Calibration:
    """A tolerance from rollout batches taken with learning rate 0.

    Formula: floor = sum delta_sums / sum counts; c = max(floor (1 + slack), floor + 3 std_error);
        std_error^2 = K/(K-1) sum_k (n_k / n)^2 (mean_k - floor)^2
    Needs: delta_sums [K], counts [K]: `measure` of K >= 2 batches (4 or more advised)
    Default: slack 0.2
    Paper: arXiv 2606.08779 gives c = 0.0037 and 0.0050 for its own hardware and models

    Empty and non-finite batches are left out; std_error is 0 where one remains. Raises ValueError
    for other shapes.
    """
    delta_sums = jnp.asarray(delta_sums, jnp.float32)
    counts = jnp.asarray(counts, jnp.float32)
    if delta_sums.shape != counts.shape or delta_sums.ndim != 1 or delta_sums.size < 2:
        shapes = f"{delta_sums.shape} and {counts.shape}"
        raise ValueError(
            f"delta_sums and counts must both be [K] with K >= 2 batches, got {shapes}"
        )
    means, used = _mean(delta_sums, counts)
    weights = jnp.where(used, counts, 0.0) / jnp.maximum(jnp.sum(jnp.where(used, counts, 0.0)), 1.0)
    floor = jnp.sum(weights * means)
    batches = jnp.sum(used, dtype=jnp.float32)
    variance = batches / jnp.maximum(batches - 1.0, 1.0) * jnp.sum((weights * (means - floor)) ** 2)
    std_error = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return Calibration(
        floor, std_error, jnp.maximum(floor * (1.0 + slack), floor + 3.0 * std_error), batches
    )
