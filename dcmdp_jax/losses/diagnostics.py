"""What the gap between trainer and sampler looks like.

Pure functions of `[N, T]` log-probs in float32 nats and a mask; no gradient passes through them. D
= old_logp - rollout_logp, rho = e^D = train / rollout, delta = |e^old_logp - e^rollout_logp|. Every
figure is over the *measured* tokens: in the mask, with a finite `rollout_logp`; what is left out is
counted by `dropped`. Sequence figures are over rows with a measured token. D is clipped to +-20
wherever it is squared or exponentiated; its sum over a completion is clipped once, after it is
taken. With nothing to measure every figure is 0. Results are float32 scalars, or dicts of them that
merge into one flat dict of metrics.

Sums run over the arrays given, so under `jit` with sharded inputs they are global.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics, reduce

Array = jax.Array
Metrics = dict[str, Array]


def summary(
    old_logp: Array,
    rollout_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    logp: Array | None = None,
) -> Metrics:
    """The metrics that a training step logs, in one flat dict; none of them sorts the batch.

    Formula: the union of dropped, prob_diff, log_ratio, perplexity, chi2, effective_sample_size,
        advantage_skew and, with logp, staleness
    Needs: old_logp, rollout_logp, advantage, mask
    Default: logp none
    Paper: see the members
    """
    pair = (old_logp, rollout_logp, mask)
    metrics = (
        dropped(rollout_logp, mask)
        | prob_diff(*pair)
        | log_ratio(*pair)
        | perplexity(*pair)
        | chi2(*pair)
    )
    metrics |= effective_sample_size(*pair)
    metrics["advantage_skew"] = advantage_skew(old_logp, rollout_logp, advantage, mask)
    return metrics if logp is None else metrics | staleness(logp, old_logp, rollout_logp, mask)


def dropped(rollout_logp: Array, mask: Array) -> Metrics:
    """Tokens of the mask that the sampler gave no finite log-prob for.

    Formula: #{m, rollout_logp not finite}, and its share of #{m}
    Needs: rollout_logp, mask

    vLLM reports NaN for tokens of probability one.
    """
    (rollout_logp,) = _arguments.tokens(rollout_logp=rollout_logp)
    mask = _arguments.mask(mask, rollout_logp)
    count = jnp.sum(mask & ~jnp.isfinite(rollout_logp), dtype=jnp.float32)
    return {"dropped_tokens": count, "dropped_share": count / jnp.maximum(jnp.sum(mask), 1)}


def prob_diff(old_logp: Array, rollout_logp: Array, mask: Array) -> Metrics:
    """Gap in probability: mean (the constrained quantity), largest, standard deviation, the
    sampler's share, correlation.

    Formula: mean, max, std (ddof 1) of delta; sum of delta where old_logp < rollout_logp, over the
        sum of all; Pearson correlation of e^old_logp and e^rollout_logp
    Needs: old_logp, rollout_logp, mask
    Paper: verl rollout_probs_diff_*, Tunix prob_diff_*; DCMDP, arXiv 2606.08779, for the mean
    """
    old, rollout, valid = _measured(old_logp, rollout_logp, mask)
    gap = _gap(old, rollout, valid)
    mean = reduce.token_mean(gap, valid)
    squares = jnp.sum(_numerics.select(valid, jnp.square(gap - mean)))
    total = jnp.sum(gap)
    of_sampler = jnp.sum(_numerics.select(old < rollout, gap))
    return {
        "prob_diff_mean": mean,
        "prob_diff_max": jnp.max(gap, initial=0.0),
        "prob_diff_std": jnp.sqrt(squares / jnp.maximum(jnp.sum(valid) - 1, 1)),
        "prob_diff_rollout_share": of_sampler / jnp.where(total > 0, total, 1.0),
        "pearson": _correlation(jnp.exp(old), jnp.exp(rollout), valid),
    }


def log_ratio(
    old_logp: Array, rollout_logp: Array, mask: Array, *, low: float = 0.5, high: float = 2.0
) -> Metrics:
    """Gap in log-prob: absolute, the three KL estimates, second moment, Jensen-Shannon,
    multiplicative error.

    Formula: mean and max |D|; k1 = mean(-D); k2 = mean(D^2)/2; k3 = mean(e^D - 1 - D); m2 =
        mean(D^2);
        js = mean(k3(old - mix) + k3(rollout - mix))/2, mix = log((e^old + e^rollout)/2);
        mult_prob_error = mean(e^|D|); ratio_out = share of tokens with rho outside [low, high]
    Needs: old_logp, rollout_logp, mask
    Default: low 0.5, high 2.0
    Paper: Schulman 2020, joschu.net/blog/kl-approx.html; M2PO, arXiv 2510.01161; NeMo-RL for js and
        mult_prob_error

    k1 and |D| are not clipped. NeMo-RL takes mult_prob_error under 1.05 for healthy.
    """
    old, rollout, valid = _measured(old_logp, rollout_logp, mask)
    raw = old - rollout
    diff = jnp.clip(raw, -20.0, 20.0)
    mix = jnp.logaddexp(old, rollout) - math.log(2.0)
    js = 0.5 * (_numerics.exp_excess(old - mix) + _numerics.exp_excess(rollout - mix))
    m2 = reduce.token_mean(jnp.square(diff), valid)
    outside = (diff < math.log(low)) | (diff > math.log(high))
    return {
        "logp_diff_mean": reduce.token_mean(jnp.abs(raw), valid),
        "logp_diff_max": jnp.max(jnp.abs(raw), initial=0.0),
        "k1": reduce.token_mean(-raw, valid),
        "k2": 0.5 * m2,
        "k3": reduce.token_mean(_numerics.exp_excess(diff), valid),
        "m2": m2,
        "js": reduce.token_mean(js, valid),
        "mult_prob_error": reduce.token_mean(jnp.exp(jnp.abs(diff)), valid),
        "ratio_out": reduce.token_mean(outside.astype(jnp.float32), valid),
    }


def perplexity(old_logp: Array, rollout_logp: Array, mask: Array) -> Metrics:
    """Perplexity of the completions under both programs.

    Formula: ppl = mean_n exp(-mean_t logp); log_ppl_diff = mean_n d_n, d_n = mean_t rollout_logp -
        mean_t old_logp;
        log_ppl_diff_abs, _max, _min of d_n; ppl_ratio = mean_n exp(d_n)
    Needs: old_logp, rollout_logp, mask
    Paper: verl, slime, ms-swift

    Empty completions are left out of every mean; verl counts them with perplexity 1.
    """
    old, rollout, valid = _measured(old_logp, rollout_logp, mask)
    train = _numerics.row_mean(old, valid)
    sampler = _numerics.row_mean(rollout, valid)
    rows = jnp.any(valid, axis=-1, keepdims=True)
    diff = sampler - train
    return {
        "train_ppl": reduce.token_mean(jnp.exp(-train), rows),
        "rollout_ppl": reduce.token_mean(jnp.exp(-sampler), rows),
        "ppl_ratio": reduce.token_mean(jnp.exp(diff), rows),
        "log_ppl_diff": reduce.token_mean(diff, rows),
        "log_ppl_diff_abs": reduce.token_mean(jnp.abs(diff), rows),
        "log_ppl_diff_max": _extreme(jnp.max, diff, rows, -jnp.inf),
        "log_ppl_diff_min": _extreme(jnp.min, diff, rows, jnp.inf),
    }


def chi2(old_logp: Array, rollout_logp: Array, mask: Array) -> Metrics:
    """Chi-square divergence, which is the variance of the importance weights.

    Formula: chi2_token = mean(rho^2) - 1; chi2_sequence = mean_n exp(2 clip(sum_t D, -20, 20)) - 1
    Needs: old_logp, rollout_logp, mask
    Paper: verl, slime; ms-swift takes the geometric mean for the sequence

    The estimate of a sample may be negative.
    """
    diff, valid = _clipped(old_logp, rollout_logp, mask)
    total, rows = _sequence(old_logp, rollout_logp, mask)
    return {
        "chi2_token": reduce.token_mean(jnp.expm1(2.0 * diff), valid),
        "chi2_sequence": reduce.token_mean(jnp.expm1(2.0 * total), rows),
    }


def effective_sample_size(
    old_logp: Array, rollout_logp: Array, mask: Array, *, high: float = 2.0
) -> Metrics:
    """Share of the sample that the importance weights leave effective, in (0, 1].

    Formula: (sum w)^2 / (n sum w^2); token: w = min(rho, high); sequence: w = exp(clip(sum_t D,
        -20, 20))
    Needs: old_logp, rollout_logp, mask
    Default: high 2.0
    Paper: Kong 1992; verl for the token form, VCPO, arXiv 2602.17616, for the sequence form
    """
    diff, valid = _clipped(old_logp, rollout_logp, mask)
    total, rows = _sequence(old_logp, rollout_logp, mask)
    return {
        "ess_token": _ess(jnp.minimum(jnp.exp(diff), high), valid),
        "ess_sequence": _ess(jnp.exp(total), rows),
    }


def weight(weight: Array, mask: Array, *, low: float = 0.5, high: float = 2.0) -> Metrics:
    """Importance weights as applied, or raw ratios; the mean is the factor of batch normalisation.

    Formula: mean, std (ddof 0), min, max of w; share of w < low and of w > high; (sum w)^2 / (n sum
        w^2)
    Needs: weight [N, T], mask
    Default: low 0.5, high 2.0
    Paper: verl rollout_is_*, slime mis_*
    """
    (weight,) = _arguments.tokens(weight=weight)
    mask = _arguments.mask(mask, weight)
    weight = _numerics.select(mask, jax.lax.stop_gradient(weight))
    mean = reduce.token_mean(weight, mask)
    return {
        "weight_mean": mean,
        "weight_std": jnp.sqrt(reduce.token_mean(jnp.square(weight - mean), mask)),
        "weight_min": _extreme(jnp.min, weight, mask, jnp.inf),
        "weight_max": _extreme(jnp.max, weight, mask, -jnp.inf),
        "weight_low": reduce.token_mean((weight < low).astype(jnp.float32), mask),
        "weight_high": reduce.token_mean((weight > high).astype(jnp.float32), mask),
        "weight_ess": _ess(weight, mask),
    }


def rejected(keep: Array, mask: Array) -> Metrics:
    """Share of tokens and of completions that a correction dropped.

    Formula: tokens: #{m and not keep} / #{m}; sequences: rows with no token kept, of rows with one
        in the mask
    Needs: keep [N, T], mask
    Paper: verl rollout_rs_*, prime-rl is_masked
    """
    mask = _arguments.mask(mask, mask)
    keep = _arguments.mask(keep, mask) & mask
    rows = jnp.any(mask, axis=-1)
    gone = jnp.any(mask, axis=-1) & ~jnp.any(keep, axis=-1)
    return {
        "rejected_tokens": reduce.token_mean((~keep).astype(jnp.float32), mask),
        "rejected_sequences": reduce.token_mean(gone.astype(jnp.float32), rows),
    }


def clip_fraction(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Metrics:
    """Share of tokens whose gradient the clipped surrogate stops, on either side.

    Formula: low: A < 0 and r < 1 - clip_low; high: A > 0 and r > 1 + clip_high; r = exp(logp -
        old_logp)
    Needs: logp, old_logp, advantage, mask
    Default: clip_low 0.2, clip_high 0.2
    Paper: PPO, arXiv 1707.06347
    """
    logp, old_logp = jax.lax.stop_gradient(_arguments.tokens(logp=logp, old_logp=old_logp))
    advantage = _arguments.advantage(advantage, logp)
    mask = _arguments.mask(mask, logp)
    ratio = jnp.exp(_numerics.log_ratio(logp, old_logp, mask))
    low = (advantage < 0) & (ratio < 1.0 - clip_low)
    high = (advantage > 0) & (ratio > 1.0 + clip_high)
    return {
        "clip_low": reduce.token_mean(low.astype(jnp.float32), mask),
        "clip_high": reduce.token_mean(high.astype(jnp.float32), mask),
    }


def advantage_skew(old_logp: Array, rollout_logp: Array, advantage: Array, mask: Array) -> Array:
    """Whether the gap leans with the advantage, which biases the gradient where a zero-mean gap
    would not.

    Formula: mean(sign(A) D)
    Needs: old_logp, rollout_logp, advantage, mask
    Paper: arXiv 2605.14220 describes the skew of C(r) = -(r - 1) A
    """
    diff, valid = _clipped(old_logp, rollout_logp, mask)
    advantage = jax.lax.stop_gradient(_arguments.advantage(advantage, diff))
    return reduce.token_mean(jnp.sign(advantage) * diff, valid)


def sign_flip(advantage: Array, shaped: Array, mask: Array) -> Metrics:
    """What shaping does to the direction of the update.

    Formula: sign_flip: share of tokens with A A' < 0; zero_moved: share with A = 0 and A' != 0
    Needs: advantage, shaped (as `constraint.shape_advantage` returns), mask

    Groups of equal rewards have A = 0 and are moved by -lambda delta alone.
    """
    (shaped,) = _arguments.tokens(shaped=shaped)
    advantage = _arguments.advantage(advantage, shaped)
    mask = _arguments.mask(mask, shaped)
    flipped = jnp.sign(advantage) * jnp.sign(shaped) < 0
    return {
        "sign_flip": reduce.token_mean(flipped.astype(jnp.float32), mask),
        "zero_moved": reduce.token_mean(
            ((advantage == 0) & (shaped != 0)).astype(jnp.float32), mask
        ),
    }


def staleness(logp: Array, old_logp: Array, rollout_logp: Array, mask: Array) -> Metrics:
    """Splits the gap into numerics (same weights, two programs) and staleness (same program, two
    weights).

    Formula: mean|old_logp - rollout_logp|, mean|logp - old_logp|, mean|logp - rollout_logp|
    Needs: logp, old_logp, rollout_logp, mask
    """
    logp, _ = _arguments.tokens(logp=logp, old_logp=old_logp)
    old, rollout, valid = _measured(old_logp, rollout_logp, mask)
    current = _numerics.select(valid, jax.lax.stop_gradient(logp))
    return {
        "gap_numerics": reduce.token_mean(jnp.abs(old - rollout), valid),
        "gap_staleness": reduce.token_mean(jnp.abs(current - old), valid),
        "gap_total": reduce.token_mean(jnp.abs(current - rollout), valid),
    }


def shift(old_logp: Array, rollout_logp: Array, mask: Array) -> Metrics:
    """Finds log-probs that are off by one token, the usual cause of a gap that no precision
    explains.

    Formula: Pearson correlation of old_logp[t + lag] and rollout_logp[t], lag -1, 0, 1; lag with
        the greatest
    Needs: old_logp, rollout_logp, mask

    A token without a measured neighbour at that lag is left out.
    """
    old, rollout, valid = _measured(old_logp, rollout_logp, mask)
    back = _correlation(old[..., :-1], rollout[..., 1:], valid[..., :-1] & valid[..., 1:])
    ahead = _correlation(old[..., 1:], rollout[..., :-1], valid[..., 1:] & valid[..., :-1])
    aligned = _correlation(old, rollout, valid)
    shifted = jnp.maximum(back, ahead) > aligned
    lag = jnp.where(shifted, jnp.where(ahead >= back, 1.0, -1.0), 0.0)
    return {
        "correlation_back": back,
        "correlation": aligned,
        "correlation_ahead": ahead,
        "lag": lag,
    }


def support_mass(logits: Array, mask: Array, *, top_k: int = 0, top_p: float = 1.0) -> Array:
    """Probability that top-k and top-p sampling leave, `[N, T]`; 1 outside the mask. Sorts the
    vocabulary.

    Formula: S = sum of p over the top_k likeliest, then over the fewest of these that hold top_p of
        their mass
    Needs: logits [N, T, V] after the temperature, mask
    Default: top_k 0 and top_p 1.0, both off

    The sampler draws from p / S: its log-prob is logp - log S, and a trainer that uses all of V
    sees rho = S.
    """
    (logits,) = _arguments.tokens(logits=logits)
    mask = _arguments.mask(mask, logits[..., 0])
    p = jax.nn.softmax(_numerics.select(mask[..., None], jax.lax.stop_gradient(logits)), axis=-1)
    p = jnp.flip(jnp.sort(p, axis=-1), axis=-1)
    p = jnp.where(jnp.arange(p.shape[-1]) < (top_k or p.shape[-1]), p, 0.0)
    mass = jnp.sum(p, axis=-1, keepdims=True)
    inside = jnp.cumsum(p, axis=-1) - p < top_p * mass if top_p < 1.0 else True
    return jnp.where(mask, jnp.minimum(jnp.sum(jnp.where(inside, p, 0.0), axis=-1), 1.0), 1.0)


def _measured(old_logp: Array, rollout_logp: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Both log-probs with 0 where the token is not measured, and where it is."""
    old_logp, rollout_logp = jax.lax.stop_gradient(
        _arguments.tokens(old_logp=old_logp, rollout_logp=rollout_logp)
    )
    valid = _numerics.measured(rollout_logp, _arguments.mask(mask, rollout_logp))
    return _numerics.select(valid, old_logp), _numerics.select(valid, rollout_logp), valid


