"""Corrections, rejections and surrogates against NumPy, and what a surrogate refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.losses import corrections, kl, operators, policy, reduce, rejection, sequence

N = 6
T = 11
partial = functools.partial


def batch(seed: int = 0, spread: float = 0.5) -> dict[str, np.ndarray]:
    """Row 2 is empty; padding holds garbage; (0, first token) and (3, first token) were not
    measured.
    """
    rng = np.random.default_rng(seed)
    old_logp = -rng.exponential(1.0, (N, T))
    rollout_logp = np.minimum(old_logp + spread * rng.standard_normal((N, T)), -1e-3)
    logp = old_logp + 0.1 * rng.standard_normal((N, T))
    mask = rng.random((N, T)) < 0.7
    mask[2] = False
    for x, garbage in ((logp, np.nan), (old_logp, 1e4), (rollout_logp, -1e4)):
        x[~mask] = garbage
    rollout_logp[0, np.argmax(mask[0])] = np.nan
    rollout_logp[3, np.argmax(mask[3])] = -np.inf
    advantage = rng.standard_normal((N, 1))
    arrays = dict(logp=logp, old_logp=old_logp, rollout_logp=rollout_logp, advantage=advantage)
    return {name: x.astype(np.float32) for name, x in arrays.items()} | {"mask": mask}


def gap(x) -> tuple[np.ndarray, np.ndarray]:
    """D in float64, 0 where not measured, and the tokens where it was."""
    measured = x["mask"] & np.isfinite(x["rollout_logp"])
    difference = np.zeros((N, T))
    difference[measured] = np.float64(x["old_logp"][measured]) - np.float64(
        x["rollout_logp"][measured]
    )
    return difference, measured


def pair(x) -> tuple[np.ndarray, ...]:
    return x["old_logp"], x["rollout_logp"], x["mask"]


def ratios(x) -> dict:
    difference, measured = gap(x)
    rows = difference.sum(1, keepdims=True)
    mean = rows / np.maximum(measured.sum(1, keepdims=True), 1)
    one = np.ones((1, T))
    return {
        operators.token: np.exp(difference),
        operators.sequence: np.exp(rows) * one,
        operators.geometric: np.exp(mean) * one,
    }


@pytest.mark.parametrize("level", [operators.token, operators.sequence, operators.geometric])
@pytest.mark.parametrize(
    "operator, low, high, weight, keep",
    [
        (operators.truncate, None, 1.2, lambda r: np.minimum(r, 1.2), lambda r: r > 0),
        (operators.clip, 0.8, 1.2, lambda r: np.clip(r, 0.8, 1.2), lambda r: r > 0),
        (operators.keep_inside, 0.8, 1.2, lambda r: r, lambda r: (r >= 0.8) & (r <= 1.2)),
        (operators.keep_inside, None, 1.2, lambda r: r, lambda r: r <= 1.2),
        (operators.zero_outside, 0.8, None, lambda r: r * (r >= 0.8), lambda r: r > 0),
        (operators.reject, 0.8, 1.2, lambda r: 1 + 0 * r, lambda r: (r >= 0.8) & (r <= 1.2)),
    ],
)
def test_level_times_operator(level, operator, low, high, weight, keep):
    x = batch(spread=0.15)
    ratio = ratios(x)[level]
    weights, kept = corrections.Correction(level, operator, low, high).weights(*pair(x))
    np.testing.assert_array_equal(kept, x["mask"] & keep(ratio))
    np.testing.assert_allclose(weights, np.where(kept, weight(ratio), 0), rtol=1e-5)
    assert kept.sum() > 0 and weights.dtype == jnp.float32


def test_unmeasured_tokens_count_as_without_gap():
    x = batch()
    weights, keep = corrections.icepop(0.9, 1.1).weights(*pair(x))
    unmeasured = x["mask"] & ~gap(x)[1]
    assert unmeasured.sum() == 2
    assert np.all(np.asarray(weights)[unmeasured] == 1) and np.all(np.asarray(keep)[unmeasured])


def test_weights_carry_no_gradient():
    x = batch()

    def total(old_logp, rollout_logp):
        return corrections.sequence_tis(5.0).weights(old_logp, rollout_logp, x["mask"])[0].sum()

    for gradient in jax.grad(total, argnums=(0, 1))(x["old_logp"], x["rollout_logp"]):
        assert np.all(np.asarray(gradient) == 0)


def test_a_correction_prints_its_formula():
    gap_text = "D_t = old_logp_t - rollout_logp_t, 0 where rollout_logp_t is not finite"
    ratio = "R_t = exp(clip(D_t, -20, 20))"
    assert str(corrections.tis(2.0)) == f"w_t = min(R_t, 2); {ratio}; {gap_text}; denominator = m"
    assert str(corrections.icepop()).startswith(f"w_t = R_t 1[0.5 <= R_t <= 5]; {ratio}")
    assert str(corrections.sequence_mis()).startswith(
        "w_t = R_t, keep_t = 0 <= R_t <= 3; R_t = exp(clip(sum_s D_s, -20, 20))"
    )
    shrinking = corrections.geometric_mask(denominator=corrections.surviving)
    assert str(shrinking).startswith(
        "w_t = 1, keep_t = 0.99 <= R_t <= 1.01; R_t = exp(mean_s clip(D_s, -20, 20))"
    )
    assert str(shrinking).endswith("denominator = m keep")
    assert repr(shrinking) == "Correction(geometric, reject, low=0.99, high=1.01, surviving)"


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            dict(level="token", high=2.0),
            TypeError,
            "level must be a function such as corrections.token",
        ),
        (dict(operator="truncate", high=2.0), TypeError, "operator must be a function"),
        (dict(high=None), ValueError, "truncate needs high"),
        (dict(low=0.5, high=2.0), ValueError, "truncate reads no lower bound"),
        (dict(operator=corrections.clip, high=2.0), ValueError, "clip needs both low and high"),
        (dict(operator=corrections.reject), ValueError, "needs low, high or both"),
        (dict(operator=corrections.reject, low=2.0, high=0.5), ValueError, "0 <= low <= high"),
        (
            dict(high=2.0, denominator=corrections.surviving),
            ValueError,
            "truncate rejects no token",
        ),
    ],
)
def test_what_a_correction_refuses(options, error, message):
    with pytest.raises(error, match=message):
        corrections.Correction(**options)


def test_records_and_surrogates_hash_compare_and_read_well():
    assert corrections.tis(2.0) == corrections.tis(2.0) != corrections.tis(3.0)
    first = corrections.decoupled(
        policy.clipped, corrections.tis(2.0), rejections=(rejection.veto,)
    )
    again = corrections.decoupled(policy.clipped, corrections.tis(2.0), rejections=[rejection.veto])
    assert first == again and hash(first) == hash(again)
    loss = partial(policy.clipped, clip_high=0.28)
    assert repr(corrections.bypass(loss)) == "bypass(clipped(clip_high=0.28))"
    strict = partial(rejection.k3, high=0.01)
    text = repr(
        corrections.decoupled(loss, rejections=(strict,), denominator=corrections.surviving)
    )
    assert (
        text
        == "decoupled(clipped(clip_high=0.28), rejections=(k3(high=0.01),), denominator=surviving)"
    )


def test_the_factor_is_not_applied_twice():
    tis = corrections.tis(2.0)
    with pytest.raises(TypeError):
        corrections.bypass(policy.clipped, tis)
    with pytest.raises(
        TypeError, match="a correction carries a weight, which belongs to decoupled, once"
    ):
        corrections.bypass(policy.clipped, rejections=(tis,))
    with pytest.raises(TypeError, match="a correction carries a weight"):
        corrections.decoupled(policy.clipped, tis, rejections=(corrections.sequence_tis(),))
    with pytest.raises(TypeError, match="correction must be one Correction or None"):
        corrections.decoupled(policy.clipped, (tis, tis))
    for made in (corrections.decoupled(policy.clipped), corrections.bypass(policy.clipped)):
        with pytest.raises(TypeError, match="loss must be a function of"):
            corrections.decoupled(made, tis)


def finite(x) -> dict:
    return x | {
        "rollout_logp": np.where(np.isfinite(x["rollout_logp"]), x["rollout_logp"], x["old_logp"])
    }


def test_decoupled_multiplies_once_and_bypass_changes_the_anchor():
    x = finite(batch())
    loss, denominator = corrections.decoupled(policy.clipped, corrections.tis(1.1))(**x)
    weights, _ = corrections.tis(1.1).weights(*pair(x))
    np.testing.assert_array_equal(denominator, x["mask"])
    plain = policy.clipped(x["logp"], x["old_logp"], x["advantage"], x["mask"])
    np.testing.assert_allclose(loss, plain * weights, rtol=1e-6)
    loss, denominator = corrections.bypass(policy.clipped)(**x)
    np.testing.assert_array_equal(denominator, x["mask"])
    anchored = policy.clipped(x["logp"], x["rollout_logp"], x["advantage"], x["mask"])
    np.testing.assert_array_equal(loss, anchored)


def test_decoupled_and_bypass_agree_without_truncation():
    """w(rho) r = e: the unclipped surrogate and its gradient are the same numbers either way."""
    x = finite(batch(spread=0.2))
    loss = partial(policy.clipped, clip_low=1.0, clip_high=1e6)
    rest = {name: value for name, value in x.items() if name != "logp"}

    def total(surrogate, logp):
        return reduce.token_mean(*surrogate(logp, **rest))

    weighted = corrections.decoupled(loss, corrections.tis(1e9))
    for first, second in zip(
        jax.value_and_grad(partial(total, weighted))(x["logp"]),
        jax.value_and_grad(partial(total, corrections.bypass(loss)))(x["logp"]),
    ):
        np.testing.assert_allclose(first, second, rtol=2e-5, atol=1e-7)


def test_bypass_gives_unmeasured_tokens_no_gradient_and_counts_them():
    x = batch()
    surrogate = corrections.bypass(policy.clipped)
    rest = {name: value for name, value in x.items() if name != "logp"}
    loss, denominator = surrogate(**x)
    gradient = jax.grad(lambda logp: surrogate(logp, **rest)[0].sum())(x["logp"])
    unmeasured = x["mask"] & ~gap(x)[1]
    np.testing.assert_array_equal(denominator, x["mask"])
    assert np.all(np.asarray(loss)[unmeasured] == 0) and np.all(
        np.asarray(gradient)[unmeasured] == 0
    )
    assert np.all(np.isfinite(loss)) and np.all(np.isfinite(gradient))
    of_row, _ = corrections.bypass(sequence.gspo)(**x)
    expected = sequence.gspo(x["logp"], x["rollout_logp"], x["advantage"], gap(x)[1])
    np.testing.assert_array_equal(of_row, expected)


def test_denominators_of_correction_and_rejections():
    x = batch()
    correction_keep = corrections.mis(0.8, 1.25).weights(*pair(x))[1]
    rejection_keep = rejection.k3(*pair(x), high=0.05)
    both = np.asarray(correction_keep & rejection_keep)
    for of_correction in (corrections.original, corrections.surviving):
        for of_rejections in (corrections.original, corrections.surviving):
            mis = corrections.mis(0.8, 1.25, denominator=of_correction)
            strict = (partial(rejection.k3, high=0.05),)
            made = corrections.decoupled(
                policy.clipped, mis, rejections=strict, denominator=of_rejections
            )
            loss, denominator = made(**x)
            expected = x["mask"] & (correction_keep | (of_correction is corrections.original))
            expected = np.asarray(expected & (both | (of_rejections is corrections.original)))
            np.testing.assert_array_equal(denominator, expected)
            assert np.all(np.asarray(loss)[~both] == 0) and np.all(np.asarray(loss)[both] != 0)


REDUCERS = (
    *(
        reduce.token_mean,
        reduce.token_sum,
        reduce.sequence_mean_token_mean,
        reduce.sequence_mean_token_sum,
    ),
    partial(reduce.constant, normalizer=3.0),
)


@pytest.mark.parametrize("denominator", [corrections.original, corrections.surviving])
def test_a_batch_rejected_as_a_whole_is_zero(denominator):
    x = batch()

    def nothing(old_logp, rollout_logp, mask):
        return jnp.zeros(mask.shape, bool)

    for build in (corrections.decoupled, corrections.bypass):
        made = build(sequence.gspo, rejections=(nothing,), denominator=denominator)
        rest = {name: value for name, value in x.items() if name != "logp"}
        for reducer in REDUCERS:
            value, gradient = jax.value_and_grad(lambda logp: reducer(*made(logp, **rest)))(
                x["logp"]
            )
            assert value == 0 and np.all(np.asarray(gradient) == 0)


LEVELS = {
    rejection.each_token: lambda k, m: k,
    rejection.sequence_sum: lambda k, m: k.sum(1, keepdims=True),
    rejection.sequence_mean: lambda k, m: (
        k.sum(1, keepdims=True) / np.maximum(m.sum(1, keepdims=True), 1)
    ),
    rejection.sequence_max: lambda k, m: np.where(m, k, -np.inf).max(
        1, keepdims=True, initial=-np.inf
    ),
}


@pytest.mark.parametrize("level", LEVELS)
def test_k_rejections(level):
    x = batch(spread=0.3)
    d, measured = gap(x)
    aggregate = LEVELS[level]
    pairs = pair(x)
    log_ratio = aggregate(d, measured)
    inside = (np.exp(log_ratio) <= 1.3) & (
        (np.exp(log_ratio) >= 0.8) | ~measured.any(1, keepdims=True)
    )
    keep = {
        rejection.k1: (dict(low=0.8, high=1.3), inside),
        rejection.k2: (dict(high=0.05), aggregate(d**2 / 2, measured) <= 0.05),
        rejection.k3: (dict(high=0.05), aggregate(np.exp(d) - 1 - d, measured) <= 0.05),
    }
    for function, (options, expected) in keep.items():
        computed = function(*pairs, level=level, **options)
        np.testing.assert_array_equal(computed, x["mask"] & expected, err_msg=function.__name__)


def test_trust_region_veto_ipo_kpop():
    x = batch(spread=0.6)
    d, measured = gap(x)
    p = np.ones((N, T))
    q = np.ones((N, T))
    p[measured] = np.exp(np.float64(x["old_logp"][measured]))
    q[measured] = np.exp(np.float64(x["rollout_logp"][measured]))

    def binary(a, b):
        return a * np.log(a / b) + (1 - a) * np.log((1 - a + 1e-8) / (1 - b + 1e-8))

    cases = {
        "trust_region": (dict(threshold=1.0), (np.exp(d) - 1 - d).max(1, keepdims=True) <= 1.0),
        "veto": (dict(threshold=0.5), d.min(1, keepdims=True) >= np.log(0.5)),
        "ipo": (dict(threshold=0.2), np.abs(p - q) <= 0.2),
        "kpop": (dict(threshold=0.1), np.maximum(binary(p, q), binary(q, p)) <= 0.1),
    }
    for name, (options, expected) in cases.items():
        keep = np.asarray(getattr(rejection, name)(*pair(x), **options))
        np.testing.assert_array_equal(keep, x["mask"] & expected, err_msg=name)
        assert 0 < keep.sum() < x["mask"].sum(), name


def test_kpop_looks_both_ways():
    rare = np.log(np.float32([[1e-3]]))
    common = np.log(np.float32([[0.3]]))  # 0.35 nats one way, 1.5 the other
    for pair_of_engines in ((rare, common), (common, rare)):
        keep = [
            bool(rejection.kpop(*pair_of_engines, np.ones((1, 1), bool), threshold=t)[0, 0])
            for t in (0.75, 2.0)
        ]
        assert keep == [False, True]


def test_a_token_that_both_programs_find_certain_is_kept_by_kpop():
    """Compiled: 1 - 1 + 1e-8 over itself, 0 / 0 in float32 where a compiler folds constants."""
    certain = np.zeros((1, 1), np.float32)
    assert jax.jit(partial(rejection.kpop, threshold=0.02))(
        certain, certain, np.ones((1, 1), bool)
    )[0, 0]


def m2po_by_sorting(square: np.ndarray, threshold: float) -> np.ndarray:
    """Drops the greatest values until the mean of the rest is below the threshold; keeps at least
    one.
    """
    values, count = np.unique(square, return_counts=True)
    fits = np.flatnonzero(np.cumsum(values * count) / np.cumsum(count) < threshold)
    return square <= values[fits[-1] if fits.size else 0]


@pytest.mark.full
@pytest.mark.parametrize("threshold", [1e-9, 1e-3, 0.02, 0.04, 0.3, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_m2po_is_the_greedy_prefix(seed, threshold):
    x = batch(seed, spread=0.4)
    d, measured = gap(x)
    keep = np.asarray(jax.jit(partial(rejection.m2po, threshold=threshold))(*pair(x)))
    np.testing.assert_array_equal(keep[measured], m2po_by_sorting(d[measured] ** 2, threshold))
    assert np.all(keep[x["mask"] & ~measured]) and not keep[~x["mask"]].any()


def spread_of(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Log ratios of many tokens; the last kind ties thousands of them."""
    match kind:
        case "normal":
            return rng.normal(0, 0.07, shape)
        case "heavy":
            return 0.02 * rng.standard_t(2, shape)
        case "later":
            return rng.normal(0, 0.01, shape) * np.linspace(0.1, 10, shape[1])
        case "ties":
            return rng.integers(-3, 4, shape) / 16


