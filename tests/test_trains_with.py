"""Every function that docs/losses.md gives a field is trained with, for two compiled steps.

The functions are dealt to a few arms, each a configuration of a tiny decoder whose surrogate is the
sum of several, and so its advantage, reducer, shaping and reference penalty: compiling a step takes
far longer than the step. A new public function without an arm fails here.
"""

import dataclasses
import functools
import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import constraint, train_state
from dcmdp_jax.losses import (
    _arguments,
    advantages,
    centering,
    corrections,
    covariance,
    kl,
    operators,
    policy,
    reduce,
    rejection,
    routing,
    sequence,
    step_size,
    surrogates,
)
from dcmdp_jax.models import moe
from dcmdp_jax.tokens import packing
from support.steps import (
    MODEL,
    MOE,
    ONE,
    B,
    G,
    P,
    T,
    cached_step,
    fresh_state,
    make_config,
    make_scored,
)

partial = functools.partial
TINY = dataclasses.replace(MODEL, num_layers=1)
ROUTED = dataclasses.replace(MOE, num_layers=1)


def of(module, *names, **options):
    """The module's functions by name, each with the same options."""
    short = module.__name__.rpartition(".")[2]
    return {
        (f"{short}.{name}",): partial(getattr(module, name), **options)
        if options
        else getattr(module, name)
        for name in names
    }


def own_reinforce_pp(reward, group, mask, *, num_groups):
    return advantages.reinforce_pp(advantages.at_last_token(reward, mask), mask)


def own_whitened(reward, group, mask, *, num_groups):
    advantage = advantages.rloo(reward, group, num_groups=num_groups)[:, None]
    return advantages.whiten(jnp.broadcast_to(advantage, mask.shape), mask)


def own_opsm(logp, old_logp, rollout_logp, advantage, mask):
    loss = policy.clipped(logp, old_logp, advantage, mask)
    keep = rejection.opsm(logp, rollout_logp, advantage, mask)
    return jnp.where(keep, loss, 0.0), mask


# Each kind: the functions that an entry takes along -> what goes into the configuration.
LOSSES = (
    of(policy, "clipped", "reinforce", "gpg", "cispo", "sapo", "dppo_tv", "dppo_kl", "spo", "topr")
    | of(policy, "dro", beta=0.3)
    | of(sequence, "gspo", "gspo_token", "gmpo", "vespo")
    | of(sequence, "tbpo", dual_clip=1.05)
    | of(covariance, "clip_cov", "kl_cov", fraction=0.1)
)
BYPASSES = of(policy, "prime_tv", "drpo")
CORRECTIONS = of(
    corrections, "tis", "sequence_tis", "geometric_tis", "sequence_mis", "icepop", "geometric_mask"
) | {
    ("corrections.mis", "operators.surviving"): partial(
        corrections.mis, None, 9.0, operators.surviving
    )
}
CORRECTIONS = {names: make() for names, make in CORRECTIONS.items()} | {
    (f"operators.{level.__name__}", f"operators.{operator.__name__}"): corrections.Correction(
        level, operator, None if operator is operators.truncate else 1e-3, 9.0
    )
    for level, operator in (
        (operators.token, operators.truncate),
        (operators.sequence, operators.clip),
        (operators.geometric, operators.keep_inside),
        (operators.token, operators.zero_outside),
        (operators.token, operators.reject),
    )
}
REWEIGHTS = of(corrections, "batch_normalize") | of(corrections, "blend", alpha=0.5)
REJECTIONS = (
    {
        ("rejection.k1", "rejection.each_token"): partial(rejection.k1, low=1e-3, high=1e3),
        ("rejection.k2", "rejection.sequence_sum"): partial(
            rejection.k2, high=30.0, level=rejection.sequence_sum
        ),
        ("rejection.k3", "rejection.sequence_mean"): partial(
            rejection.k3, high=30.0, level=rejection.sequence_mean
        ),
        ("rejection.k3", "rejection.sequence_max"): partial(
            rejection.k3, high=30.0, level=rejection.sequence_max
        ),
    }
    | of(rejection, "trust_region", threshold=30.0)
    | of(rejection, "veto", "ipo")
    | of(rejection, "kpop", "m2po", threshold=2.0)
)
WHOLE = of(surrogates, "adaptive_clip") | {
    ("surrogates.log_linear", "surrogates.log_linear_proximal"): partial(
        surrogates.log_linear,
        surrogate=corrections.decoupled(policy.clipped, corrections.tis()),
        alpha=0.5,
    ),
    ("rejection.opsm",): own_opsm,
}
CENTRED = {
    (f"centering.{weight.__name__}", "centering.centred", "centering.score_centering"): partial(
        centering.centred, weight=weight
    )
    for weight in (centering.unweighted, centering.truncated, centering.masked)
}
K = 3  # of the sampler's likeliest tokens
ADVANTAGES = of(
    advantages, "grpo", "dr_grpo", "rloo", "gpg", "pass_at_k_advantage", "reinforce_pp_baseline"
) | {
    ("advantages.reinforce_pp", "advantages.at_last_token"): own_reinforce_pp,
    ("advantages.whiten",): own_whitened,
}
REDUCERS = of(
    reduce, "token_mean", "token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum"
) | of(reduce, "constant", normalizer=64.0)
SHAPINGS = (
    of(constraint, "shape_advantage", "shape_centred", "shape_hinge", "shape_cost_to_go")
    | of(constraint, "shape_normalised", "shape_credit")
    | {("constraint.shape_signed", "constraint.signed_delta"): constraint.shape_signed}
)
PENALTIES = of(constraint, "penalty")
ACCEPTANCES = {
    ("step_size.accept", "step_size.inference_gap"): partial(step_size.accept, tolerance=9.0)
}


