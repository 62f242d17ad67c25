"""Diagnostics against golden vectors, NumPy in float64, and situations made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import constraint
from dcmdp_jax.losses import diagnostics, tails
from support import golden

NAMES = {  # golden name -> name in `summary`; ratio_out is frac_out_0.5_2
    "prob_diff_mean": "prob_diff_mean",
    "prob_diff_max": "prob_diff_max",
    "prob_diff_std_ddof1": "prob_diff_std",
    "pearson": "pearson",
    "logp_abs_diff_mean": "logp_diff_mean",
    "logp_abs_diff_max": "logp_diff_max",
    "k1_roll_train": "k1",
    "k2": "k2",
    "k3": "k3",
    "chi2_token": "chi2_token",
    "chi2_seq": "chi2_sequence",
    "train_ppl": "train_ppl",
    "rollout_ppl": "rollout_ppl",
    "ppl_ratio": "ppl_ratio",
    "log_ppl_diff": "log_ppl_diff",
    "log_ppl_abs_diff": "log_ppl_diff_abs",
    "ess_token_truncated": "ess_token",
    "ess_seq": "ess_sequence",
    "token_mult_prob_error": "mult_prob_error",
    "js_nemo": "js",
    "m2": "m2",
    "frac_out_0.5_2": "ratio_out",
    "adv_skew": "advantage_skew",
}


def batch(seed, rows=6, columns=40, gap=0.1):
    """old, rollout, advantage, mask with garbage in the padding, one empty row and one NaN of the
    sampler.
    """
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (rows, columns))
    rollout = np.minimum(old + gap * rng.normal(size=old.shape), 0.0)
    mask = rng.random(old.shape) < 0.8
    mask[2] = False
    rollout[0, np.argmax(mask[0])] = np.nan
    advantage = np.repeat(rng.normal(size=(rows, 1)), columns, axis=1)
    old, rollout, advantage = (
        np.where(mask, np.float32(x), np.float32(1e4)) for x in (old, rollout, advantage)
    )
    return old, rollout, advantage, mask


def measured(old, rollout, mask):
    valid = mask & np.isfinite(rollout)
    return np.float64(np.where(valid, old, 0)), np.float64(np.where(valid, rollout, 0)), valid


@golden.every_case
def test_golden_metrics(name, case):
    """Every metric of the file. float32 holds log p to 2^-24 |log p| per side, and a difference no
    better.
    """
    file = golden.FILES[name]["cases"][case]
    inputs = file["inputs"]
    old, rollout, advantage, mask = (
        np.float32(inputs[name]) for name in ("old", "roll", "adv", "mask")
    )
    expected = file["metrics"]
    assert set(expected) == set(NAMES)
    actual = jax.jit(diagnostics.summary)(old, rollout, advantage, mask)
    valid = (mask > 0) & np.isfinite(rollout)
    largest = np.abs(np.concatenate([old[valid], rollout[valid], [1.0]])).max()
    for name, value in expected.items():
        np.testing.assert_allclose(
            actual[NAMES[name]], value, rtol=1e-5, atol=2**-23 * largest, err_msg=name
        )


@pytest.mark.parametrize("seed", range(5))
def test_summary_against_numpy(seed):
    old, rollout, advantage, mask = batch(seed)
    a, b, valid = measured(old, rollout, mask)
    x = a[valid]
    y = b[valid]
    d = (a - b)[valid]
    s = np.sign(advantage[valid])
    rows = [r for r in range(len(a)) if valid[r].any()]
    means = np.array([[a[r][valid[r]].mean(), b[r][valid[r]].mean()] for r in rows])
    total = np.array([(a - b)[r].sum() for r in rows])
    ratio = np.exp(d)
    gap = np.abs(np.exp(x) - np.exp(y))
    ppl_gap = means[:, 1] - means[:, 0]
    mix = np.log(0.5 * (np.exp(x) + np.exp(y)))
    k3 = lambda z: np.exp(z) - 1 - z  # noqa: E731
    truncated = np.minimum(ratio, 2.0)
    product = np.exp(total)
    expected = {
        "dropped_tokens": 1,
        "dropped_share": 1 / mask.sum(),
        "prob_diff_mean": gap.mean(),
        "prob_diff_max": gap.max(),
        "prob_diff_std": gap.std(ddof=1),
        "prob_diff_rollout_share": gap[x < y].sum() / gap.sum(),
        "pearson": np.corrcoef(np.exp(x), np.exp(y))[0, 1],
        "logp_diff_mean": np.abs(d).mean(),
        "logp_diff_max": np.abs(d).max(),
        "k1": -d.mean(),
        "k2": (d**2).mean() / 2,
        "k3": k3(d).mean(),
        "m2": (d**2).mean(),
        "js": (k3(x - mix) + k3(y - mix)).mean() / 2,
        "mult_prob_error": np.exp(np.abs(d)).mean(),
        "ratio_out": ((ratio < 0.5) | (ratio > 2)).mean(),
        "train_ppl": np.exp(-means[:, 0]).mean(),
        "rollout_ppl": np.exp(-means[:, 1]).mean(),
        "ppl_ratio": np.exp(ppl_gap).mean(),
        "log_ppl_diff": ppl_gap.mean(),
        "log_ppl_diff_abs": np.abs(ppl_gap).mean(),
        "log_ppl_diff_max": ppl_gap.max(),
        "log_ppl_diff_min": ppl_gap.min(),
        "chi2_token": (ratio**2).mean() - 1,
        "chi2_sequence": (product**2).mean() - 1,
        "ess_token": truncated.sum() ** 2 / (truncated**2).sum() / len(d),
        "ess_sequence": product.sum() ** 2 / (product**2).sum() / len(rows),
        "advantage_skew": (s * d).mean(),
    }
    actual = jax.jit(diagnostics.summary)(old, rollout, advantage, mask)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == jnp.float32 and actual[name].shape == ()
        np.testing.assert_allclose(actual[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_mean_gap_is_the_constrained_quantity():
    old, rollout, _, mask = batch(9)
    gap_sum, count = constraint.measure(old, rollout, mask)
    np.testing.assert_allclose(
        diagnostics.prob_diff(old, rollout, mask)["prob_diff_mean"], gap_sum / count, rtol=1e-6
    )


def test_staleness_splits_the_gap():
    """A sampler off by noise alone shows in numerics, a policy moved by 0.3 nats in staleness."""
    old, rollout, advantage, mask = batch(1)
    logp = np.float32(old + 0.3)
    a, b, valid = measured(old, rollout, mask)
    result = diagnostics.summary(old, rollout, advantage, mask, logp=logp)
    np.testing.assert_allclose(result["gap_numerics"], np.abs(a - b)[valid].mean(), rtol=1e-5)
    np.testing.assert_allclose(result["gap_staleness"], 0.3, rtol=1e-4)
    np.testing.assert_allclose(result["gap_total"], np.abs(a + 0.3 - b)[valid].mean(), rtol=1e-4)


def test_advantage_skew_sees_what_k1_does_not():
    """Gaps of +0.1 on good tokens and -0.1 on bad ones have mean 0 and skew 0.1."""
    advantage = np.float32([[1.0, -1.0] * 8])
    old = np.float32(-1.0 + 0.1 * advantage)
    rollout = np.full_like(old, -1.0)
    mask = np.ones_like(old, bool)
    result = diagnostics.summary(old, rollout, advantage, mask)
    np.testing.assert_allclose(result["k1"], 0.0, atol=1e-7)
    np.testing.assert_allclose(result["advantage_skew"], 0.1, rtol=1e-5)


@pytest.mark.parametrize("lag", [-1, 0, 1])
def test_shift_finds_the_lag(lag):
    rng = np.random.default_rng(3)
    true = np.float32(-rng.exponential(1.0, (4, 60)))
    old = np.float32(np.roll(true, lag, axis=1) + 0.01 * rng.normal(size=true.shape))
    mask = np.ones_like(true, bool)
    result = jax.jit(diagnostics.shift)(old, true, mask)
    assert result["lag"] == lag
    correlations = [
        result[name] for name in ("correlation_back", "correlation", "correlation_ahead")
    ]
    assert np.argmax(correlations) == lag + 1 and max(correlations) > 0.99


@pytest.mark.parametrize("old, rollout", [(-0.1, -0.1), (-0.3, -0.4), (-0.7 / 30, -3.7)])
def test_constants_are_not_correlated(old, rollout):
    """Rounding of their means is not taken for variation, so that there is no lag."""
    mask = np.ones((16, 37), bool)
    arrays = (np.full(mask.shape, x, np.float32) for x in (old, rollout))
    for name, value in jax.jit(diagnostics.shift)(*arrays, mask).items():
        assert value == 0, name


def test_weight_and_rejected_and_clip_fraction():
    weights = np.float32([[0.25, 1.0, 3.0, 9.0], [1.5, 9.0, 9.0, 9.0]])
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    w = weights[mask]
    result = diagnostics.weight(weights, mask)
    expected = [w.mean(), w.std(), 0.25, 3.0, 0.25, 0.25, w.sum() ** 2 / (4 * (w**2).sum())]
    np.testing.assert_allclose(list(result.values()), expected, rtol=1e-6)
    keep = np.array([[1, 0, 1, 1], [0, 1, 1, 1]], bool)
    result = diagnostics.rejected(keep, mask)
    np.testing.assert_allclose(
        [result["rejected_tokens"], result["rejected_sequences"]], [0.5, 0.5]
    )
    ratio = np.float32([[1.5, 0.5, 1.5, 0.5]])
    advantage = np.float32([[1.0, 1.0, -1.0, -1.0]])
    result = diagnostics.clip_fraction(
        np.log(ratio), np.zeros_like(ratio), advantage, np.ones_like(ratio)
    )
    np.testing.assert_allclose([result["clip_low"], result["clip_high"]], [0.25, 0.25])


def test_sign_flip_by_hand():
    advantage = np.float32([[0.1, -0.1, 0.0, 0.2, 1.0]])
    shaped = np.float32([[-0.1, -0.2, -0.1, 0.1, -1.0]])
    result = diagnostics.sign_flip(advantage, shaped, np.array([[1, 1, 1, 1, 0]], bool))
    np.testing.assert_allclose([result["sign_flip"], result["zero_moved"]], [0.25, 0.25])


def test_support_mass():
    """Against sets drawn by hand; renormalising by it undoes the bias of the ratio."""
    p = np.float32([[[0.5, 0.25, 0.15, 0.1]]])
    mask = np.ones((1, 1), bool)

    def mass(**options):
        return diagnostics.support_mass(np.log(p), mask, **options)[0, 0]

    np.testing.assert_allclose(mass(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(mass(top_k=2), 0.75, rtol=1e-6)
    np.testing.assert_allclose(mass(top_p=0.6), 0.75, rtol=1e-6)
    np.testing.assert_allclose(mass(top_p=0.4), 0.5, rtol=1e-6)
    np.testing.assert_allclose(mass(top_k=3, top_p=0.8), 0.75, rtol=1e-6)
    np.testing.assert_allclose(mass(top_k=2, top_p=0.6), 0.5, rtol=1e-6)
    padded = np.concatenate([np.log(p), np.full_like(p, np.nan)], axis=1)
    np.testing.assert_allclose(
        diagnostics.support_mass(padded, np.array([[True, False]]), top_k=2),
        [[0.75, 1.0]],
        rtol=1e-6,
    )


# ----------------------------------------------------------------------
# tails


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_against_numpy(seed):
    old, _, _, mask = batch(seed)
    actual = jax.jit(tails.quantiles)(old, mask)
    np.testing.assert_allclose(actual, np.quantile(np.float64(old[mask]), tails.LEVELS), rtol=1e-5)
    one = np.zeros_like(mask)
    one[3, 5] = True
    np.testing.assert_allclose(tails.quantiles(old, one), np.full(4, old[3, 5]))
    np.testing.assert_array_equal(tails.quantiles(old, np.zeros_like(mask)), 0)


def test_tail_summary_against_numpy():
    old, rollout, _, mask = batch(4, rows=20, columns=50)
    a, b, valid = measured(old, rollout, mask)
    gap = np.abs(np.exp(a) - np.exp(b))[valid]
    diff = np.abs(a - b)[valid]
    result = jax.jit(tails.summary)(old, rollout, mask)
    for name, level in zip(("p50", "p90", "p99", "p99.9"), tails.LEVELS):
        np.testing.assert_allclose(result[f"delta_{name}"], np.quantile(gap, level), rtol=1e-4)
        np.testing.assert_allclose(result[f"logp_diff_{name}"], np.quantile(diff, level), rtol=1e-4)
    top = np.sort(gap)[-int(np.ceil(0.01 * gap.size)) :]
    np.testing.assert_allclose(result["delta_top_share"], top.sum() / gap.sum(), rtol=1e-5)


def test_top_share_of_one_spike():
    value = np.full((10, 100), 0.001, np.float32)
    value[3, 7] = 9.0
    mask = np.ones_like(value, bool)
    np.testing.assert_allclose(
        tails.top_share(value, mask, fraction=0.001), 9 / (9 + 0.999), rtol=1e-5
    )
    assert tails.top_share(np.zeros_like(value), mask) == 0


def test_buckets():
    """A hole does not count as a token; each bucket's quantiles are those of its tokens."""
    mask = np.array([[1, 1, 0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(tails.position_bucket(mask, edges=(1, 3))[mask], [0, 1, 1, 2, 2])
    rollout = np.log(np.float32([[0.05, 0.3, 0.3, 0.7, 0.95, 1.0]]))
    np.testing.assert_array_equal(tails.probability_bucket(rollout, mask)[mask], [0, 1, 2, 3, 4])
    old, rollout, _, mask = batch(5, rows=20)
    bucket = tails.probability_bucket(rollout, mask)
    valid = mask & np.isfinite(rollout)
    gap = constraint.delta(old, rollout, mask)
    table = tails.quantiles_by_bucket(gap, bucket, valid, num_buckets=5)
    assert table.shape == (5, 4)
    for b in range(5):
        chosen = np.asarray(gap)[valid & (np.asarray(bucket) == b)]
        expected = np.quantile(chosen, tails.LEVELS) if chosen.size else np.zeros(4)
        np.testing.assert_allclose(table[b], expected, rtol=1e-4, atol=1e-7)


def test_worst_tokens_can_be_looked_up():
    """One token of each completion, those of the completions with the largest gaps."""
    old, rollout, _, mask = batch(6)
    a, b, valid = measured(old, rollout, mask)
    gap = np.where(valid, np.abs(np.exp(a) - np.exp(b)), -1.0)
    worst = jax.jit(lambda *x: tails.worst_tokens(*x, k=5))(old, rollout, mask)
    np.testing.assert_allclose(worst.delta, np.sort(gap.max(axis=1))[::-1][:5], rtol=1e-4)
    assert len(set(np.asarray(worst.row))) == 5
    for delta, row, position, o, r in zip(*worst):
        assert valid[row, position] and o == old[row, position] and r == rollout[row, position]
        np.testing.assert_allclose(gap[row].max(), delta, rtol=1e-4)


def test_a_completion_without_measured_tokens_has_no_worst_token():
    old, rollout, _, _ = batch(6)
    mask = np.zeros_like(old, bool)
    mask[0, 1] = True
    worst = tails.worst_tokens(old[:2], rollout[:2], mask[:2], k=16)
    assert worst.delta.shape == (2,) and worst.delta[1] == -1