@pytest.mark.parametrize("share", [0.01, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["normal", "heavy", "later", "ties"])
def test_m2po_of_a_large_batch(kind, share):
    """The threshold is a share of the mean square, so that some are dropped."""
    shape = (128, 512)
    rng = np.random.default_rng(5)
    rollout_logp = -rng.integers(1, 99, shape).astype(np.float32)
    old_logp = np.float32(rollout_logp + spread_of(kind, rng, shape))
    mask = np.arange(shape[1]) < rng.integers(99, shape[1] + 1, (shape[0], 1))
    square = np.square(np.float64(old_logp) - rollout_logp)[mask]
    threshold = share * square.mean()
    keep = np.asarray(rejection.m2po(old_logp, rollout_logp, mask, threshold=threshold))
    np.testing.assert_array_equal(keep[mask], m2po_by_sorting(square, threshold))
    assert 0 < keep.sum() < mask.sum() and not keep[~mask].any()


def test_m2po_of_equal_and_of_no_tokens():
    x = batch()
    assert np.array_equal(rejection.m2po(x["old_logp"], x["old_logp"], x["mask"]), x["mask"])
    assert not np.asarray(
        rejection.m2po(x["old_logp"], x["rollout_logp"], np.zeros((N, T), bool))
    ).any()


def test_opsm_drops_bad_completions_the_policy_left():
    x = batch(spread=1.0)
    measured = gap(x)[1]
    moved = np.zeros((N, T))
    moved[measured] = np.float64(x["rollout_logp"][measured]) - np.float64(x["logp"][measured])
    mean = moved.sum(1, keepdims=True) / np.maximum(measured.sum(1, keepdims=True), 1)
    keep = np.asarray(
        rejection.opsm(x["logp"], x["rollout_logp"], x["advantage"], x["mask"], threshold=0.02)
    )
    np.testing.assert_array_equal(keep, x["mask"] & ((x["advantage"] >= 0) | (mean <= 0.02)))
    assert 0 < keep.sum() < x["mask"].sum()


def test_rejection_bounds():
    x = batch()
    with pytest.raises(ValueError, match="0 <= low <= high"):
        rejection.k1(*pair(x), low=2.0, high=1.0)
    with pytest.raises(ValueError, match="threshold must be above zero"):
        rejection.veto(*pair(x), threshold=0.0)
    with pytest.raises(ValueError, match="threshold must be above zero"):
        rejection.m2po(*pair(x), threshold=0.0)


def test_batch_normalize_and_blend():
    x = batch()
    weights, _ = corrections.tis(1.5).weights(*pair(x))
    normal = corrections.batch_normalize(weights, x["mask"])
    np.testing.assert_allclose(reduce.token_mean(normal, x["mask"]), 1, rtol=1e-6)
    np.testing.assert_allclose(normal / normal[0, np.argmax(x["mask"][0])], weights, rtol=1e-6)
    shared = corrections.batch_normalize(weights, x["mask"], mean=jnp.float32(0.5))
    np.testing.assert_allclose(shared, weights / 0.5, rtol=1e-6)
    nothing = corrections.batch_normalize(jnp.zeros_like(weights), x["mask"])
    np.testing.assert_array_equal(nothing, 0)
    np.testing.assert_array_equal(corrections.blend(weights, x["mask"], alpha=0.0), x["mask"])
    np.testing.assert_allclose(corrections.blend(weights, x["mask"], alpha=1.0), weights)
    half = corrections.blend(weights, x["mask"], alpha=0.5)
    np.testing.assert_allclose(half, np.where(x["mask"], 0.5 + 0.5 * weights, 0), rtol=1e-6)


@pytest.mark.full
def test_float32_stays_float32_where_float64_is_enabled():
    x = batch()
    rejections = (
        rejection.m2po,
        rejection.kpop,
        rejection.ipo,
        rejection.veto,
        partial(rejection.k3, high=0.05),
    )
    for correction in (
        corrections.tis(),
        corrections.sequence_mis(),
        corrections.geometric_mask(0.8, 1.2),
    ):
        made = corrections.decoupled(policy.clipped, correction, rejections=rejections)
        expected, kept = made(**x)
        with jax.enable_x64(True):
            loss, denominator = made(**x)
        assert loss.dtype == jnp.float32
        np.testing.assert_array_equal(loss, expected)
        np.testing.assert_array_equal(denominator, kept)


def test_kl_estimates_have_the_expectations_they_claim():
    """Over all tokens, so that means are exact sums: values, and gradients by the logits."""
    rng = np.random.default_rng(0)
    logits, reference, behaviour = (
        jnp.asarray(rng.standard_normal(7), jnp.float32) for _ in range(3)
    )
    ref_logp = jax.nn.log_softmax(reference)
    old_logp = jax.nn.log_softmax(behaviour)
    mask = np.ones(7, bool)

    def forward(z):
        logp = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(logp) * (logp - ref_logp))

    def backward(z):
        return jnp.sum(jnp.exp(ref_logp) * (ref_logp - jax.nn.log_softmax(z)))

    def sampled(estimate, z, weights):
        return jnp.sum(weights * estimate(jax.nn.log_softmax(z)))

    p = jnp.exp(jax.nn.log_softmax(logits))
    k1, k2, k3, straight = (
        lambda x, f=f: f(x, ref_logp, mask) for f in (kl.k1, kl.k2, kl.k3, kl.k3_k2_gradient)
    )
    for estimate in (k1, k3, straight):
        np.testing.assert_allclose(sampled(estimate, logits, p), forward(logits), rtol=1e-5)
    gradients = {
        f: jax.grad(lambda z, f=f: sampled(f, z, p))(logits) for f in (k1, k2, k3, straight)
    }
    np.testing.assert_allclose(gradients[k1], np.zeros(7), atol=1e-6)
    np.testing.assert_allclose(gradients[k2], jax.grad(forward)(logits), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[straight], gradients[k2], rtol=1e-6)
    np.testing.assert_allclose(gradients[k3], jax.grad(backward)(logits), rtol=1e-4, atol=1e-6)
    unbiased = lambda x: kl.unbiased(x, old_logp, ref_logp, mask)  # noqa: E731
    q = jnp.exp(old_logp)
    np.testing.assert_allclose(sampled(unbiased, logits, q), forward(logits), rtol=1e-5)
    gradient = jax.grad(lambda z: sampled(unbiased, z, q))(logits)
    np.testing.assert_allclose(gradient, jax.grad(forward)(logits), rtol=1e-4, atol=1e-6)