def own_overlong_penalty(reward, length, truncated, group, *, num_groups):
    return reward + advantages.overlong_penalty(length, max_length=T, cache=3)


def own_length_reward(reward, length, truncated, group, *, num_groups):
    return reward + advantages.length_reward(reward, length, group, num_groups=num_groups)


def own_overlong_mask(mask, reward, truncated, group, *, num_groups):
    return advantages.overlong_mask(mask, truncated)


def own_dynamic_sampling(mask, reward, truncated, group, *, num_groups):
    keep = advantages.dynamic_sampling_mask(reward, group, num_groups=num_groups)
    return mask & keep[:, None]


REWARD_SHAPINGS = {
    ("advantages.overlong_penalty",): own_overlong_penalty,
    ("advantages.length_reward",): own_length_reward,
}
MASKS = {
    ("advantages.overlong_mask",): own_overlong_mask,
    ("advantages.dynamic_sampling_mask",): own_dynamic_sampling,
}
REFERENCES = of(kl, "k1", "k2", "k3", "k3_k2_gradient", "unbiased")
UPDATE_SCALES = of(step_size, "sqrt_ess") | of(step_size, "length_decay", length=3.0)


def smoothed(**options):
    controller = constraint.with_ema(constraint.pid(**options))
    return constraint.with_deadband(controller)


DUALS = of(constraint, "projected_ascent", "relative_ascent", "log_space_ascent", "pi") | {
    ("constraint.with_ema", "constraint.with_deadband", "constraint.pid"): smoothed
}


def surrogates_of_all():
    """The losses with the next correction, reweighting and rejection each, and the rest."""
    corrected = itertools.cycle(CORRECTIONS.items())
    reweighted = itertools.cycle((REWEIGHTS | {(): None}).items())
    rejected = itertools.cycle(REJECTIONS.items())
    made = {}
    for names, loss in LOSSES.items():
        with_correction, correction = next(corrected)
        with_reweight, reweight = next(reweighted)
        with_rejection, reject = next(rejected)
        names += with_correction + with_reweight + with_rejection
        names += ("corrections.decoupled", "operators.original")
        made[names] = corrections.decoupled(
            loss, correction, rejections=(reject,), reweight=reweight
        )
    for names, loss in BYPASSES.items():
        made[(*names, "corrections.bypass")] = corrections.bypass(loss)
    return made | WHOLE | CENTRED


def together(*functions):
    """One function in the place of several: the sum of what they return."""

    def total(*arrays, **options):
        return sum(function(*arrays, **options) for function in functions)

    return total


def advantages_together(*functions):
    """[N, T], whatever each of them returns."""

    def total(reward, group, mask, *, num_groups):
        found = []
        for function in functions:
            takes_mask = {"mask": mask} if _arguments.takes(function, "mask") else {}
            found.append(function(reward, group, num_groups=num_groups, **takes_mask))
        return sum(jnp.broadcast_to(a.reshape(len(reward), -1), mask.shape) for a in found)

    return total


def surrogates_together(*functions):
    def total(logp, old_logp, rollout_logp, advantage, mask, **top):
        loss = 0.0
        for function in functions:
            takes_top = top if _arguments.takes(function, "top_logp") else {}
            loss += function(logp, old_logp, rollout_logp, advantage, mask, **takes_top)[0]
        return loss, mask

    return total


def alone(function):
    return function


KINDS = {
    ("algorithm", "surrogate"): (surrogates_of_all(), surrogates_together),
    ("algorithm", "advantage"): (ADVANTAGES, advantages_together),
    ("algorithm", "reduce"): (REDUCERS, together),
    ("algorithm", "reference_penalty"): (REFERENCES, alone),
    ("algorithm", "update_scale"): (UPDATE_SCALES, alone),
    ("algorithm", "reward_shaping"): (REWARD_SHAPINGS, alone),
    ("algorithm", "mask"): (MASKS, alone),
    ("algorithm", "accept"): (ACCEPTANCES, alone),
    ("constraint", "shaping"): (SHAPINGS, together),
    ("constraint", "penalty"): (PENALTIES, alone),
    ("constraint", "dual"): (DUALS, alone),
}


