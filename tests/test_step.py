"""The compiled step against a plain computation on separate rows, and what it must keep when things
go wrong.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dcmdp_jax import (
    compiled_step,
    constraint,
    objective,
    sharding,
    step,
    train_state,
    trainer_scores,
)
from dcmdp_jax.losses import advantages, corrections, diagnostics, kl, reduce, rejection
from dcmdp_jax.tokens import packing
from support.steps import (
    CLIPPED,
    MODEL,
    MOE,
    ONE,
    TOLERANCE,
    B,
    G,
    T,
    assert_close,
    cached_step,
    fresh_state,
    make_config,
    make_params,
    make_scored,
    row_logp,
    run,
)

pytestmark = pytest.mark.full


def plain_step(scored, model, multiplier=0.1):
    """The step's definition for one minibatch, written out: loss, mean delta and new parameters."""
    rollout = scored.rollout
    params = make_params(model)
    mask = np.arange(T) < rollout.lengths[:, None]
    reward = scored.reward.reshape(B, G)
    advantage = (
        (reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True, ddof=1) + 1e-6)
    ).reshape(-1, 1)
    old = row_logp(params, model, scored)
    old = np.asarray(old)
    delta = np.abs(np.exp(old) - np.exp(rollout.rollout_logp))
    shaped = advantage - multiplier * delta

    def loss_fn(params):
        ratio = jnp.exp(row_logp(params, model, scored) - old)
        loss = jnp.maximum(-ratio * shaped, -jnp.clip(ratio, 0.8, 1.24) * shaped)
        return jnp.sum(jnp.where(mask, loss, 0)) / mask.sum()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.0)
    )

    def apply(params, grads):
        return optax.apply_updates(
            params, optimizer.update(grads, optimizer.init(params), params)[0]
        )

    return loss, delta[mask].mean(), jax.jit(apply)(params, grads)


@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "moe"])
def test_one_update_is_the_definition(model):
    """Packed rows, gathered log-probs and the reducer's weights give what separate rows and a plain
    mean give.
    """
    scored = make_scored()
    loss, delta, params = plain_step(scored, model)
    _, state, metrics = run(make_config(model), scored)
    assert abs(metrics["loss"] - loss) < 1e-6 and abs(metrics["delta_mean"] - delta) < 1e-6
    assert_close(state.params, params)
    assert metrics["multiplier"] == np.float32(0.1) and state.step == 1 and state.skipped == 0
    assert abs(state.dual.multiplier - np.clip(0.1 + (delta - TOLERANCE), 0, 1)) < 1e-6


@pytest.mark.parametrize("parts", [{}, {"minibatches": 2, "microbatches": 2}])
def test_a_penalty_takes_the_duals_multiplier(parts):
    """It is the loss of a surrogate that adds the term with that multiplier; the advantages stay as
    they are.
    """

    def with_term(*arrays, clipped=corrections.decoupled(CLIPPED)):
        loss, denominator = clipped(*arrays)
        return loss + constraint.penalty(arrays[0], arrays[2], arrays[4], 0.3), denominator

    config = make_config(**parts)
    scored = make_scored()
    penalised = dataclasses.replace(
        config.constraint, shaping=None, penalty=constraint.penalty, multiplier_init=0.3
    )
    _, state, metrics = run(dataclasses.replace(config, constraint=penalised), scored)
    plain = dataclasses.replace(config.constraint, multiplier_init=0.0)
    expected = dataclasses.replace(make_config(surrogate=with_term, **parts), constraint=plain)
    _, wanted, _ = run(expected, scored)
    assert_close(state.params, wanted.params, 1e-6)
    assert metrics["sign_flip"] == 0 and metrics["multiplier"] == np.float32(0.3)
    assert state.dual.multiplier != metrics["multiplier"], "the dual moves it"
    _, without, _ = run(dataclasses.replace(config, constraint=plain), scored)
    assert np.abs(state.params["embed"] - without.params["embed"]).max() > 1e-4, "the term acts"


