"""Rewards to advantages. They need no log-probabilities and carry no gradient worth taking.

Completions of one prompt form a group, named by integer ids: `group` int32 `[N]` with ids in [0,
num_groups), in any order, and `num_groups` a Python int, so that every function is jit-safe and
groups may differ in size. The id -1 marks a padded completion, which belongs to no group and gets
advantage 0. An id of num_groups or more raises ValueError where its value is known; under jit,
where it is not, it counts as padding. `reward` is float32 `[N]`. A group of one completion has
nothing to compare with: its advantage is 0 (verl keeps the raw reward there). The functions raise
TypeError for another dtype and ValueError for another shape.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dcmdp_jax.losses import _arguments, _numerics

Array = jax.Array


def grpo(
    reward: Array, group: Array, *, num_groups: int, epsilon: float = 1e-6, ddof: int = 1
) -> Array:
    """Reward less the group's mean, over the group's standard deviation.

    Formula: A = (R - mean_g) / (std_g + epsilon), std_g over n_g - ddof
    Needs: reward, group, num_groups
    Default: epsilon 1e-6, ddof 1 (verl, Tunix); TRL has epsilon 1e-4, EasyDeL ddof 0
    Paper: GRPO, arXiv 2402.03300
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, not {ddof}")
    reward, group = _checked(reward, group, num_groups)
    centred, count = _centred(reward, group, num_groups)
    variance = _sum(jnp.square(centred), group, num_groups) / jnp.maximum(count - ddof, 1)
    return centred / (_root(variance) + epsilon)[group]


def dr_grpo(reward: Array, group: Array, *, num_groups: int) -> Array:
    """Reward less the group's mean, without division by the standard deviation.

    Formula: A = R - mean_g
    Needs: reward, group, num_groups
    Paper: Dr. GRPO, arXiv 2503.20783

    The paper's loss goes with it: `reduce.constant`.
    """
    reward, group = _checked(reward, group, num_groups)
    return _centred(reward, group, num_groups)[0]


def rloo(reward: Array, group: Array, *, num_groups: int) -> Array:
    """Reward less the mean of the group's other completions.

    Formula: A = n_g / (n_g - 1) (R - mean_g)
    Needs: reward, group, num_groups
    Paper: RLOO, arXiv 2402.14740
    """
    reward, group = _checked(reward, group, num_groups)
    centred, count = _centred(reward, group, num_groups)
    return centred * (count / jnp.maximum(count - 1, 1))[group]


def gpg(reward: Array, group: Array, *, num_groups: int) -> Array:
    """Reward less the group's mean, scaled up for completions of groups that carry no signal.

    Formula: A = N / #{n: group has unequal rewards} (R - mean_g)
    Needs: reward, group, num_groups
    Paper: GPG, arXiv 2504.02546

    The scale is a count over the batch given: under gradient accumulation compute advantages on the
    whole batch.
    """
    reward, group = _checked(reward, group, num_groups)
    useful = _spread(reward, group, num_groups)[group] > 0
    completions = jnp.sum(group < num_groups, dtype=jnp.float32)
    scale = completions / jnp.maximum(jnp.sum(useful, dtype=jnp.float32), 1)
    return scale * _centred(reward, group, num_groups)[0]


def pass_at_k_advantage(
    reward: Array, group: Array, *, num_groups: int, epsilon: float = 1e-6
) -> Array:
    """The best completion of a group gets its lead over the second best; all others get 0.

    Formula: A = (R - second_g) / (std_g + epsilon) for the best completion, else 0
    Needs: reward, group, num_groups
    Default: epsilon 1e-6, std_g over n_g - 1
    Paper: Tang et al., arXiv 2503.19595, in verl's form (grpo_passk)

    A tie at the top has no lead: 0 for the whole group.
    """
    reward, group = _checked(reward, group, num_groups)
    centred, count = _centred(reward, group, num_groups)
    variance = _sum(jnp.square(centred), group, num_groups) / jnp.maximum(count - 1, 1)
    best = _max(reward, group, num_groups)
    is_best = reward >= best[group]
    ties = _sum(is_best.astype(jnp.float32), group, num_groups)
    second = _max(jnp.where(is_best, -jnp.inf, reward), group, num_groups)
    lead = jnp.where((ties == 1) & (count > 1), best - second, 0.0) / (_root(variance) + epsilon)
    return jnp.where(is_best & (group < num_groups), lead[group], 0.0)