def arms():
    """Each with the functions of which it is made, and its configuration."""
    made = []
    for i in range(len(DUALS)):
        config = make_config(TINY) if i else make_config(ROUTED, replay_routing=True)
        rollout = dataclasses.replace(config.rollout, top_logprobs=K)
        config = dataclasses.replace(config, rollout=rollout)
        names = [] if i else ["routing.replay_ids", "routing.replay_weights"]
        for (part, field), (choices, joined) in KINDS.items():
            chosen = list(choices.items())[i :: len(DUALS)]
            for more, _ in chosen:
                names += more
            value = joined(*(function for _, function in chosen)) if chosen else None
            changed = dataclasses.replace(getattr(config, part), **{field: value})
            config = dataclasses.replace(config, **{part: changed})
        made.append((names, config))
    return made


ARMS = arms()
OF_A_RUN = {"constraint.calibrate_tolerance"}


def documented():
    """The functions that docs/losses.md gives a field, but for those that are always there."""
    path = pathlib.Path(__file__).parents[1] / "docs" / "make_losses.py"
    spec = importlib.util.spec_from_file_location("make_losses", path)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    found = set()
    for module in maker.modules():
        short = module.__name__.removeprefix("dcmdp_jax.")
        for name, function in maker.functions(module).items():
            if maker.trains_with(short, name, function) not in ("", maker.BUILT_IN):
                found.add(f"{short.removeprefix('losses.')}.{name}")
    return found


def test_every_function_that_has_a_field_has_an_arm():
    trained = {name for names, _ in ARMS for name in names}
    assert trained | OF_A_RUN == documented()


def reported(rollout, config):
    """A rollout with what the sampler reports beside the tokens."""
    rng = np.random.default_rng(7)
    size = B * G, T
    tokens = np.broadcast_to(np.arange(TINY.vocab_size), (*size, TINY.vocab_size))
    top = np.int32(rng.permuted(tokens, axis=-1)[..., :K])
    rollout = rollout._replace(top_tokens=top, top_logp=np.full(top.shape, -2.5, np.float32))
    if not config.algorithm.replay_routing:
        return rollout
    experts = np.broadcast_to(np.arange(MOE.num_experts), (*size, 1, MOE.num_experts))
    chosen = rng.permuted(experts, axis=-1)[..., : MOE.experts_per_token]
    return rollout._replace(experts=np.int32(chosen))


def trains(config):
    """Two steps; each moves the parameters, and none is left out."""
    model = config.model.architecture
    state = fresh_state(config, model, ONE)
    for number in range(2):
        reward = np.random.default_rng(number).normal(size=B * G)
        scored = make_scored(reward=reward)
        scored = scored._replace(rollout=reported(scored.rollout, config))
        batch = packing.pack(
            scored,
            minibatches=1,
            microbatches=1,
            row_length=2 * (P + T),
            seed=number,
            share_prompts=True,
        )
        before = jax.device_get(state.params)
        batch = jax.device_put(batch, train_state.batch_shardings(config, ONE))
        state, metrics = cached_step(config, model, ONE)(state, batch)
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)
        assert any(jax.tree.leaves(moved)), "the parameters stay where they were"
        assert np.isfinite(metrics["loss"])
    assert int(state.step) == 2 and int(state.skipped) == 0
    assert np.isfinite(state.dual.multiplier)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


@pytest.mark.full
@pytest.mark.parametrize("arm", range(len(ARMS)))
def test_two_steps(arm):
    trains(ARMS[arm][1])


@pytest.mark.parametrize("norm", [True, False])
def test_the_model_replays_as_the_formulas_say(norm):
    """Gates and experts of the decoder's router are those of `routing`, gradient included."""
    config = dataclasses.replace(MOE, norm_topk_prob=norm)
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(9, MOE.hidden_size)))
    router = np.float32(rng.normal(size=(MOE.hidden_size, MOE.num_experts)))
    recorded = np.argsort(rng.random((9, MOE.num_experts)), axis=-1)[:, : MOE.experts_per_token]
    recorded = np.int32(np.where(rng.random((9, 1)) < 0.3, -1, recorded))

    def by_model(router):
        gates, experts = moe.route(x, router, config, recorded)
        return jnp.sum(jnp.cos(gates)), (gates, experts)

    def by_formula(router):
        logits = x @ router
        ids = routing.replay_ids(logits, recorded)
        gates = routing.replay_weights(logits, ids, normalize=norm)
        return jnp.sum(jnp.cos(gates)), (gates, ids)

    slope, (gates, experts) = jax.grad(by_model, has_aux=True)(router)
    wanted, (expected_gates, ids) = jax.grad(by_formula, has_aux=True)(router)
    np.testing.assert_array_equal(experts, ids)
    np.testing.assert_allclose(gates, expected_gates, rtol=1e-5)
    np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-6)