@pytest.mark.parametrize(
    "microbatches, surrogate",
    [
        (2, None),
        (4, None),
        (
            4,
            corrections.decoupled(
                CLIPPED, rejections=(functools.partial(rejection.m2po, threshold=0.2),)
            ),
        ),
    ],
    ids=["2", "4", "4, a cut through the whole batch"],
)
def test_accumulation_does_not_change_the_update(microbatches, surrogate):
    """Ragged microbatches weigh by their tokens, not alike."""
    of = functools.partial(make_config, surrogate=surrogate) if surrogate else make_config
    _, whole, metrics = run(of(), make_scored())
    _, parts, in_parts = run(of(microbatches=microbatches), make_scored())
    assert_close(parts.params, whole.params)
    assert_close(parts.dual, whole.dual, 1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(in_parts[name], value, atol=2e-5, rtol=2e-5, err_msg=name)


K3 = functools.partial(rejection.k3, high=0.05)
M2PO = corrections.decoupled(CLIPPED, rejections=(rejection.m2po,))
STRICT_MIS = corrections.mis(0.5, 2.0, denominator=corrections.surviving)


@pytest.mark.parametrize("surrogate, passes", [(corrections.decoupled(CLIPPED), 0), (M2PO, 1)])
def test_a_batch_is_scored_first_only_if_the_loss_is_not_separable(surrogate, passes, monkeypatch):
    made = []
    score = trainer_scores.score
    monkeypatch.setattr(trainer_scores, "score", lambda *args: made.append(args) or score(*args))
    config = make_config(surrogate=surrogate, microbatches=4)
    mesh = ONE
    batch = packing.pack(
        make_scored(), minibatches=1, microbatches=4, row_length=24, share_prompts=True
    )
    compiled_step.compile_step(config, MODEL, mesh).lower(fresh_state(config, MODEL, mesh), batch)
    assert len(made) == passes


def test_tokens_without_a_log_prob_of_the_sampler_do_not_stop_microbatches():
    scored = make_scored()
    rollout_logp = scored.rollout.rollout_logp.copy()
    rollout_logp[3:6, 0] = np.nan
    rollout_logp[9, :2] = -np.inf
    scored = scored._replace(rollout=scored.rollout._replace(rollout_logp=rollout_logp))
    (_, whole, _), (_, parts, metrics) = (run(make_config(microbatches=n), scored) for n in (1, 4))
    assert metrics["skipped"] == 0
    assert_close(parts.params, whole.params)


def test_several_updates_and_stale_rollouts_are_scored_first():
    assert not any(
        map(compiled_step.in_one_pass, (make_config(minibatches=2), make_config(epochs=2)))
    )
    stale = make_config(microbatches=4)
    assert not compiled_step.in_one_pass(
        dataclasses.replace(stale, rollout=dataclasses.replace(stale.rollout, staleness=1))
    )


@pytest.mark.parametrize(
    "parts", [{}, {"microbatches": 4}, {"epochs": 2}, {"epochs": 2, "microbatches": 2}]
)
def test_a_penalty_is_charged_on_rejected_tokens_too(parts):
    """With equal rewards it is all of the loss: lambda times the mean gap that the dual sees."""
    config = make_config(surrogate=corrections.decoupled(CLIPPED, STRICT_MIS), **parts)
    scored = make_scored(reward=np.ones(B * G))
    penalised = dataclasses.replace(
        config.constraint, shaping=None, penalty=constraint.penalty, multiplier_init=0.3
    )
    still = dataclasses.replace(config.algorithm, learning_rate=0.0)
    _, _, metrics = run(dataclasses.replace(config, constraint=penalised, algorithm=still), scored)
    np.testing.assert_allclose(metrics["loss"], 0.3 * metrics["delta_mean"], rtol=1e-5)
    rollout, mask = scored.rollout, np.arange(T) < scored.rollout.lengths[:, None]
    old = np.asarray(row_logp(make_params(), MODEL, scored))
    delta = np.abs(np.exp(old) - np.exp(rollout.rollout_logp))
    np.testing.assert_allclose(metrics["loss"], 0.3 * delta[mask].mean(), rtol=1e-4)
    kept = mask & (np.abs(old - rollout.rollout_logp) < np.log(2))
    assert delta[kept].mean() < 0.8 * delta[mask].mean(), "the rejected tokens are the worst"


def damped(logp, old_logp, rollout_logp, advantage, mask):
    """The loss of all tokens is damped if many of them have a large ratio to the sampler."""
    ratio = jnp.exp(jax.lax.stop_gradient(logp) - rollout_logp)
    many = jnp.mean(ratio > 2, where=mask) > 0.01
    return -jnp.where(many, 0.1, 1.0) * advantage * logp, mask


UNDECLARED = {
    "a user's function": damped,
    "a budget of the batch": M2PO,
    "surviving tokens": corrections.bypass(
        CLIPPED, rejections=(K3,), denominator=corrections.surviving
    ),
}


@pytest.mark.parametrize("surrogate", UNDECLARED.values(), ids=UNDECLARED)
@pytest.mark.parametrize("parts", [{}, {"minibatches": 2}, {"epochs": 2}], ids=str)
def test_accumulation_is_exact_where_microbatches_weigh_against_each_other(surrogate, parts):
    """At the weights that sampled, and after they have moved. By SGD: AdamW divides a gradient that
    is nothing but round-off by its own size.
    """
    parts = {**parts, "surrogate": surrogate, "optimizer": lambda algorithm: optax.sgd(1.0)}
    _, expected, _ = run(make_config(**parts), make_scored())
    _, state, _ = run(make_config(microbatches=2, **parts), make_scored())
    assert_close(state.params, expected.params, 1e-6)


def penalised(config):
    constrained = dataclasses.replace(
        config.constraint, shaping=None, penalty=constraint.penalty, multiplier_init=0.3
    )
    return dataclasses.replace(config, constraint=constrained)


def half(old_logp, rollout_logp, mask, step):
    """A scale that depends on the batch and the step."""
    return jnp.where(jnp.sum(mask) > 1, 0.5, 1.0) / (step + 1)


def finished(mask, reward, truncated, group, *, num_groups):
    return advantages.overlong_mask(mask, truncated)


def unequal(mask, reward, truncated, group, *, num_groups):
    keep = advantages.dynamic_sampling_mask(reward, group, num_groups=num_groups)
    return mask & keep[:, None]


def shorter_is_better(reward, length, truncated, group, *, num_groups):
    soft_limit = advantages.overlong_penalty(length, max_length=T, cache=4)
    brief = advantages.length_reward(reward, length, group, num_groups=num_groups)
    return reward + soft_limit + brief - truncated


IN_ONE_PASS = {
    "dense": make_config(),
    "dense, 4 microbatches": make_config(microbatches=4),
    "moe": make_config(MOE, microbatches=4),
    "correction": make_config(
        surrogate=corrections.decoupled(CLIPPED, corrections.tis(1.1)), microbatches=4
    ),
    "penalty": penalised(make_config(microbatches=4)),
    "reference penalty": make_config(reference_penalty=kl.unbiased, microbatches=4),
    "entropy bonus": make_config(
        entropy_coefficient=0.01, entropy_target=5.0, update_scale=half, microbatches=4
    ),
    "mask and reward shaping": make_config(
        mask=finished, reward_shaping=shorter_is_better, microbatches=4
    ),
}


@pytest.mark.parametrize("config", IN_ONE_PASS.values(), ids=IN_ONE_PASS)
def test_one_pass_computes_what_the_plain_step_does(config):
    assert compiled_step.in_one_pass(config)
    model = config.model.architecture
    microbatches = config.algorithm.microbatches
    batch = packing.pack(
        make_scored(), minibatches=1, microbatches=microbatches, row_length=24, share_prompts=True
    )
    state = fresh_state(config, model, ONE)
    # weights other than those that are trained, so that the reference penalty is not 0
    state = state._replace(reference=jax.tree.map(lambda w: 1.1 * w, state.reference))
    results = [
        jax.jit(functools.partial(form, config=config, model=model))(state, batch)
        for form in (step.constrained_step, compiled_step.one_pass_step)
    ]
    assert_close(*(state for state, _ in results), 1e-6)
    assert_close(*(metrics for _, metrics in results), 1e-5)


def test_an_update_is_scaled_as_if_the_learning_rate_were():
    before, plain, _ = run(make_config(microbatches=4), make_scored())
    _, scaled, metrics = run(make_config(microbatches=4, update_scale=half), make_scored())
    expected = jax.tree.map(lambda b, a: b + 0.5 * (a - b), before, plain.params)
    assert_close(scaled.params, expected, 1e-6)
    assert metrics["update_scale"] == 0.5


@pytest.mark.full
def test_the_scale_of_an_update_sees_the_age_of_a_stale_rollout():
    def mean_of_the_policy(logp, rollout_logp, mask, step):
        return reduce.token_mean(logp, mask)

    config = make_config(update_scale=mean_of_the_policy)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, staleness=1))
    batch = packing.pack(
        make_scored(), minibatches=1, microbatches=1, row_length=24, share_prompts=True
    )
    state = fresh_state(config, MODEL, ONE)
    state = state._replace(stale=(jax.tree.map(lambda w: 1.2 * w, state.params),))
    batch = jax.device_put(batch, train_state.batch_shardings(config, ONE))
    score = jax.jit(functools.partial(trainer_scores.score, config=config, model=MODEL))
    expected, older = (
        reduce.token_mean(score(params, batch)[0], batch.mask)
        for params in (state.params, state.stale[0])
    )
    assert abs(expected - older) > 0.01
    _, metrics = cached_step(config, MODEL, ONE)(state, batch)
    np.testing.assert_allclose(metrics["update_scale"], expected, rtol=1e-5)


