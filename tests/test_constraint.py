"""delta, shaping, penalty, controllers and calibration against golden vectors, closed forms and
NumPy in float64.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import constraint
from dcmdp_jax.losses import corrections, diagnostics, policy, reduce
from support import golden

C = 0.0037
SHAPES = (
    constraint.shape_advantage,
    constraint.shape_signed,
    constraint.shape_credit,
    constraint.shape_centred,
    constraint.shape_hinge,
    constraint.shape_cost_to_go,
    constraint.shape_normalised,
)
CONTROLLERS = (
    constraint.projected_ascent,
    constraint.relative_ascent,
    constraint.log_space_ascent,
    constraint.pi,
    constraint.pid,
)


def inputs(file):
    """cur, old, roll, adv, mask in float32."""
    return [np.float32(file["inputs"][name]) for name in ("cur", "old", "roll", "adv", "mask")]


def batch(seed, rows=5, columns=13, gap=0.05):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (rows, columns))
    rollout = np.minimum(old + gap * rng.normal(size=old.shape), 0.0)
    mask = rng.random(old.shape) < 0.8
    advantage = np.repeat(rng.normal(size=(rows, 1)), columns, axis=1)
    return [np.float32(x) for x in (old, rollout, advantage)] + [mask]


def close(actual, expected, atol=0.0):
    np.testing.assert_allclose(np.float64(actual), np.float64(expected), rtol=1e-5, atol=atol)


# Rounding log p to float32 moves p by at most p |log p| 2^-24 <= 2^-24 / e, on each of two sides.
ROUNDING = 2 * 2.0**-24 / np.e


@golden.every_case
def test_golden_block(name, case):
    """delta, its mean, shaping in both orders, the update, and the variants the file has."""
    file = golden.FILES[name]["cases"][case]
    _, old, rollout, advantage, mask = inputs(file)
    expected = file["dc"]
    controller = constraint.projected_ascent(multiplier_init=expected["lambda_applied"])
    before = controller.init()
    gap_sum, count = constraint.measure(old, rollout, mask)
    after = controller.update(before, gap_sum, count, C)
    close(constraint.delta(old, rollout, mask), expected["delta"], ROUNDING)
    close(gap_sum / max(count, 1), expected["delta_bar"], ROUNDING)
    close(before.multiplier, expected["lambda_applied"])
    close(after.multiplier, expected["lambda_next"])
    shaped = functools.partial(constraint.shape_advantage, advantage, old, rollout)
    close(shaped(before.multiplier, C, mask), expected["adv_shaped"])
    close(shaped(after.multiplier, C, mask), expected["adv_shaped_update_first"])
    arguments = (advantage, old, rollout, before.multiplier, C, mask)
    close(constraint.shape_signed(*arguments), expected["adv_signed_variant"])
    close(constraint.shape_normalised(*arguments), expected["adv_normalised_variant"])


@golden.every_case
@pytest.mark.parametrize("entry", ["dcgrpo", "dcgrpo_penalty_variant", "dcgrpo*w_tis_token"])
def test_golden_losses(name, case, entry):
    """Values and gradients of DC-GRPO, with the truncated weight, and of the penalty."""
    file = golden.FILES[name]["cases"][case]
    cur, old, rollout, advantage, mask = inputs(file)
    clipped = functools.partial(policy.clipped, clip_low=0.24, clip_high=0.24)
    multiplier = file["dc"]["lambda_applied"]

    def loss(logp):
        if entry == "dcgrpo_penalty_variant":
            term = constraint.penalty(logp, rollout, mask, multiplier)
            return reduce.token_mean(clipped(logp, old, advantage, mask) + term, mask)
        shaped = constraint.shape_advantage(advantage, old, rollout, multiplier, C, mask)
        correction = corrections.tis() if entry.endswith("tis_token") else None
        per_token, counted = corrections.decoupled(clipped, correction)(
            logp, old, rollout, shaped, mask
        )
        return reduce.token_mean(per_token, counted)

    expected = file["losses"][entry]
    value, gradient = jax.value_and_grad(loss)(cur)
    close(value, expected["value"])
    close(gradient, expected["grad_cur"], atol=1e-8)
    assert not np.any(np.asarray(gradient)[mask == 0])


@pytest.mark.parametrize("distance", [1e-7, 1e-4, 1e-2, 1.0, 30.0])
def test_delta_does_not_cancel(distance):
    """Against float64 where e^a - e^b in float32 would have no digit left."""
    rollout = np.float32([[-1e-6, -0.5, -4.0]])
    old = rollout - np.float32(distance)
    expected = np.abs(np.exp(np.float64(old)) - np.exp(np.float64(rollout)))
    close(constraint.delta(old, rollout, np.ones_like(old)), expected)


def test_delta_gradient():
    """e^a where a >= b, else -e^a; 0 where not measured."""
    old = np.float32([[-1.0, -2.0, -0.7, -3.0, -1.0]])
    rollout = np.float32([[-1.5, -1.0, -0.7, np.nan, -2.0]])
    mask = np.array([[1, 1, 1, 1, 0]], bool)
    by_old, by_rollout = jax.grad(lambda a, b: constraint.delta(a, b, mask).sum(), (0, 1))(
        old, rollout
    )
    close(by_old, [[np.exp(-1.0), -np.exp(-2.0), np.exp(-0.7), 0.0, 0.0]])
    close(by_rollout, [[-np.exp(-1.5), np.exp(-1.0), -np.exp(-0.7), 0.0, 0.0]])


def test_non_finite_rollout_is_dropped():
    old, rollout, advantage, mask = batch(0)
    row, column = np.argwhere(mask)[3]
    for value in (np.nan, np.inf, -np.inf):
        broken = rollout.copy()
        smaller = mask.copy()
        broken[row, column], smaller[row, column] = value, False
        for actual, expected in zip(
            constraint.measure(old, broken, mask), constraint.measure(old, rollout, smaller)
        ):
            close(actual, expected)
        for shape in SHAPES[:-2]:
            assert (
                shape(advantage, old, broken, 0.1, C, mask)[row, column] == advantage[row, column]
            )


def test_variants_closed_forms():
    old, rollout, advantage, mask = batch(1)
    a = np.float64(old)
    b = np.float64(rollout)
    multiplier = 0.3
    signed = np.where(mask, np.exp(a) - np.exp(b), 0.0)
    gap = np.abs(signed)
    to_go = np.flip(np.cumsum(np.flip(gap, 1), 1), 1)
    expected = {
        constraint.shape_advantage: gap,
        constraint.shape_signed: signed,
        constraint.shape_credit: np.minimum(signed, 0.0),
        constraint.shape_centred: gap - gap.sum() / mask.sum(),
        constraint.shape_hinge: np.maximum(gap - 0.01, 0.0),
        constraint.shape_cost_to_go: to_go,
    }
    for shape, cost in expected.items():
        actual = shape(advantage, old, rollout, multiplier, 0.01, mask)
        close(actual, np.where(mask, advantage - multiplier * cost, 0.0), atol=1e-6)
    centred = constraint.shape_centred(advantage, old, rollout, multiplier, C, mask)
    close(reduce.token_sum(centred, mask), (advantage * mask).sum(), atol=1e-5)
    close(
        constraint.shape_normalised(advantage, old, rollout, multiplier, C, mask),
        np.where(mask, advantage - multiplier * gap, 0.0) / (1 + multiplier),
        atol=1e-6,
    )


@pytest.mark.parametrize("shaping", SHAPES)
def test_shapes_share_one_contract(shaping):
    """Multiplier 0 is no change, [N, 1] is [N, T], and no gradient passes."""
    old, rollout, advantage, mask = batch(2)
    close(shaping(advantage, old, rollout, 0.0, C, mask), np.where(mask, advantage, 0.0))
    full = shaping(advantage, old, rollout, 0.2, C, mask)
    np.testing.assert_array_equal(shaping(advantage[:, :1], old, rollout, 0.2, C, mask), full)
    for position in (0, 1, 2):
        arguments = [advantage, old, rollout]

        def total(x):
            return shaping(*arguments[:position], x, *arguments[position + 1 :], 0.2, C, mask).sum()

        assert not np.any(jax.grad(total)(arguments[position]))


def test_bad_arguments_are_named():
    old, rollout, advantage, mask = batch(3)
    with pytest.raises(TypeError, match="rollout_logp is bfloat16"):
        constraint.delta(old, jnp.bfloat16(rollout), mask)
    with pytest.raises(ValueError, match="rollout_logp has shape"):
        constraint.delta(old, rollout[:2], mask)
    with pytest.raises(ValueError, match="mask has shape"):
        constraint.delta(old, rollout, mask[:, :2])
    with pytest.raises(ValueError, match="advantage has shape"):
        constraint.shape_advantage(advantage[:, :3], old, rollout, 0.1, C, mask)


# ------------------------------------------------------------------------------------------------
# controllers


@pytest.mark.parametrize(
    "name, make",
    [
        ("proj_eta1", functools.partial(constraint.projected_ascent, 1.0)),
        ("proj_eta0.5", functools.partial(constraint.projected_ascent, 0.5)),
        (
            "proj_max0.105",
            functools.partial(constraint.projected_ascent, 1.0, multiplier_max=0.105),
        ),
        ("log_space_rel", functools.partial(constraint.log_space_ascent, 0.5)),
        ("pid_antiwindup", functools.partial(constraint.pi, 1.0)),
        ("pid_antiwindup", functools.partial(constraint.pid, 1.0, derivative=0.0)),
    ],
)
@golden.every_file
def test_golden_trajectories(file, name, make):
    """The null entries of the file are empty batches."""
    block = file["controllers"]
    controller = make(multiplier_init=block["lambda0"])
    update = jax.jit(controller.update)
    state = controller.init()
    trajectory = []
    for mean in block["delta_bars_null_is_empty"]:
        state = update(state, *((0.0, 0) if mean is None else (mean * 640, 640)), block["c"])
        trajectory.append(state.multiplier)
    close(trajectory, block[name])


def test_relative_is_projected_at_the_scale_of_c():
    """eta_rel = eta c, and it does not feel a change of unit."""
    absolute = constraint.projected_ascent(1.0)
    relative = constraint.relative_ascent(C)
    a = absolute.init()
    b = relative.init()
    scaled = relative.init()
    for mean in (0.003, 0.02, 0.0001, 0.2):
        a = absolute.update(a, mean, 1, C)
        b = relative.update(b, mean, 1, C)
        scaled = relative.update(scaled, 1000 * mean, 1, 1000 * C)
        close(b.multiplier, a.multiplier)
        close(scaled.multiplier, a.multiplier)


def test_pid_terms_by_hand():
    """One rise and one fall: the derivative acts on the rise alone."""
    controller = constraint.pid(
        0.5, multiplier_init=0.2, proportional=2.0, derivative=3.0, decay=0.5
    )
    # v = 0.04, s = 0.02, no derivative yet
    state = controller.update(controller.init(), 0.05, 1, 0.01)
    close(state.multiplier, 0.22 + 2 * 0.02)
    state = controller.update(state, 0.07, 1, 0.01)  # v = 0.06, s = 0.04, rise 0.02
    close(state.multiplier, 0.25 + 2 * 0.04 + 3 * 0.02)
    state = controller.update(state, 0.01, 1, 0.01)  # v = 0, s = 0.02, a fall
    close(state.multiplier, 0.25 + 2 * 0.02)


@pytest.mark.parametrize("make", CONTROLLERS)
def test_empty_or_broken_batches_change_nothing(make):
    controller = make(dual_lr=0.5, multiplier_init=0.2, multiplier_max=0.9)
    for wrapped in (
        controller,
        constraint.with_ema(controller),
        constraint.with_deadband(controller),
    ):
        update = jax.jit(wrapped.update)
        state = update(wrapped.init(), 0.6, 100, C)
        for gap_sum, count in ((0.0, 0), (np.nan, 100), (np.inf, 100), (5.0, 0)):
            after = update(state, gap_sum, count, C)
            jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("make", CONTROLLERS)
def test_bounds_and_windup(make):
    """A violation that never ends saturates and is counted; one batch within tolerance lets the
    multiplier go.
    """
    controller = make(dual_lr=0.5, multiplier_init=0.2, multiplier_max=0.9)

    def run(state, mean, steps):
        return jax.lax.scan(
            lambda s, _: (controller.update(s, mean, 1, 0.01), None), state, length=steps
        )[0]

    state = run(controller.init(), 0.5, 300)
    assert state.multiplier == np.float32(0.9) and state.saturated > 200
    assert state.multiplier.dtype == jnp.float32 and state.updates == 300
    state = run(state, 0.0, 30)
    assert state.multiplier < 0.9 and state.saturated == 0
    assert 0.0 <= run(state, 0.0, 3000).multiplier <= 1e-5


@pytest.mark.parametrize("make", CONTROLLERS)
def test_scan_keeps_shapes_and_types(make):
    controller = constraint.with_ema(make(dual_lr=0.5, multiplier_init=0.2, multiplier_max=0.9))
    means = jnp.float32([0.1, 0.0, 0.2])
    final, _ = jax.lax.scan(
        lambda s, m: (controller.update(s, m, 1, C), None), controller.init(), means
    )
    looped = controller.init()
    for mean in means:
        looped = controller.update(looped, mean, 1, C)
    jax.tree.map(close, final, looped)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dual_lr": -1.0}, "dual_lr must be"),
        ({"dual_lr": np.nan}, "dual_lr must be"),
        ({"multiplier_init": 2.0}, "multiplier_init <= multiplier_max"),
        ({"multiplier_init": np.nan}, "multiplier_init <= multiplier_max"),
        ({"multiplier_min": -0.1}, "0 <= multiplier_min|multiplier_min > 0"),
    ],
)
@pytest.mark.parametrize("make", CONTROLLERS)
def test_bad_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
    with pytest.raises(ValueError, match="decay"):
        constraint.with_ema(make(), 1.0)
    with pytest.raises(ValueError, match="fraction"):
        constraint.with_deadband(make(), -0.1)


def test_relative_controllers_survive_tolerance_zero():
    for make in (constraint.relative_ascent, constraint.log_space_ascent):
        controller = make()
        assert controller.update(controller.init(), 0.1, 1, 0.0).multiplier == 1.0
        undecided = controller.update(controller.init(), 0.0, 1, 0.0)
        jax.tree.map(np.testing.assert_array_equal, undecided, controller.init())


def test_ema_is_the_unbiased_average():
    """The controller sees sum_i w_i m_i / sum_i w_i with w_i = decay^(k - i)."""
    controller = constraint.with_ema(
        constraint.projected_ascent(1.0, multiplier_init=0.5), decay=0.8
    )
    state = controller.init()
    means = [0.01, 0.05, 0.02, 0.08]
    expected = 0.5
    for k, mean in enumerate(means):
        state = controller.update(state, 10 * mean, 10, C)
        weights = 0.8 ** np.arange(k, -1, -1)
        expected += (weights * means[: k + 1]).sum() / weights.sum() - C
        close(state.multiplier, expected)


def test_deadband():
    controller = constraint.with_deadband(constraint.projected_ascent(1.0), fraction=0.1)
    still = controller.update(controller.init(), 1.09 * C, 1, C)
    assert still.multiplier == np.float32(0.1) and still.updates == 1
    close(controller.update(controller.init(), 1.2 * C, 1, C).multiplier, 0.1 + 0.2 * C)


def test_sums_from_shards_are_the_sum_of_the_batch():
    """A mean of per-device means would differ, since the counts do."""
    old, rollout, _, mask = batch(4, rows=8)
    mask[:3] = False
    parts = [
        constraint.measure(old[i : i + 2], rollout[i : i + 2], mask[i : i + 2])
        for i in range(0, 8, 2)
    ]
    whole = constraint.measure(old, rollout, mask)
    close(sum(part[0] for part in parts), whole[0])
    assert sum(part[1] for part in parts) == whole[1]


@pytest.mark.parametrize("make", CONTROLLERS[:2] + CONTROLLERS[3:])
def test_several_constraints_are_several_controllers(make):
    """Three multipliers as one vector follow the three scalar controllers."""
    tolerances = (0.01, 0.001, 0.02)
    rates = (1.0, 2.0, 0.1)
    starts = (0.1, 0.0, 0.3)
    sums = np.float32([1.3, 0.2, 0.9])
    counts = np.float32([40, 40, 40])
    vector = make(rates, multiplier_init=starts)
    state = vector.init()
    for _ in range(3):
        state = vector.update(state, sums, counts, tolerances)
    for k in range(3):
        single = make(rates[k], multiplier_init=starts[k])
        alone = single.init()
        for _ in range(3):
            alone = single.update(alone, sums[k], counts[k], tolerances[k])
        jax.tree.map(lambda one, all_, k=k: close(one, all_[k]), alone, state)


# ------------------------------------------------------------------------------------------------
# calibration


def test_calibration_with_equal_batches():
    """Floor is the mean, the standard error is std (ddof 1) / sqrt(K)."""
    means = np.float64([0.0030, 0.0034, 0.0031, 0.0037])
    result = constraint.calibrate_tolerance(np.float32(means * 500), np.float32([500] * 4))
    error = means.std(ddof=1) / 2
    close(result.floor, means.mean())
    close(result.std_error, error)
    close(result.tolerance, max(means.mean() * 1.2, means.mean() + 3 * error))
    noisy = constraint.calibrate_tolerance(
        np.float32(means * 500), np.float32([500] * 4), slack=0.0
    )
    close(noisy.tolerance, means.mean() + 3 * error)


def test_calibration_pools_tokens_and_leaves_out_empty_batches():
    sums = np.float32([1.0, 6.0, 0.0, np.nan])
    counts = np.float32([100, 300, 0, 10])
    result = constraint.calibrate_tolerance(sums, counts)
    close(result.floor, 7 / 400)
    weights = np.array([0.25, 0.75])
    means = np.array([0.01, 0.02])
    close(result.std_error, np.sqrt(2 * ((weights * (means - 7 / 400)) ** 2).sum()))
    assert result.batches == 2
    empty = constraint.calibrate_tolerance(np.zeros(3, np.float32), np.zeros(3, np.float32))
    assert all(value == 0 for value in empty)


def test_calibration_standard_error_covers_the_truth():
    """Over many repetitions with unequal batches, 3 standard errors hold the true floor nearly
    always, 1/3 rarely.
    """
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 400, size=(300, 16))
    sums = np.array([[rng.exponential(0.004, size=n).sum() for n in row] for row in counts])
    result = jax.vmap(constraint.calibrate_tolerance)(np.float32(sums), np.float32(counts))
    miss = np.abs(np.asarray(result.floor) - 0.004) / np.asarray(result.std_error)
    assert (miss <= 3).sum() >= 290 and (miss <= 1 / 3).sum() <= 120


def test_calibration_refuses_what_is_no_set_of_batches():
    with pytest.raises(ValueError, match="K >= 2"):
        constraint.calibrate_tolerance(np.float32([1.0]), np.float32([10.0]))
    with pytest.raises(ValueError, match="K >= 2"):
        constraint.calibrate_tolerance(np.float32([1.0, 2.0]), np.float32([10.0]))


def test_floor_is_what_lr_zero_measures():
    """A multiplier run at the calibrated tolerance decays; at half the floor it climbs to its bound
    and stays.
    """
    batches = [constraint.measure(*batch(seed)[:2], batch(seed)[3]) for seed in range(8)]
    sums, counts = (jnp.stack(column) for column in zip(*batches))
    result = constraint.calibrate_tolerance(sums, counts)
    controller = constraint.projected_ascent(20.0, multiplier_max=1.0)
    met = controller.init()
    missed = controller.init()
    update = jax.jit(controller.update)
    for gap_sum, count in batches * 20:
        met = update(met, gap_sum, count, result.tolerance)
        missed = update(missed, gap_sum, count, result.floor / 2)
    assert met.multiplier < 0.1 and missed.multiplier == 1.0 and missed.saturated > 20


def test_shaping_changes_the_sign_it_reports():
    old, rollout, _, mask = batch(7)
    advantage = np.full_like(old, 1e-4)
    shaped = constraint.shape_advantage(advantage, old, rollout, 1.0, C, mask)
    gap = np.asarray(constraint.delta(old, rollout, mask))
    close(diagnostics.sign_flip(advantage, shaped, mask)["sign_flip"], (gap[mask] > 1e-4).mean())


def test_import_is_light():
    """A fresh interpreter: none of the heavy packages, and no device is touched."""
    code = (
        "import sys, dcmdp_jax.losses, dcmdp_jax.constraint\n"
        "heavy = {'flax', 'orbax', 'grain', 'tensorflow', 'torch', 'transformers', "
        "'jetstream', 'tokenizers'}\n"
        "found = heavy & {name.split('.')[0] for name in sys.modules}\n"
        "from jax._src import xla_bridge\n"
        "assert not found, found\n"
        "assert not xla_bridge._backends, 'a device was initialised at import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