def pass_at_k(correct: Array, group: Array, *, num_groups: int, k: int) -> Array:
    """The unbiased estimate of the chance that one of k samples is correct, one per group.

    Formula: pass@k = 1 - C(n_g - c_g, k) / C(n_g, k), c_g = #{correct > 0}
    Needs: correct, group, num_groups, k
    Paper: Chen et al., arXiv 2107.03374

    Args:
        correct: float32 `[N]`, above zero where the completion is correct.
        group: int32 `[N]`.
        num_groups: Python int.
        k: Python int of at least 1. A group with fewer than k completions gives pass@n_g, an empty
            one 0.

    Returns:
        float32 `[num_groups]`.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    (correct,) = _arguments.tokens(correct=correct)
    group = _arguments.groups(group, correct, num_groups)
    count = _count(group, num_groups)[:num_groups, None]
    wrong = _sum((~(correct > 0)).astype(jnp.float32), group, num_groups)[:num_groups, None]
    draw = jnp.arange(k)
    missed = jnp.where(
        draw < count, jnp.maximum(wrong - draw, 0) / jnp.maximum(count - draw, 1), 1.0
    )
    return 1 - jnp.prod(missed, axis=-1)


def at_last_token(reward: Array, mask: Array) -> Array:
    """The reward of a completion on the last of its tokens, 0 on the others; `[N, T]`.

    Formula: r_nt = R_n 1[t = max{u: m_nu}]
    Needs: reward, mask [N, T]
    Paper: Ouyang et al., arXiv 2203.02155

    A completion without tokens has none to put it on.
    """
    (reward,) = _arguments.tokens(reward=reward)
    if reward.shape != mask.shape[:-1]:
        raise ValueError(
            f"reward has shape {reward.shape}; it must be {mask.shape[:-1]}, one per completion"
        )
    mask = _arguments.mask(mask, mask)
    later = jnp.flip(jnp.cumsum(jnp.flip(mask, axis=-1), axis=-1, dtype=jnp.int32), axis=-1)
    return jnp.where(mask & (later == 1), reward[..., None], 0.0)


def reinforce_pp(reward: Array, mask: Array, *, gamma: float = 1.0, epsilon: float = 1e-8) -> Array:
    """Discounted return of token rewards, whitened over all valid tokens of the batch.

    Formula: A = (G - mean) / sqrt(var + epsilon), G_t = m_t r_t + gamma G_{t+1} on the tokens of
        the mask
    Needs: reward [N, T] per token, mask
    Default: gamma 1.0, epsilon 1e-8, unbiased variance
    Paper: REINFORCE++, arXiv 2501.03262

    Tokens outside the mask are skipped: they add nothing and do not discount. A KL penalty, where
    wanted, is part of the token reward; `at_last_token` makes one of a completion's. Mean and
    variance are of the batch given.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be between 0 and 1, not {gamma}")
    (reward,) = _arguments.tokens(reward=reward)
    mask = _arguments.mask(mask, reward)
    decay = jnp.where(mask, gamma, 1.0)
    steps = (decay, _numerics.select(mask, reward))
    _, returns = jax.lax.associative_scan(_discount, steps, reverse=True, axis=reward.ndim - 1)
    return whiten(returns, mask, epsilon=epsilon)


def reinforce_pp_baseline(
    reward: Array, group: Array, mask: Array, *, num_groups: int, epsilon: float = 1e-8
) -> Array:
    """Reward less the group's mean on every token of the completion, whitened over all valid tokens
    of the batch.

    Formula: A = (a - mean) / sqrt(var + epsilon), a = R - mean_g
    Needs: reward, group, num_groups, mask [N, T]
    Default: epsilon 1e-8, unbiased variance
    Paper: REINFORCE++, arXiv 2501.03262
    """
    advantage = dr_grpo(reward, group, num_groups=num_groups)
    return whiten(jnp.broadcast_to(advantage[:, None], mask.shape), mask, epsilon=epsilon)


def whiten(advantage: Array, mask: Array, *, epsilon: float = 1e-8) -> Array:
    """Zero mean and unit variance over the valid tokens of the batch; 0 outside the mask.

    Formula: (A - mean) / sqrt(var + epsilon), var over #tokens - 1
    Needs: advantage [..., T], mask
    Default: epsilon 1e-8
    Paper: REINFORCE++, arXiv 2501.03262

    DC shaping goes after this, not before: whitening removes the mean shift and rescales the
    multiplier.
    """
    (advantage,) = _arguments.tokens(advantage=advantage)
    mask = _arguments.mask(mask, advantage)
    centred = _numerics.centred(advantage, mask)
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(jnp.sum(mask) - 1, 1)
    return centred * jax.lax.rsqrt(variance + epsilon)