def test_params_and_multiplier_change_in_one_program_without_the_host():
    config = make_config(minibatches=2, microbatches=2)
    mesh = sharding.single_device_mesh()
    batch = packing.pack(
        make_scored(), minibatches=2, microbatches=2, row_length=24, share_prompts=True
    )
    batch = jax.device_put(batch, train_state.batch_shardings(config, mesh))
    state = fresh_state(config, MODEL, mesh)
    before = jax.tree.map(jnp.copy, state)  # a NumPy view would keep the buffers from being donated
    compiled = compiled_step.compile_step(config, MODEL, mesh).lower(state, batch).compile()
    assert len(compiled.runtime_executable().hlo_modules()) == 1
    for word in ("callback", "infeed", "outfeed", "send", "recv"):
        assert f"{word}(" not in compiled.as_text() and f'target="{word}' not in compiled.as_text()
    with jax.transfer_guard("disallow"):
        after, _ = compiled(state, batch)
    assert jax.tree.leaves(state.params)[0].is_deleted(), "the state is donated"
    assert after.dual.multiplier != before.dual.multiplier
    assert all(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(before.params))
    )


def test_minibatches_and_epochs_take_several_updates():
    _, state, _ = run(make_config(minibatches=4, epochs=2), make_scored())
    assert optax.tree_utils.tree_get(state.opt_state, "ScaleByAdamState").count == 8
    assert state.step == 1


