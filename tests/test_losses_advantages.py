"""Advantages against NumPy group by group, and reducers against the whole batch."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.losses import advantages, reduce

GROUPS = 5


def rewards(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Groups of 4, 1, 6, 3 and 0 completions in mixed order, and two padded completions with
    garbage rewards.
    """
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.array([0, 1, 2, 3, -1]), [4, 1, 6, 3, 2])).astype(np.int32)
    reward = rng.standard_normal(group.size).astype(np.float32)
    reward[group == 3] = 0.1  # equal rewards, whose float32 mean is not quite 0.1
    reward[group < 0] = np.nan
    return reward, group


def by_group(formula, reward, group) -> np.ndarray:
    """`formula(rewards of a group)` in float64, written back; 0 for singletons and padded
    completions.
    """
    out = np.zeros(reward.size)
    for g in range(GROUPS):
        rows = group == g
        if rows.sum() > 1:
            out[rows] = formula(np.float64(reward[rows]))
    return out


def lead(r: np.ndarray) -> np.ndarray:
    second, best = np.sort(r)[-2:]
    return np.where((r == best) & (best > second), (best - second) / (r.std(ddof=1) + 1e-6), 0)


@pytest.mark.parametrize(
    "function, options, formula",
    [
        (advantages.grpo, {}, lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-6)),
        (
            advantages.grpo,
            {"ddof": 0, "epsilon": 1e-4},
            lambda r: (r - r.mean()) / (r.std() + 1e-4),
        ),
        (advantages.dr_grpo, {}, lambda r: r - r.mean()),
        (
            advantages.rloo,
            {},
            lambda r: np.array([r[i] - np.delete(r, i).mean() for i in range(r.size)]),
        ),
        (advantages.gpg, {}, lambda r: (14 / 10) * (r - r.mean())),
        (advantages.pass_at_k_advantage, {}, lead),
        (advantages.dynamic_sampling_mask, {}, lambda r: np.full(r.size, r.max() > r.min())),
    ],
)
def test_group_advantages(function, options, formula):
    reward, group = rewards()
    computed = jax.jit(lambda r, g: function(r, g, num_groups=GROUPS, **options))(reward, group)
    np.testing.assert_allclose(computed, by_group(formula, reward, group), rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(computed)[(group == 1) | (group == 3)] == 0)


GROUPED = [
    advantages.grpo,
    advantages.dr_grpo,
    advantages.rloo,
    advantages.gpg,
    advantages.pass_at_k_advantage,
    advantages.dynamic_sampling_mask,
    partial(advantages.pass_at_k, k=2),
]


@pytest.mark.parametrize("function", GROUPED)
def test_an_id_that_is_too_large_is_refused(function):
    reward, group = rewards()
    group[0] = GROUPS
    with pytest.raises(ValueError, match="group holds the id 5, and ids of num_groups=5 groups"):
        function(reward, group, num_groups=GROUPS)


@pytest.mark.parametrize("function", GROUPED)
def test_under_jit_an_id_that_is_too_large_is_padding(function):
    reward, group = rewards()
    compute = jax.jit(partial(function, num_groups=GROUPS))
    too_large = np.where(group < 0, 99, group).astype(np.int32)
    np.testing.assert_array_equal(compute(reward, too_large), compute(reward, group))


def test_equal_rewards_give_exactly_zero():
    """Where the rounding of a mean would be divided by a standard deviation made of the same
    rounding.
    """
    values = np.array([0.1, 0.3, 0.7, 1 / 3, 1e3 + 0.1], np.float32)
    for size in (3, 5, 6, 7, 11):
        reward = np.repeat(values, size)
        group = np.repeat(np.arange(5, dtype=np.int32), size)
        for function in (
            advantages.grpo,
            advantages.dr_grpo,
            advantages.rloo,
            advantages.dynamic_sampling_mask,
        ):
            assert not np.any(function(reward, group, num_groups=5))