def dynamic_sampling_mask(reward: Array, group: Array, *, num_groups: int) -> Array:
    """True for completions of groups with unequal rewards: the others have no gradient and are
    dropped or refilled.

    Formula: keep = max_g R > min_g R
    Needs: reward, group, num_groups
    Paper: DAPO, arXiv 2503.14476

    Returns bool `[N]`. Under DC shaping a dropped group would still have been pulled by -lambda
    delta.
    """
    reward, group = _checked(reward, group, num_groups)
    return _spread(reward, group, num_groups)[group] > 0


def overlong_penalty(length: Array, *, max_length: int, cache: int, factor: float = 1.0) -> Array:
    """The soft punishment of long completions, to be added to the reward.

    Formula: -factor clip((length - (max_length - cache)) / cache, 0, 1)
    Needs: length int32 [N]
    Default: factor 1.0; DAPO has max_length 20480, cache 4096
    Paper: DAPO, arXiv 2503.14476

    Args:
        length: completion tokens, int32 `[N]`.
        max_length: the generation limit in tokens.
        cache: the interval before the limit, in tokens, over which the punishment grows from 0 to
            `factor`.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache must be between 1 and max_length = {max_length}, not {cache}")
    excess = (_lengths(length) - (max_length - cache)) / cache
    return -factor * jnp.clip(excess, 0.0, 1.0).astype(jnp.float32)


def overlong_mask(mask: Array, truncated: Array) -> Array:
    """The mask without completions that were cut off at the limit, whose reward says nothing about
    them.

    Formula: m_nt = mask_nt and not truncated_n
    Needs: mask [N, T], truncated bool [N]
    Paper: DAPO (overlong filtering), arXiv 2503.14476

    Returns bool `[N, T]`. Whatever count the reducer takes is then of the remaining completions.
    """
    if mask.shape[:-1] != truncated.shape:
        raise ValueError(
            f"truncated has shape {truncated.shape}; it must be {mask.shape[:-1]}, "
            "one per completion"
        )
    return _arguments.mask(mask, mask) & ~jnp.asarray(truncated, bool)[..., None]


def length_reward(correct: Array, length: Array, group: Array, *, num_groups: int) -> Array:
    """The reward for short correct completions among those of one prompt, to be added to the
    reward.

    Formula: s if correct else min(0, s), s = 1/2 - (length - min_g) / (max_g - min_g); 0 where
        max_g = min_g
    Needs: correct, length int32 [N], group, num_groups
    Paper: Kimi k1.5, arXiv 2501.12599
    """
    (correct,) = _arguments.tokens(correct=correct)
    group = _arguments.groups(group, correct, num_groups)
    length = _lengths(length)
    longest = _max(length, group, num_groups)
    shortest = -_max(-length, group, num_groups)
    span = (longest - shortest)[group]
    share = 0.5 - (length - shortest[group]) / jnp.maximum(span, 1)
    return jnp.where(
        (span > 0) & (group < num_groups), jnp.where(correct > 0, share, jnp.minimum(share, 0)), 0.0
    )


def _checked(reward: Array, group: Array, num_groups: int) -> tuple[Array, Array]:
    (reward,) = _arguments.tokens(reward=reward)
    group = _arguments.groups(group, reward, num_groups)
    return jnp.where(group < num_groups, reward, 0.0), group


def _centred(reward: Array, group: Array, num_groups: int) -> tuple[Array, Array]:
    """R - mean_g and n_g. Centred on the maximum first, so that equal rewards give exactly 0 and
    not a rounding.
    """
    count = _count(group, num_groups)
    shifted = reward - _max(reward, group, num_groups)[group]
    mean = _sum(shifted, group, num_groups) / jnp.maximum(count, 1)
    return jnp.where(group < num_groups, shifted - mean[group], 0.0), count


def _spread(reward: Array, group: Array, num_groups: int) -> Array:
    """max_g R - min_g R, `[num_groups + 1]`; 0 for the slot of padded completions."""
    extent = _max(reward, group, num_groups) + _max(-reward, group, num_groups)
    return jnp.where(jnp.arange(num_groups + 1) < num_groups, extent, 0.0)


def _sum(x: Array, group: Array, num_groups: int) -> Array:
    return jax.ops.segment_sum(x, group, num_segments=num_groups + 1)


def _max(x: Array, group: Array, num_groups: int) -> Array:
    return jax.ops.segment_max(x, group, num_segments=num_groups + 1)


def _count(group: Array, num_groups: int) -> Array:
    return _sum(jnp.ones(group.shape, jnp.float32), group, num_groups)


def _root(variance: Array) -> Array:
    """Square root whose gradient at 0 is 0."""
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)


def _discount(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
    return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]


def _lengths(length: Array) -> Array:
    if getattr(length, "dtype", None) != jnp.int32:
        raise TypeError(
            "length must be an int32 array of completion tokens; cast it with .astype('int32')"
        )
    return jnp.asarray(length).astype(jnp.float32)