def clipped_share(logp, old_logp, scored, multiplier=0.1):
    """By `diagnostics.clip_fraction` with the bounds of CLIPPED; and the mask."""
    rollout = scored.rollout
    mask = np.arange(T) < rollout.lengths[:, None]
    old = np.asarray(row_logp(make_params(), MODEL, scored))
    advantage = constraint.shape_advantage(
        advantages.grpo(scored.reward, np.arange(B * G, dtype=np.int32) // G, num_groups=B)[
            :, None
        ],
        old,
        rollout.rollout_logp,
        multiplier,
        TOLERANCE,
        mask,
    )
    shares = diagnostics.clip_fraction(
        logp, old_logp, advantage, mask, clip_low=0.2, clip_high=0.24
    )
    return shares["clip_low"] + shares["clip_high"], mask


def test_the_clip_fraction_and_kl_are_means_over_the_updates():
    """The first of two updates is at the weights that sampled; the second is where one update
    leads.
    """
    scored = make_scored()
    params, once, first = run(make_config(), scored)
    _, _, metrics = run(make_config(epochs=2), scored)
    assert first["clip_fraction"] == 0 and first["approx_kl"] == 0
    old, new = (row_logp(p, MODEL, scored) for p in (params, once.params))
    share, mask = clipped_share(new, old, scored)
    assert 0.05 < share < 0.95
    np.testing.assert_allclose(metrics["clip_fraction"], share / 2, rtol=1e-5)
    ratio = np.exp(np.float64(new - old))[mask]
    expected = np.mean(ratio - 1 - np.log(ratio)) / 2
    np.testing.assert_allclose(metrics["approx_kl"], expected, rtol=1e-3)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_clip_fraction_is_the_surrogates(microbatches):
    """Against the sampler, the clip stops tokens before any update; a penalty does not hide it."""
    scored = make_scored()
    config = make_config(
        surrogate=corrections.bypass(CLIPPED), reference_penalty=kl.k3, microbatches=microbatches
    )
    old = row_logp(make_params(), MODEL, scored)
    share, _ = clipped_share(old, scored.rollout.rollout_logp, scored)
    assert 0.05 < share < 0.95
    np.testing.assert_allclose(run(config, scored)[2]["clip_fraction"], share, rtol=1e-5)