def test_k3_keeps_its_digits_near_equality():
    logp = np.full((1, 4), -1.0, np.float32)
    ref_logp = logp + np.array([[2.0**-12, -(2.0**-10), 2.0**-6, 0.5]], np.float32)
    x = np.float64(ref_logp) - np.float64(logp)
    expected = np.expm1(x) - x
    expected[np.abs(x) < 0.01] = (x**2 / 2 + x**3 / 6 + x**4 / 24)[np.abs(x) < 0.01]
    np.testing.assert_allclose(kl.k3(logp, ref_logp, np.ones((1, 4), bool)), expected, rtol=1e-6)
    bounded = kl.k3(logp, ref_logp, np.ones((1, 4), bool), value_max=0.01)
    np.testing.assert_allclose(bounded, np.minimum(expected, 0.01), rtol=1e-6)


@pytest.mark.parametrize("excess", [0.0, 1e-8, 1e-6])
def test_a_certain_token_that_rounding_leaves_above_0_is_kept(excess):
    certain = np.full((2, 3), excess, np.float32)
    mask = np.ones((2, 3), bool)
    for one, other in ((certain, certain), (certain, -certain), (-certain, certain)):
        assert rejection.kpop(one, other, mask).all()


@pytest.mark.parametrize("distance", [21.0, 1e9, np.inf])
def test_a_bounded_k3_never_leads_away_from_a_far_reference(distance):
    """Its slope is 0 beyond the bound, as verl's."""
    reference = np.zeros((1, 1), np.float32)
    logp = reference - np.float32(distance)
    mask = np.ones((1, 1), bool)
    bounded = partial(kl.k3, value_max=10.0)
    value, slope = jax.value_and_grad(lambda x: bounded(x, reference, mask)[0, 0])(logp)
    assert value == 10 and slope[0, 0] == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda x: rejection.veto(*pair(x), threshold=1e-10),
        lambda x: rejection.k1(*pair(x), low=0.5, high=1e9),
    ],
)
def test_a_bound_that_would_reject_nothing_is_refused(make):
    with pytest.raises(ValueError, match="would reject nothing: log ratios are clamped to"):
        make(batch())