def test_group_order_and_names_do_not_matter():
    reward, group = rewards()
    reward = np.nan_to_num(reward)
    order = np.random.default_rng(1).permutation(reward.size)
    names = np.array([3, 0, 4, 1, 2], np.int32)
    inside = (group >= 0) & (group < GROUPS)
    renamed = np.where(inside, names[np.clip(group, 0, GROUPS - 1)], group).astype(np.int32)
    for function in (advantages.grpo, advantages.rloo, advantages.pass_at_k_advantage):
        computed = np.asarray(function(reward, group, num_groups=GROUPS))
        shuffled = function(reward[order], renamed[order], num_groups=GROUPS)
        np.testing.assert_allclose(shuffled, computed[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_counts_every_choice_of_k(k):
    reward, group = rewards()
    correct = np.where(reward > 0, 1.0, 0.0).astype(np.float32)
    computed = np.asarray(advantages.pass_at_k(correct, group, num_groups=GROUPS, k=k))
    for g in range(GROUPS):
        members = correct[group == g]
        if members.size:
            draws = list(itertools.combinations(members, min(k, members.size)))
            np.testing.assert_allclose(
                computed[g], np.mean([max(draw) for draw in draws]), rtol=1e-5, atol=1e-6
            )
    assert computed[4] == 0


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reinforce_pp_skips_masked_tokens(gamma):
    rng = np.random.default_rng(2)
    reward = rng.standard_normal((4, 9))
    mask = rng.random((4, 9)) < 0.6
    mask[1] = False
    returns = np.zeros((4, 9))
    for n in range(4):
        running = 0.0
        for t in np.flatnonzero(mask[n])[::-1]:
            returns[n, t] = running = reward[n, t] + gamma * running
    valid = returns[mask]
    expected = np.where(mask, (returns - valid.mean()) / np.sqrt(valid.var(ddof=1) + 1e-8), 0)
    garbage = np.where(mask, reward, np.nan).astype(np.float32)
    computed = advantages.reinforce_pp(garbage, mask, gamma=gamma)
    np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-6)


def test_reinforce_pp_baseline_and_empty_masks():
    reward, group = rewards()
    mask = np.random.default_rng(3).random((reward.size, 8)) < 0.5
    centred = np.repeat(by_group(lambda r: r - r.mean(), reward, group)[:, None], 8, axis=1)
    expected = (centred - centred[mask].mean()) / np.sqrt(centred[mask].var(ddof=1) + 1e-8)
    computed = advantages.reinforce_pp_baseline(reward, group, mask, num_groups=GROUPS)
    np.testing.assert_allclose(computed, np.where(mask, expected, 0), rtol=1e-4, atol=1e-6)
    nothing = advantages.reinforce_pp_baseline(
        reward, group, np.zeros_like(mask), num_groups=GROUPS
    )
    np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize("reward", [0.7, 10.1, 100.3])
def test_equal_returns_are_whitened_to_zero(reward):
    """The rounding of their mean is not scaled up."""
    mask = np.ones((16, 37), bool)
    returns = np.full(mask.shape, reward, np.float32)
    np.testing.assert_allclose(jax.jit(advantages.whiten)(returns, mask), 0, atol=1e-6)


def test_a_verdict_that_is_not_a_number_is_not_correct():
    correct = np.array([np.nan, 0.0, 1.0, np.nan], np.float32)
    group = np.array([0, 0, 1, 1], np.int32)
    found = advantages.pass_at_k(correct, group, num_groups=2, k=1)
    np.testing.assert_allclose(found, [0, 0.5], rtol=1e-6)


def test_length_shaping():
    length = np.array([0, 6, 7, 10, 50], np.int32)
    penalty = advantages.overlong_penalty(length, max_length=10, cache=4, factor=2.0)
    np.testing.assert_allclose(penalty, [0, 0, -0.5, -2, -2])
    assert penalty.dtype == jnp.float32
    correct = np.array([1, 1, 0, 0, 1], np.float32)
    group = np.array([0, 0, 0, 1, -1], np.int32)
    shaped = advantages.length_reward(
        correct, np.array([10, 20, 30, 5, 5], np.int32), group, num_groups=2
    )
    np.testing.assert_allclose(shaped, [0.5, 0.0, -0.5, 0, 0])
    mask = advantages.overlong_mask(np.ones((2, 3), np.int32), np.array([True, False]))
    np.testing.assert_array_equal(mask, [[False] * 3, [True] * 3])


def test_advantages_name_what_is_wrong():
    reward, group = rewards()
    with pytest.raises(TypeError, match="reward must be float32, not float64"):
        advantages.grpo(np.float64(reward), group, num_groups=GROUPS)
    with pytest.raises(TypeError, match="group must be int32, not int64"):
        advantages.grpo(reward, group.astype(np.int64), num_groups=GROUPS)
    with pytest.raises(ValueError, match=r"both must be \[N\]"):
        advantages.grpo(reward, group[1:], num_groups=GROUPS)
    with pytest.raises(ValueError, match="num_groups must be at least 1"):
        advantages.rloo(reward, group, num_groups=0)
    with pytest.raises(ValueError, match="ddof must be 0 or 1"):
        advantages.grpo(reward, group, num_groups=GROUPS, ddof=2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        advantages.pass_at_k(reward, group, num_groups=GROUPS, k=0)
    with pytest.raises(ValueError, match="cache must be between 1 and max_length"):
        advantages.overlong_penalty(group, max_length=4, cache=5)
    with pytest.raises(TypeError, match="length must be an int32 array"):
        advantages.overlong_penalty(reward, max_length=4, cache=2)


def tokens() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    mask = rng.random((8, 5)) < 0.6
    mask[3] = False
    return np.where(mask, rng.standard_normal((8, 5)), np.nan).astype(np.float32), mask


@pytest.mark.full
def test_float32_stays_float32_where_float64_is_enabled():
    (reward, group), (x, mask) = rewards(), tokens()

    def everything() -> list:
        grouped = (advantages.grpo, advantages.rloo, advantages.gpg, advantages.pass_at_k_advantage)
        out = [function(reward, group, num_groups=GROUPS) for function in grouped]
        out += [
            advantages.pass_at_k(reward, group, num_groups=GROUPS, k=2),
            advantages.reinforce_pp(x, mask),
        ]
        out += [advantages.overlong_penalty(group, max_length=4, cache=2)]
        out += [advantages.length_reward(reward, group, group, num_groups=GROUPS)]
        out += [reduce.token_mean(x, mask), reduce.sequence_mean_token_sum(x, mask)]
        return out + [
            reduce.sequence_mean_token_mean(x, mask),
            reduce.constant(x, mask, normalizer=3),
        ]

    expected = everything()
    with jax.enable_x64(True):
        computed = everything()
    for value, reference in zip(computed, expected):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, reference, rtol=1e-6)


def test_reducers():
    x, mask = tokens()
    rows = [np.float64(x[n][mask[n]]) for n in range(8) if mask[n].any()]
    flat = np.concatenate(rows)
    expected = {
        reduce.token_mean: flat.mean(),
        reduce.token_sum: flat.sum(),
        reduce.sequence_mean_token_mean: np.mean([row.mean() for row in rows]),
        reduce.sequence_mean_token_sum: np.mean([row.sum() for row in rows]),
    }
    for function, value in expected.items():
        np.testing.assert_allclose(function(x, mask), value, rtol=1e-5, err_msg=function.__name__)
    np.testing.assert_allclose(reduce.constant(x, mask, normalizer=40), flat.sum() / 40, rtol=1e-5)
    for zero in (0, np.float32(0)):
        with pytest.raises(ValueError, match="normalizer must be above zero"):
            reduce.constant(x, mask, normalizer=zero)


def test_parts_with_global_counts_sum_to_the_whole():
    x, mask = tokens()
    rows = int(mask.any(1).sum())
    cases = {
        reduce.token_mean: dict(count=int(mask.sum())),
        reduce.token_sum: {},
        reduce.sequence_mean_token_mean: dict(count=jnp.int32(rows)),
        reduce.sequence_mean_token_sum: dict(count=rows),
    }
    for function, counts in cases.items():
        whole, gradient = jax.value_and_grad(lambda v: function(v, mask))(x)
        bounds = (slice(0, 1), slice(1, 4), slice(4, 8))
        parts = [
            jax.value_and_grad(lambda v, s=s: function(v, mask[s], **counts))(x[s]) for s in bounds
        ]
        np.testing.assert_allclose(sum(value for value, _ in parts), whole, rtol=1e-5)
        np.testing.assert_allclose(np.concatenate([g for _, g in parts]), gradient, rtol=1e-5)
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


def test_nothing_reduces_to_zero():
    x, mask = tokens()
    for function in (
        reduce.token_mean,
        reduce.sequence_mean_token_mean,
        reduce.sequence_mean_token_sum,
    ):
        value, gradient = jax.value_and_grad(lambda v: function(v, np.zeros_like(mask)))(x)
        assert value == 0 and np.all(np.asarray(gradient) == 0)