def test_rejected_tokens_count_as_clipped():
    rejecting = corrections.decoupled(CLIPPED, rejections=(rejection.ipo,))
    scored = make_scored()
    old = row_logp(make_params(), MODEL, scored)
    mask = np.arange(T) < scored.rollout.lengths[:, None]
    kept = np.asarray(rejection.ipo(old, scored.rollout.rollout_logp, mask))[mask].mean()
    assert 0 < kept < 1
    share = run(make_config(surrogate=rejecting), scored)[2]["clip_fraction"]
    np.testing.assert_allclose(share, 1 - kept, rtol=1e-5)


INFINITE_REWARD = [np.inf] + [0.0] * (B * G - 1)


def test_updates_that_are_not_finite_are_counted():
    _, state, metrics = run(make_config(minibatches=2), make_scored(reward=INFINITE_REWARD))
    assert metrics["skipped"] >= 1 and np.isfinite(metrics["multiplier_next"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))


def test_an_update_that_is_not_finite_leaves_the_parameters():
    before, state, _ = run(make_config(), make_scored(reward=INFINITE_REWARD))
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_an_engine_without_log_probs_measures_nothing():
    scored = make_scored()
    nothing = np.full_like(scored.rollout.rollout_logp, np.nan)
    silent = scored._replace(rollout=scored.rollout._replace(rollout_logp=nothing))
    _, state, metrics = run(make_config(), silent)
    assert np.isnan(metrics["delta_mean"]) and metrics["dropped_share"] == 1
    assert metrics["logp_finite"]
    assert state.dual.multiplier == np.float32(0.1) and state.dual.updates == 0


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_weight_that_is_not_finite_makes_no_update_and_no_measurement(microbatches):
    config = make_config(microbatches=microbatches)
    scored = make_scored()
    params = make_params() | {"embed": make_params()["embed"].at[3, 0].set(np.nan)}
    _, state, metrics = run(config, scored, params=params)
    assert metrics["skipped"] == 1 and not metrics["logp_finite"]
    assert np.isnan(metrics["delta_mean"])
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert state.dual.multiplier == np.float32(0.1)


def test_equal_rewards_without_a_multiplier_change_nothing():
    config = make_config()
    config = dataclasses.replace(
        config, constraint=dataclasses.replace(config.constraint, multiplier_init=0.0)
    )
    before, state, _ = run(config, make_scored(reward=np.ones(B * G)))
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_completions_without_tokens_change_nothing_and_measure_nothing():
    scored = make_scored()
    empty = scored._replace(rollout=scored.rollout._replace(lengths=np.zeros(B * G, np.int32)))
    before, state, metrics = run(make_config(), empty)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert state.dual.multiplier == np.float32(0.1)
    assert np.isnan(metrics.pop("delta_mean")), "nothing measured is no 0"
    assert all(np.isfinite(value) for value in metrics.values())


def test_garbage_in_padding_changes_nothing():
    scored = make_scored()
    past = np.arange(T) >= scored.rollout.lengths[:, None]
    dirty = scored._replace(
        rollout=scored.rollout._replace(
            rollout_logp=np.where(past, np.nan, scored.rollout.rollout_logp).astype(np.float32),
            tokens=np.where(past, 15, scored.rollout.tokens),
        )
    )
    _, clean_state, clean = run(make_config(), scored)
    _, dirty_state, metrics = run(make_config(), dirty)
    jax.tree.map(np.testing.assert_array_equal, dirty_state, clean_state)
    assert metrics == clean