def _clipped(old_logp: Array, rollout_logp: Array, mask: Array) -> tuple[Array, Array]:
    old, rollout, valid = _measured(old_logp, rollout_logp, mask)
    return jnp.clip(old - rollout, -20.0, 20.0), valid


def _sequence(old_logp: Array, rollout_logp: Array, mask: Array) -> tuple[Array, Array]:
    """Log ratio of each completion, `[N, 1]`, clamped after the sum, and which have one."""
    old, rollout, valid = _measured(old_logp, rollout_logp, mask)
    total = _numerics.row_sum(old - rollout, valid)
    return _numerics.clamped(total), jnp.any(valid, axis=-1, keepdims=True)


def _gap(old: Array, rollout: Array, valid: Array) -> Array:
    return jnp.abs(_numerics.probability_gap(old, rollout, valid))


def _ess(weight: Array, mask: Array) -> Array:
    square = reduce.token_mean(jnp.square(weight), mask)
    return jnp.square(reduce.token_mean(weight, mask)) / jnp.where(square > 0, square, 1.0)


def _extreme(pick: Callable, x: Array, mask: Array, fill: float) -> Array:
    """Largest or smallest over the mask, 0 where it is empty."""
    return jnp.where(jnp.any(mask), pick(jnp.where(mask, x, fill), initial=fill), 0.0)


def _correlation(x: Array, y: Array, mask: Array) -> Array:
    """Pearson correlation over the mask; 0 where either varies by no more than rounding."""
    x, x_norm = _centred(x, mask)
    y, y_norm = _centred(y, mask)
    scale = x_norm * y_norm
    return jnp.clip(jnp.sum(x * y) / jnp.where(scale > 0, scale, 1.0), -1.0, 1.0)


def _centred(x: Array, mask: Array) -> tuple[Array, Array]:
    """x less its mean over the mask, 0 elsewhere, and its norm, or 0 if rounding is all of it."""
    rounding = 1e-6 * jnp.max(jnp.abs(_numerics.select(mask, x)), initial=0.0)
    x = _numerics.centred(x, mask)
    x = jnp.where(jnp.max(jnp.abs(x), initial=0.0) > rounding, x, 0.0)
    return x, jnp.sqrt(jnp.sum(x * x))
