"""Policy losses against their formulas in float64, and the identities that tie them together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.losses import covariance, policy, reduce, sequence

N = 6
T = 11


def batch(seed: int = 0, spread: float = 0.4) -> tuple[np.ndarray, ...]:
    """logp, old_logp, advantage, mask: row 2 is empty, the mask has holes, padding is garbage."""
    rng = np.random.default_rng(seed)
    old_logp = -rng.exponential(1.0, (N, T))
    logp = old_logp + spread * rng.standard_normal((N, T))
    logp = np.minimum(logp, -1e-3)
    advantage = np.broadcast_to(rng.standard_normal((N, 1)), (N, T)).copy()
    mask = rng.random((N, T)) < 0.7
    mask[2] = False
    for x, garbage in ((logp, np.nan), (old_logp, -np.inf), (advantage, 1e4)):
        x[~mask] = garbage
    return logp.astype(np.float32), old_logp.astype(np.float32), advantage.astype(np.float32), mask


def check(loss, formula, rtol=2e-5, **batch_options) -> None:
    """`loss` against `formula(logp, old_logp, advantage)` in float64 on the mask, 0 elsewhere."""
    logp, old_logp, advantage, mask = batch(**batch_options)
    expected = np.zeros((N, T))
    expected[mask] = formula(*(np.float64(x[mask]) for x in (logp, old_logp, advantage)))
    value = loss(logp, old_logp, advantage, mask)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    "dual_clip, ratio_max", [(None, None), (3.0, None), (None, 1.5), (1.6, 2.0)]
)
def test_clipped_is_the_pessimistic_surrogate(dual_clip, ratio_max):
    def formula(logp, old_logp, a):
        r = np.exp(logp - old_logp)
        loss = np.maximum(-np.minimum(r, ratio_max or np.inf) * a, -np.clip(r, 0.8, 1.28) * a)
        return np.where(a < 0, np.minimum(loss, -(dual_clip or np.inf) * a), loss)

    options = dict(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip, ratio_max=ratio_max)
    check(functools.partial(policy.clipped, **options), formula, spread=0.8)


def test_clipped_stops_the_gradient_where_the_clip_binds():
    logp, old_logp, advantage, mask = batch(spread=0.8)
    gradient = jax.grad(lambda x: policy.clipped(x, old_logp, advantage, mask).sum())(logp)
    ratio = np.exp(np.where(mask, logp, 0) - np.where(mask, old_logp, 0))
    stopped = np.where(advantage > 0, ratio > 1.2, ratio < 0.8) & mask
    assert 0 < stopped.sum() < mask.sum()
    np.testing.assert_array_equal(np.asarray(gradient) == 0, stopped | ~mask)


@pytest.mark.parametrize("low, high", [(None, 1.1), (0.8, 1.28), (0.9, 1.1)])
def test_cispo_keeps_every_token_with_a_bounded_weight(low, high):
    loss = functools.partial(policy.cispo, low=low, high=high)
    check(loss, lambda lp, old, a: -np.clip(np.exp(lp - old), low or 0, high) * a * lp)
    logp, old_logp, advantage, mask = batch()
    gradient = jax.grad(lambda x: loss(x, old_logp, advantage, mask).sum())(logp)
    assert np.all(np.asarray(gradient)[mask] != 0)


def test_sapo():
    def formula(logp, old_logp, a):
        tau = np.where(a > 0, 1.0, 1.05)
        return -a / (1 + np.exp(-tau * (np.exp(logp - old_logp) - 1))) * 4 / tau

    check(policy.sapo, formula)


def test_kl_cov_has_no_pull_where_there_is_no_distance():
    """On policy its gradient is that of the unclipped surrogate, on the chosen tokens too."""
    logp, _, advantage, mask = batch()
    penalised = functools.partial(covariance.kl_cov, fraction=0.1, penalty=5.0)
    found = jax.grad(lambda x: penalised(x, logp, advantage, mask).sum())(logp)
    np.testing.assert_allclose(found, np.where(mask, -advantage, 0), rtol=1e-6)


def test_dppo_tv():
    def formula(logp, old_logp, a):
        gap = np.exp(logp) - np.exp(old_logp)
        keep = np.where(a > 0, gap <= 0.1, gap >= -0.05)
        return -a * np.minimum(np.exp(logp - old_logp), 1.5) * logp * keep

    check(
        functools.partial(policy.dppo_tv, tv_low=0.05, tv_high=0.1, ratio_max=1.5),
        formula,
        spread=0.8,
    )


def test_dppo_kl():
    def formula(logp, old_logp, a):
        p = np.exp(logp)
        q = np.exp(old_logp)
        kl = q * np.log(q / p) + (1 - q) * np.log((1 - q + 1e-8) / (1 - p + 1e-8))
        return -a * np.minimum(p / q, 20) * logp * ((kl <= 0.02) | (a * (p - q) <= 0))

    check(functools.partial(policy.dppo_kl, kl_max=0.02), formula, spread=0.8)


def test_prime_tv():
    def formula(logp, rollout_logp, a):
        gap = np.exp(logp) - np.exp(rollout_logp)
        keep = np.where(a > 0, gap <= 0.1, gap >= -0.1)
        return -a * np.exp(logp - rollout_logp) * keep + 1e-3 * (logp - rollout_logp) ** 2

    check(functools.partial(policy.prime_tv, tv_low=0.1, tv_high=0.1), formula, spread=0.8)


def test_spo_and_drpo():
    def penalty(logp, old_logp, a, weight):
        return -a * np.exp(logp - old_logp) + np.abs(a) * weight * (
            np.exp(logp - old_logp) - 1
        ) ** 2 / (2 * 0.3)

    check(functools.partial(policy.spo, epsilon=0.3), lambda lp, old, a: penalty(lp, old, a, 1))
    check(
        functools.partial(policy.drpo, epsilon=0.3),
        lambda lp, old, a: penalty(lp, old, a, np.exp(old)),
    )


def test_drpo_gradient_weighs_by_the_probability_moved():
    logp, rollout_logp, advantage, mask = batch()
    gradient = jax.grad(lambda x: policy.drpo(x, rollout_logp, advantage, mask, epsilon=0.7).sum())(
        logp
    )
    lp, roll, a = (np.float64(x[mask]) for x in (logp, rollout_logp, advantage))
    e = np.exp(lp - roll)
    weight = 1 - np.sign(a * (e - 1)) * np.abs(np.exp(lp) - np.exp(roll)) / 0.7
    np.testing.assert_allclose(np.asarray(gradient)[mask], -a * e * weight, rtol=1e-4, atol=1e-6)


def test_dro_topr_reinforce_gpg():
    check(
        functools.partial(policy.dro, beta=0.4),
        lambda lp, old, a: -(lp * a - 0.2 * (lp - old) ** 2),
    )
    check(
        policy.topr,
        lambda lp, old, a: -np.where(a > 0, 1, np.clip(np.exp(lp - old), 0, 1)) * a * lp,
    )
    check(policy.reinforce, lambda lp, old, a: -a * lp)
    check(functools.partial(policy.gpg, alpha=2.5), lambda lp, old, a: -2.5 * a * lp)


def test_on_policy_gradients_are_the_score_function():
    logp, _, advantage, mask = batch()
    score = jax.grad(lambda x: policy.reinforce(x, x, advantage, mask).sum())(logp)
    for loss in (
        policy.clipped,
        policy.cispo,
        policy.sapo,
        policy.dppo_tv,
        policy.dppo_kl,
        policy.spo,
        policy.drpo,
    ):
        gradient = jax.grad(lambda x: loss(x, jax.lax.stop_gradient(x), advantage, mask).sum())(
            logp
        )
        np.testing.assert_allclose(gradient, score, rtol=1e-5, atol=1e-6, err_msg=loss.__name__)


def test_gspo_forms_agree_and_differ_where_the_advantage_varies():
    logp, old_logp, advantage, mask = batch(spread=0.02)

    def scalar(loss, a):
        return jax.value_and_grad(
            lambda x: reduce.sequence_mean_token_mean(loss(x, old_logp, a, mask), mask)
        )(logp)

    for computed, expected in zip(
        scalar(sequence.gspo, advantage), scalar(sequence.gspo_token, advantage)
    ):
        np.testing.assert_allclose(computed, expected, rtol=1e-5, atol=1e-7)
    varied = advantage * np.linspace(0.1, 2, T, dtype=np.float32)
    _, of_row = scalar(sequence.gspo, varied)
    _, of_token = scalar(sequence.gspo_token, varied)
    assert not np.allclose(of_row, of_token, rtol=1e-2)


def test_sequence_losses_take_one_advantage_per_completion():
    logp, old_logp, advantage, mask = batch()
    one = np.where(
        mask.any(1), np.nanmax(np.where(mask, advantage, np.nan), axis=1, initial=-9), 0
    )[:, None]
    for loss in (sequence.gspo, sequence.gspo_token, sequence.gmpo, sequence.vespo, policy.clipped):
        np.testing.assert_allclose(
            loss(logp, old_logp, one.astype(np.float32), mask),
            loss(logp, old_logp, advantage, mask),
            rtol=1e-5,
        )


def test_gmpo_and_vespo():
    logp, old_logp, advantage, mask = batch(spread=0.6)
    gmpo = np.zeros((N, T))
    vespo = np.zeros((N, T))
    for n in range(N):
        lp, old, a = (np.float64(x[n, mask[n]]) for x in (logp, old_logp, advantage))
        if not lp.size:
            continue
        s = np.sign(a)
        x = s * np.minimum(s * (lp - old), s * np.clip(lp - old, -0.4, 0.4))
        gmpo[n, mask[n]] = -a.mean() * np.exp(x.mean())
        log_w = np.clip((lp - old).sum(), np.log(1e-8), 20)
        k, lam = (2, 3) if a[0] >= 0 else (3, 2)
        vespo[n, mask[n]] = -np.exp(lam + k * log_w - lam * np.exp(log_w)) * a * lp
    np.testing.assert_allclose(sequence.gmpo(logp, old_logp, advantage, mask), gmpo, rtol=1e-5)
    np.testing.assert_allclose(
        sequence.vespo(logp, old_logp, advantage, mask), vespo, rtol=1e-4, atol=1e-7
    )


def large_batch() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(3), 4)
    shape = (64, 256)
    old_logp = -jax.random.exponential(keys[0], shape)
    logp = old_logp + 0.1 * jax.random.normal(keys[1], shape)
    return (
        logp,
        old_logp,
        jax.random.normal(keys[2], shape),
        jax.random.uniform(keys[3], shape) < 0.8,
    )


def covariances(logp, advantage, mask) -> np.ndarray:
    logp = np.float64(logp)
    advantage = np.float64(advantage)
    mask = np.asarray(mask)
    cov = (advantage - advantage[mask].mean()) * (logp - logp[mask].mean())
    return np.where(mask, cov, -np.inf)


def test_clip_cov_drops_the_expected_number_of_candidates_and_no_other():
    logp, old_logp, advantage, mask = large_batch()
    plain = policy.clipped(logp, old_logp, advantage, mask)
    cov = covariances(logp, advantage, mask)
    count = []
    for seed in range(20):
        loss = covariance.clip_cov(
            logp, old_logp, advantage, mask, key=jax.random.key(seed), fraction=1e-2
        )
        dropped = np.asarray((loss == 0) & (plain != 0))
        assert np.all((cov[dropped] > 1) & (cov[dropped] < 5))
        np.testing.assert_array_equal(np.asarray(loss)[~dropped], np.asarray(plain)[~dropped])
        count.append(dropped.sum())
    expected = 1e-2 * float(mask.sum())
    assert abs(np.mean(count) - expected) < 4 * np.sqrt(expected / 20)
    assert len(set(count)) > 1


def test_clip_cov_draws_from_the_band_and_not_what_the_clip_stopped():
    logp, old_logp, advantage, mask = large_batch()
    old_logp = logp + 3 * (old_logp - logp)
    # all are drawn
    loss = covariance.clip_cov(logp, old_logp, advantage, mask, key=jax.random.key(0), fraction=0.9)
    cov = covariances(logp, advantage, mask)
    ratio = np.exp(np.float64(logp) - np.float64(old_logp))
    stopped = np.where(np.asarray(advantage) > 0, ratio > 1.2, ratio < 0.8)
    drawn = (cov > 1) & (cov < 5) & ~stopped
    assert np.any((cov > 1) & (cov < 5) & stopped)
    np.testing.assert_array_equal(np.asarray(loss) == 0, drawn | ~np.asarray(mask))


def test_clip_cov_depends_on_the_key_alone():
    x = large_batch()
    first, again, other = (
        covariance.clip_cov(*x, key=jax.random.key(s), fraction=1e-2) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))


def test_kl_cov_penalises_the_tokens_of_highest_covariance():
    logp, old_logp, advantage, mask = large_batch()
    loss = covariance.kl_cov(logp, old_logp, advantage, mask, fraction=1e-2, penalty=0.5)
    count = int(1e-2 * float(mask.sum()))
    chosen = np.zeros(mask.size, bool)
    chosen[np.argsort(-covariances(logp, advantage, mask).ravel())[:count]] = True
    log_ratio = np.float64(logp) - np.float64(old_logp)
    expected = -np.exp(log_ratio) * advantage + 0.5 * np.abs(log_ratio) * chosen.reshape(mask.shape)
    np.testing.assert_allclose(loss, np.where(mask, expected, 0), rtol=1e-4, atol=1e-5)


def test_kl_cov_with_equal_covariances_penalises_none():
    logp, old_logp, _, mask = batch()
    loss = covariance.kl_cov(logp, old_logp, np.ones((N, 1), np.float32), mask, fraction=0.1)
    expected = np.where(mask, -np.exp(np.where(mask, logp, 0) - np.where(mask, old_logp, 0)), 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


LOSSES = [
    *(
        policy.clipped,
        policy.reinforce,
        policy.gpg,
        policy.cispo,
        policy.sapo,
        policy.dppo_tv,
        policy.dppo_kl,
    ),
    *(
        policy.prime_tv,
        policy.spo,
        policy.drpo,
        functools.partial(policy.dro, beta=0.1),
        policy.topr,
    ),
    *(sequence.gspo, sequence.gspo_token, sequence.gmpo, sequence.vespo, covariance.kl_cov),
    functools.partial(covariance.clip_cov, key=jax.random.key(0)),
]


@pytest.mark.parametrize(
    "loss", LOSSES, ids=lambda f: getattr(f, "__name__", None) or f.func.__name__
)
def test_padding_and_empty_masks(loss):
    logp, old_logp, advantage, mask = batch()
    clean = [np.where(mask, x, np.float32(0)) for x in (logp, old_logp, advantage)]

    def scalar(logp, old_logp, advantage, mask):
        return reduce.token_mean(loss(logp, old_logp, advantage, mask), mask)

    run = jax.jit(jax.value_and_grad(scalar))
    value, gradient = run(logp, old_logp, advantage, mask)
    clean_value, clean_gradient = run(*clean, mask)
    assert value == clean_value
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert np.all(np.asarray(gradient)[~mask] == 0) and np.any(np.asarray(gradient)[mask] != 0)
    value, gradient = run(logp, old_logp, advantage, np.zeros_like(mask))
    assert value == 0 and np.all(np.asarray(gradient) == 0)


@pytest.mark.full
@pytest.mark.parametrize(
    "loss", LOSSES, ids=lambda f: getattr(f, "__name__", None) or f.func.__name__
)
def test_float32_stays_float32_where_float64_is_enabled(loss):
    x = batch()
    expected = loss(*x)
    with jax.enable_x64(True):
        value = loss(*x)
        scalar = reduce.token_mean(value, x[-1])
    assert value.dtype == scalar.dtype == jnp.float32
    np.testing.assert_array_equal(value, expected)


def test_arguments_are_named_in_errors():
    logp, old_logp, advantage, mask = batch()
    with pytest.raises(
        TypeError, match="old_logp is bfloat16: rounding log-probs to bfloat16 alone makes a delta"
    ):
        policy.clipped(logp, jnp.asarray(old_logp, jnp.bfloat16), advantage, mask)
    with pytest.raises(TypeError, match="advantage must be float32, not float64; cast it"):
        policy.clipped(logp, old_logp, np.float64(advantage), mask)
    with pytest.raises(TypeError, match="logp must be a NumPy or JAX array, not list"):
        policy.clipped([1.0], old_logp, advantage, mask)
    with pytest.raises(ValueError, match=r"old_logp has shape \(6, 10\) but logp has \(6, 11\)"):
        policy.clipped(logp, old_logp[:, 1:], advantage, mask)
    with pytest.raises(ValueError, match="advantage has shape .* or .* one per completion"):
        policy.clipped(logp, old_logp, advantage[:, 0], mask)
    with pytest.raises(ValueError, match="mask has shape"):
        policy.clipped(logp, old_logp, advantage, mask[:1])
    with pytest.raises(TypeError, match="mask must be bool, int32 or float32, not float64"):
        policy.clipped(logp, old_logp, advantage, np.float64(mask))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(clip_low=1.2), "clip_low must be between 0 and 1"),
        (dict(clip_high=-0.1), "clip_high must be at least 0"),
        (dict(dual_clip=0.9), "dual_clip must be above 1"),
        (dict(ratio_max=1.1), "ratio_max must be above 1 [+] clip_high"),
    ],
)
def test_clipped_bounds(options, message):
    with pytest.raises(ValueError, match=message):
        policy.clipped(*batch(), **options)


def test_bounds_of_the_others():
    with pytest.raises(ValueError, match="low must be between 0 and high"):
        policy.cispo(*batch(), low=6.0)
    with pytest.raises(ValueError, match="positive_temperature and negative_temperature"):
        policy.sapo(*batch(), negative_temperature=0.0)
    with pytest.raises(ValueError, match="epsilon must be above zero"):
        policy.drpo(*batch(), epsilon=0.0)
    with pytest.raises(ValueError, match="beta must be above zero"):
        policy.dro(*batch(), beta=0.0)
    with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
        covariance.kl_cov(*batch(), fraction=1.0)
    with pytest.raises(ValueError, match="clip_low and clip_high must be at least 0"):
        sequence.gmpo(*batch(), clip_low=-1.0)