def test_corrections_are_selectable_and_weigh_the_loss():
    """TIS with a bound nobody reaches from below is the mean of rho-weighted losses; at ratio 1 the
    loss is -w A'.
    """
    scored = make_scored()
    mask = np.arange(T) < scored.rollout.lengths[:, None]
    old = np.asarray(row_logp(make_params(), MODEL, scored))
    delta = np.abs(np.exp(old) - np.exp(scored.rollout.rollout_logp))
    rho = np.exp(old - scored.rollout.rollout_logp)
    shaped = (
        np.asarray(
            advantages.grpo(scored.reward, np.repeat(np.arange(B, dtype=np.int32), G), num_groups=B)
        )[:, None]
        - 0.1 * delta
    )
    for correction, weight in (
        (corrections.tis(2.0), np.minimum(rho, 2)),
        (corrections.icepop(0.5, 5.0), np.where((rho >= 0.5) & (rho <= 5), rho, 0)),
    ):
        _, _, metrics = run(
            make_config(surrogate=corrections.decoupled(CLIPPED, correction)), scored
        )
        np.testing.assert_allclose(metrics["loss"], -(weight * shaped)[mask].mean(), atol=2e-6)


def emptied(scored, drop):
    """The same completions, of which some have no tokens."""
    lengths = np.where(drop, 0, scored.rollout.lengths).astype(np.int32)
    return scored._replace(rollout=scored.rollout._replace(lengths=lengths))


@pytest.mark.parametrize("parts", [{}, {"minibatches": 2, "microbatches": 2}], ids=str)
def test_a_masked_completion_is_as_one_without_tokens(parts):
    """Loss, delta and dual are of the others; its reward and its length are still measured."""
    scored = make_scored()
    drop = ~scored.rollout.stopped
    assert 0 < drop.sum() < len(drop)
    _, expected, dropped = run(make_config(**parts), emptied(scored, drop))
    _, state, metrics = run(make_config(mask=finished, **parts), scored)
    assert_close(state, expected)
    assert metrics.pop("response_length") > dropped.pop("response_length")
    assert_close(metrics, dropped)


def test_a_mask_leaves_tokens_out_and_adds_none():
    batch = packing.pack(
        make_scored(), minibatches=1, microbatches=1, row_length=24, share_prompts=True
    )
    config = make_config(mask=lambda mask, *of_completions, num_groups: jnp.ones(mask.shape))
    masked = objective.apply_mask(batch, config).mask
    assert masked.dtype == bool and not batch.mask.all()
    np.testing.assert_array_equal(masked, batch.mask)


def test_groups_without_spread_can_be_left_out():
    """Shaping by delta would move them, though their advantages are 0."""
    reward = np.arange(B * G) % 2 * (np.arange(B * G) < 2 * G)
    scored = make_scored(reward=reward)
    _, expected, _ = run(make_config(), emptied(scored, np.repeat(np.arange(B), G) >= 2))
    _, state, _ = run(make_config(mask=unequal), scored)
    assert_close(state, expected)


def test_advantages_are_made_of_the_shaped_reward():
    """The soft limit, Kimi's length reward and a fine, written out; the metric has the verifier's
    reward.
    """
    scored = make_scored()
    length = scored.rollout.lengths.astype(float)
    spans = length.reshape(B, G)
    shortest = np.repeat(spans.min(1), G)
    share = 0.5 - (length - shortest) / np.repeat(np.maximum(np.ptp(spans, 1), 1), G)
    brief = np.where(scored.reward > 0, share, np.minimum(share, 0))
    fines = np.clip((length - (T - 4)) / 4, 0, 1) + ~scored.rollout.stopped
    by_hand = make_scored(reward=scored.reward + brief - fines)
    _, expected, _ = run(make_config(), by_hand)
    _, state, metrics = run(make_config(reward_shaping=shorter_is_better), scored)
    assert_close(state, expected)
    assert metrics["reward"] == scored.reward.mean()
