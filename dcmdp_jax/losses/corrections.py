"""Corrections for the gap between the program that trains and the engine that samples.

D_t = old_logp_t - rollout_logp_t and rho_t = exp(D_t) = pi_train / pi_rollout: all bounds are in
this ratio. Where the sampler's log-probability is not finite, D_t = 0: the token counts as without
gap. Weights and keep masks carry no gradient. A `Correction` names a level (which ratio), an
operator (what is done with it), bounds, and the denominator; it prints its own formula.

A surrogate joins a policy loss with a correction: `surrogate(logp, old_logp, rollout_logp,
advantage, mask)` returns `(loss [..., T], denominator mask [..., T])` for `reduce`. There are two
kinds, and each applies the factor pi_train / pi_rollout once: `decoupled` takes the policy ratio
against the trainer's recomputation and weights the loss by the correction; `bypass` takes the ratio
against the sampler, which contains the factor, and takes no weight.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics, reduce
from dcmdp_jax.losses._separable import is_separable, separable
from dcmdp_jax.losses.operators import (
    clip,
    geometric,
    keep_inside,
    original,
    reject,
    sequence,
    surviving,
    token,
    truncate,
    zero_outside,
)

Array = jax.Array
stop = jax.lax.stop_gradient
Loss = Callable[[Array, Array, Array, Array], Array]
Rejection = Callable[[Array, Array, Array], Array]
Denominator = Callable[[Array, Array], Array]
Reweight = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Correction:
    """One correction by the train/rollout ratio; `str` of it is its formula.

    level: `token`, `sequence` (product) or `geometric`.
    operator: `truncate`, `clip`, `keep_inside`, `zero_outside` or `reject`.
    low, high: bounds on R, train over rollout; None is no bound.
    denominator: `original` or `surviving`.
    """

    level: Callable[[Array, Array], Array] = token
    operator: Callable[[Array, float | None, float | None], tuple[Array, Array]] = truncate
    low: float | None = None
    high: float | None = None
    denominator: Denominator = original

    def __post_init__(self) -> None:
        for name in ("level", "operator", "denominator"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{name} must be a function such as corrections.{_EXAMPLE[name]}, not its name"
                )
        if self.operator is truncate and self.low is not None:
            raise ValueError("truncate reads no lower bound; leave low None or take clip")
        if self.operator is truncate and self.high is None:
            raise ValueError("truncate needs high, the greatest weight")
        if self.operator is clip and (self.low is None or self.high is None):
            raise ValueError("clip needs both low and high")
        if self.low is None and self.high is None:
            raise ValueError("a correction needs low, high or both")
        low = 0.0 if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if not 0 <= low <= high:
            raise ValueError(
                f"bounds must satisfy 0 <= low <= high, not low = {self.low}, high = {self.high}"
            )
        if self.denominator is surviving and self.operator in (truncate, clip, zero_outside):
            raise ValueError(
                f"{self.operator.__name__} rejects no token; the denominator must be original"
            )

    def weights(self, old_logp: Array, rollout_logp: Array, mask: Array) -> tuple[Array, Array]:
        """Returns the weight, float32 `[..., T]`, and True for tokens that are not dropped, bool
        `[..., T]`; 0 and False outside the mask.
        """
        old_logp, rollout_logp = _arguments.tokens(old_logp=old_logp, rollout_logp=rollout_logp)
        mask = _arguments.mask(mask, old_logp)
        measured = _numerics.measured(rollout_logp, mask)
        difference = _numerics.difference(old_logp, rollout_logp, measured)
        weight, keep = self.operator(jnp.exp(self.level(difference, measured)), self.low, self.high)
        keep = mask & keep
        return stop(_numerics.select(keep, weight)), keep

    @property
    def separable(self) -> bool:
        """True if level, operator and denominator are declared separable over microbatches."""
        return all(map(is_separable, (self.level, self.operator, self.denominator)))

    def __repr__(self) -> str:
        level = self.level.__name__
        operator = self.operator.__name__
        denominator = self.denominator.__name__
        return f"Correction({level}, {operator}, low={self.low}, high={self.high}, {denominator})"

    def __str__(self) -> str:
        low = 0.0 if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        bounds = {"low": f"{low:g}", "high": f"{high:g}"}
        operator = re.sub(r"\b(low|high)\b", lambda word: bounds[word[0]], _formula(self.operator))
        return "; ".join(
            (
                operator,
                _formula(self.level),
                "D_t = old_logp_t - rollout_logp_t, 0 where rollout_logp_t is not finite",
                _formula(self.denominator),
            )
        )


_EXAMPLE = {"level": "token", "operator": "truncate", "denominator": "original"}


def tis(high: float = 2.0) -> Correction:
    """Truncated importance sampling per token.

    Formula: w_t = min(rho_t, high)
    Needs: old_logp, rollout_logp, mask
    Default: high 2.0 (verl, slime, Tunix); TRL 3.0, ROLL 1.2
    Paper: Yao et al. 2025, fengyao.notion.site/off-policy-rl
    """
    return Correction(token, truncate, None, high)


def sequence_tis(high: float = 2.0) -> Correction:
    """Truncated importance sampling with the ratio of the whole completion.

    Formula: w_t = min(prod_s rho_s, high)
    Needs: old_logp, rollout_logp, mask
    Default: high 2.0
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse
    """
    return Correction(sequence, truncate, None, high)


def geometric_tis(high: float = 2.0) -> Correction:
    """Truncated importance sampling with the geometric mean of the completion's ratios.

    Formula: w_t = min((prod_s rho_s)^(1/|o|), high)
    Needs: old_logp, rollout_logp, mask
    Default: high 2.0
    Paper: ms-swift (sequence_truncate), AReaL
    """
    return Correction(geometric, truncate, None, high)


def mis(
    low: float | None = 0.5, high: float | None = 2.0, denominator: Denominator = original
) -> Correction:
    """Masked importance sampling per token: the ratio as weight, tokens outside the bounds dropped.

    Formula: w_t = rho_t 1[low <= rho_t <= high]
    Needs: old_logp, rollout_logp, mask
    Default: low 0.5, high 2.0 (slime); ms-swift has no lower bound; denominator original
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse
    """
    return Correction(token, keep_inside, low, high, denominator)


def sequence_mis(
    low: float | None = None, high: float | None = 3.0, denominator: Denominator = original
) -> Correction:
    """Masked importance sampling with the ratio of the whole completion.

    Formula: w_t = R 1[low <= R <= high], R = prod_s rho_s
    Needs: old_logp, rollout_logp, mask
    Default: low none, high 3.0 (TRL); denominator original
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse

    Long completions with a small drift per token leave the bounds all at once.
    """
    return Correction(sequence, keep_inside, low, high, denominator)


def icepop(low: float = 0.5, high: float = 5.0) -> Correction:
    """IcePop: the ratio as weight inside the bounds, weight 0 outside, every token counted.

    Formula: w_t = rho_t 1[low <= rho_t <= high]
    Needs: old_logp, rollout_logp, mask
    Default: low 0.5, high 5.0
    Paper: IcePop, arXiv 2510.18855
    """
    return Correction(token, zero_outside, low, high)


def geometric_mask(
    low: float = 0.99, high: float = 1.01, denominator: Denominator = original
) -> Correction:
    """Rejection of completions whose geometric mean ratio leaves the bounds; weight 1 for the
    others.

    Formula: w_t = 1, keep_t = low <= (prod_s rho_s)^(1/|o|) <= high
    Needs: old_logp, rollout_logp, mask
    Default: low 0.99, high 1.01 (SkyRL); verl 0.999 to 1.001; denominator original
    Paper: Liu et al. 2025, richardli.xyz/rl-collapse
    """
    return Correction(geometric, reject, low, high, denominator)


def batch_normalize(weights: Array, mask: Array, *, mean: Array | None = None) -> Array:
    """Weights over their mean, so that the correction does not change the size of the step.

    Formula: w_t / mean(w); unchanged where mean(w) <= 1e-8
    Needs: weights [..., T], mask
    Default: mean = token mean over the mask
    Paper: slime, verl (batch normalisation of importance weights)

    Take it after truncation. `mean` is the global one under data parallelism or accumulation; for
    weights of the whole completion verl takes `reduce.sequence_mean_token_mean(weights, mask)`.
    """
    (weights,) = _arguments.tokens(weights=weights)
    mask = _arguments.mask(mask, weights)
    mean = reduce.token_mean(weights, mask) if mean is None else mean
    return stop(_numerics.select(mask, weights / jnp.where(mean > 1e-8, mean, 1.0)))


@separable
def blend(weights: Array, mask: Array, *, alpha: Array | float) -> Array:
    """Weights between none and all of a correction.

    Formula: (1 - alpha) + alpha w_t
    Needs: weights [..., T], mask, alpha
    Default: alpha must be given; 0 is no correction, 1 all of it
    Paper: AIS, arXiv 2605.13907, names such a mixture; how it sets alpha is not known

    `alpha` may be a traced scalar, of the effective sample size for example.
    """
    (weights,) = _arguments.tokens(weights=weights)
    return stop(_numerics.select(_arguments.mask(mask, weights), (1 - alpha) + alpha * weights))


@dataclasses.dataclass(frozen=True)
class Decoupled:
    """What `decoupled` returns."""

    loss: Loss
    correction: Correction | None
    rejections: tuple[Rejection, ...]
    denominator: Denominator
    reweight: Reweight | None = None

    def __call__(
        self, logp: Array, old_logp: Array, rollout_logp: Array, advantage: Array, mask: Array
    ) -> tuple[Array, Array]:
        """Returns the loss and the mask to reduce it with, both `[..., T]`."""
        _arguments.tokens(logp=logp, old_logp=old_logp, rollout_logp=rollout_logp)
        loss = self.loss(logp, old_logp, advantage, mask)
        denominator = _arguments.mask(mask, loss)
        keep = denominator
        if self.correction is not None:
            weight, keep = self.correction.weights(old_logp, rollout_logp, mask)
            if self.reweight is not None:
                weight = self.reweight(weight, mask)
            loss = loss * weight
            denominator = self.correction.denominator(denominator, keep)
        rejected = _keep_all(self.rejections, old_logp, rollout_logp, mask, keep)
        return _numerics.select(rejected, loss), self.denominator(denominator, rejected)

    @property
    def separable(self) -> bool:
        """True if all parts are declared separable over microbatches."""
        parts: list[Any] = [self.loss, *self.rejections, self.denominator]
        parts += [part for part in (self.correction, self.reweight) if part is not None]
        return all(map(is_separable, parts))

    def __repr__(self) -> str:
        parts = _parts(self.loss, self.correction, self.rejections, self.denominator)
        reweight = "" if self.reweight is None else f", reweight={_name(self.reweight)}"
        return f"decoupled({parts}{reweight})"


@dataclasses.dataclass(frozen=True)
class Bypass:
    """What `bypass` returns."""

    loss: Loss
    rejections: tuple[Rejection, ...]
    denominator: Denominator

    def __call__(
        self, logp: Array, old_logp: Array, rollout_logp: Array, advantage: Array, mask: Array
    ) -> tuple[Array, Array]:
        """Returns the loss and the mask to reduce it with, both `[..., T]`."""
        logp, _, rollout_logp = _arguments.tokens(
            logp=logp, old_logp=old_logp, rollout_logp=rollout_logp
        )
        mask = _arguments.mask(mask, rollout_logp)
        measured = _numerics.measured(rollout_logp, mask)
        loss = self.loss(logp, rollout_logp, advantage, measured)
        keep = _keep_all(self.rejections, stop(logp), rollout_logp, mask, measured)
        return _numerics.select(keep, loss), self.denominator(mask, keep)

    @property
    def separable(self) -> bool:
        """True if all parts are declared separable over microbatches."""
        return all(map(is_separable, (self.loss, *self.rejections, self.denominator)))

    def __repr__(self) -> str:
        return f"bypass({_parts(self.loss, None, self.rejections, self.denominator)})"


def decoupled(
    loss: Loss,
    correction: Correction | None = None,
    *,
    rejections: tuple[Rejection, ...] = (),
    denominator: Denominator = original,
    reweight: Reweight | None = None,
) -> Decoupled:
    """A surrogate with the policy ratio against the trainer's recomputation and the gap in a
    weight.

    Formula: w_t(rho) L_t(logp, old_logp), on the tokens kept
    Needs: logp, old_logp, rollout_logp, advantage, mask
    Default: no correction, no rejection, denominator original
    Paper: Hilton et al. (decoupled PPO), arXiv 2110.00641

    Args:
        loss: a function of `(logp, old_logp, advantage, mask)`; options by `functools.partial`.
        correction: at most one, so that the factor pi_train / pi_rollout weighs once.
        rejections: functions of `(old_logp, rollout_logp, mask)` that return which tokens to keep;
            all must agree.
        denominator: `original`, or `surviving`, which leaves out of the mean what the correction or
            a rejection drops. The correction's own applies as well.
        reweight: a function of the correction's `(weights, mask)` that returns the weights to take,
            such as `batch_normalize` or `functools.partial(blend, alpha=0.5)`.

    Returns:
        A hashable function of `(logp, old_logp, rollout_logp, advantage, mask)` that returns the
        unreduced loss and the mask to reduce it with, both `[..., T]`.

    Raises:
        TypeError: `correction` is not a Correction or None, or a rejection is one.
        ValueError: `reweight` is given without a correction, whose weights it takes.
    """
    if not (correction is None or isinstance(correction, Correction)):
        raise TypeError(f"correction must be one Correction or None, not {correction!r}")
    if reweight is not None and correction is None:
        raise ValueError("reweight takes the weights of a correction; give decoupled one")
    return Decoupled(_loss(loss), correction, _rejections(rejections), denominator, reweight)


def bypass(
    loss: Loss,
    *,
    rejections: tuple[Rejection, ...] = (),
    denominator: Denominator = original,
) -> Bypass:
    """A surrogate with the policy ratio against the sampler; the gap is in the ratio, so there is
    no weight to add.

    Formula: L_t(logp, rollout_logp), on the tokens kept
    Needs: logp, rollout_logp, advantage, mask
    Default: no rejection, denominator original
    Paper: verl (bypass mode); prime-rl

    Args and result as in `decoupled`, without a correction. Rejections judge the current `logp`
    against the sampler. Tokens whose sampler log-probability is not finite have loss 0 and stay in
    the denominator.

    Raises:
        TypeError: a rejection is a Correction, whose weight would apply the factor a second time.
    """
    return Bypass(_loss(loss), _rejections(rejections), denominator)


def _loss(loss: Loss) -> Loss:
    if not callable(loss) or isinstance(loss, (Decoupled, Bypass)):
        raise TypeError(
            f"loss must be a function of (logp, old_logp, advantage, mask), not {loss!r}"
        )
    return loss


def _rejections(rejections: tuple[Rejection, ...]) -> tuple[Rejection, ...]:
    for rejection in rejections:
        if not callable(rejection):
            raise TypeError(
                f"a rejection must be a function of (old_logp, rollout_logp, mask), not "
                f"{rejection!r}; a correction carries a weight, which belongs to decoupled, once"
            )
    return tuple(rejections)


def _keep_all(
    rejections: tuple[Rejection, ...],
    old_logp: Array,
    rollout_logp: Array,
    mask: Array,
    keep: Array,
) -> Array:
    for rejection in rejections:
        keep = keep & rejection(old_logp, rollout_logp, mask)
    return keep


def _formula(function: Callable) -> str:
    """The line of the docstring that states the formula; the name where docstrings are stripped."""
    lines = (inspect.getdoc(function) or "").splitlines()
    stated = [line.removeprefix("Formula: ") for line in lines if line.startswith("Formula: ")]
    return stated[0] if stated else function.__name__


def _parts(
    loss: Loss,
    correction: Correction | None,
    rejections: tuple[Rejection, ...],
    denominator: Denominator,
) -> str:
    parts = [_name(loss)]
    if correction is not None:
        parts.append(str(correction))
    if rejections:
        parts.append(
            "rejections=(" + ", ".join(_name(rejection) for rejection in rejections) + ",)"
        )
    if denominator is not original:
        parts.append(f"denominator={denominator.__name__}")
    return ", ".join(parts)


def _name(function: Callable) -> str:
    """`clipped(clip_high=0.28)` for a partial, `clipped` for a function: no addresses, so that
    records compare.
    """
    if not isinstance(function, functools.partial):
        return getattr(function, "__name__", repr(function))
    options = [repr(value) for value in function.args] + [
        f"{k}={v!r}" for k, v in function.keywords.items()
    ]
    return f"{_name(function.func)}({', '.join(options)})"
