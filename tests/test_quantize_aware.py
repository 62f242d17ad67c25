"""The trainer's forward pass through the engine's rounding: what is left of the gap, and the
straight-through gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import objective, sharding, step, sync, train_state, trainer_scores
from dcmdp_jax.config import Lora, MeshConfig, Precision
from dcmdp_jax.models import decoder, derived, engine_formats, lora
from dcmdp_jax.models.quantized import SCALED, Quantized
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.tokens import packing
from dcmdp_jax.tools import diagnose, parity
from support import mismatch
from support.random_params import random_params
from support.steps import MODEL, MOE, ONE, assert_close, make_config, make_params, make_scored, run
from support.tiny_models import TINY, TINY_MOE
from support.training import ONE_DEVICE

AWARE = {"algorithm.quantize_aware": True}
ALL = Precision("int4", group=4, embed="int8", head="nf4", router="bfloat16", norms="bfloat16")


def stored(params, model, precision):
    """What an engine stores, as float32 and one tree per layer."""
    weights = sync.converter(model, precision, sharding.single_device_mesh())(params, 0).params
    return jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, Quantized) else w.astype(jnp.float32),
        weights,
        is_leaf=lambda w: isinstance(w, Quantized),
    )


# Every pair of format and group, of format and model, and of group and model; a format without
# scales has no groups.
STORED = [
    (weights, group, (TINY, TINY_MOE)[(i + j) % 2])
    for i, weights in enumerate(SCALED)
    for j, group in enumerate((0, -1, 16))
] + [(weights, 0, model) for weights in ("bfloat16", "float32") for model in (TINY, TINY_MOE)]


@pytest.mark.full
@pytest.mark.parametrize(
    "weights, group, model",
    STORED,
    ids=[f"{w}-{g}-{'moe' if m.num_experts else 'dense'}" for w, g, m in STORED],
)
def test_the_trainer_has_the_numbers_that_the_engine_stores(weights, group, model):
    precision = dataclasses.replace(ALL, weights=weights, group=group)
    params = random_params(model)
    rounded = derived.arrays(engine_formats.straight_through(params, model, precision))
    from_engine = stored(params, model, precision)
    per_layer = from_engine.pop("stacks")
    stacks = rounded.pop("stacks")
    assert jax.tree.structure(rounded) == jax.tree.structure(from_engine)
    jax.tree.map(np.testing.assert_array_equal, rounded, from_engine)
    (stack,) = stacks
    jax.tree.map(
        np.testing.assert_array_equal, stack, jax.tree.map(lambda *x: jnp.stack(x), *per_layer)
    )


@pytest.mark.full
def test_frozen_weights_of_few_bits_are_rounded_as_the_engine_rounds_them():
    """The trainer's are not rounded to their own bfloat16 once more."""
    settings = Lora(rank=2, base="nf4", base_group=4, targets=("q_proj",))
    frozen = lora.freeze(make_params(), settings)
    adapters = jax.tree.map(
        lambda x: jnp.full(x.shape, 0.1, x.dtype), lora.abstract(settings, MODEL)
    )
    params = lora.with_adapters(adapters, frozen, settings)
    rounded = derived.arrays(engine_formats.straight_through(params, MODEL, ALL))
    from_engine = stored(params, MODEL, ALL)
    for name in ("embed", "head"):
        np.testing.assert_array_equal(rounded[name], from_engine[name], err_msg=name)
    layers = jax.tree.map(lambda *x: jnp.stack(x), *from_engine["stacks"])
    jax.tree.map(np.testing.assert_array_equal, rounded["stacks"][0], layers)


def gap(inputs, config, params):
    weights = parity.TrainerWeights(params, 3, "random")
    return parity.measure(config, inputs, weights, 2).gaps["all"].delta


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {},
        mismatch.EXPERTS | {"rollout.precision.router": "bfloat16"},
        {
            "rollout.precision.weights": "nf4",
            "rollout.precision.group": 4,
            "rollout.precision.embed": "int8",
            "rollout.precision.head": "int4",
            "rollout.precision.norms": "bfloat16",
        },
        {"rollout.precision.weights": "float8_e5m2", "model.lora.rank": 2},
    ],
    ids=["int4", "moe", "every part", "lora"],
)
def test_the_gap_is_round_off(changes):
    config = mismatch.tiny(**changes)
    aware = mismatch.tiny(**changes | AWARE)
    inputs = read_inputs(config, ONE_DEVICE)
    params = random_params(inputs.model_config, 0.3, norms=1.0)
    if config.model.lora.rank:
        shapes = lora.abstract(config.model.lora, inputs.model_config)
        adapters = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), shapes)
        params = lora.with_adapters(adapters, params, config.model.lora)
    assert gap(inputs, config, params) > 1e-3
    assert gap(inputs, aware, params) < 1e-6


def gradient(config, params, frozen, scored_with):
    """Of one minibatch's loss, with `old_logp` of the decoder's parameters `scored_with`."""
    model = config.model.architecture
    batch = packing.pack(
        make_scored(), minibatches=1, microbatches=1, row_length=24, share_prompts=True
    )
    batch = jax.device_put(batch, train_state.batch_shardings(config, ONE))

    def grads(params, frozen, scored_with):
        plain = dataclasses.replace(
            config, algorithm=dataclasses.replace(config.algorithm, quantize_aware=False)
        )
        old_logp, _ = trainer_scores.score(scored_with, batch, plain, model)
        advantage = objective.group_advantage(batch, config)
        minibatch = jax.tree.map(
            lambda x: x[0],
            objective.Minibatch(
                batch, old_logp, None, jnp.broadcast_to(advantage, batch.mask.shape)
            ),
        )
        return step.gradients(params, frozen, minibatch, jnp.float32(0.1), config, model)[1]

    return jax.jit(grads)(params, frozen, scored_with)


def with_engine(config, precision):
    return dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, precision=precision)
    )


@pytest.mark.full
@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "moe"])
def test_the_gradient_is_that_at_the_rounded_weights(model):
    """Plain training of weights that are rounded beforehand."""
    params = make_params(model)
    rounded = derived.arrays(engine_formats.straight_through(params, model, ALL))
    aware = gradient(with_engine(make_config(model, quantize_aware=True), ALL), params, (), rounded)
    plain = gradient(make_config(model), rounded, (), rounded)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain)) > 1e-2
    assert_close(aware, plain, 1e-6)


@pytest.mark.full
def test_a_tied_head_of_its_own_format_adds_its_gradient_to_the_embedding():
    model = dataclasses.replace(MODEL, tie_word_embeddings=True)
    precision = Precision(embed="int8", head="int4")
    params = make_params(model)
    rounded = engine_formats.straight_through(params, model, precision)
    aware = gradient(
        with_engine(make_config(model, quantize_aware=True), precision),
        params,
        (),
        derived.arrays(rounded),
    )
    untied = dataclasses.replace(model, tie_word_embeddings=False)
    apart = derived.arrays(rounded) | {"head": rounded["head"].T}
    plain = gradient(make_config(untied), apart, (), apart)
    assert_close(aware["embed"], plain["embed"] + plain["head"].T, 1e-6)


@pytest.mark.full
def test_the_float_weights_are_trained_on_any_mesh():
    config = with_engine(make_config(quantize_aware=True), ALL)
    before, one, _ = run(config, make_scored())
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    _, split, _ = run(config, make_scored(), mesh)
    assert_close(split.params, one.params, 2e-5)
    moved = one.params["stacks"][0]["mlp"]["up_proj"] - before["stacks"][0]["mlp"]["up_proj"]
    assert 0 < np.abs(moved).max() < 0.02  # a step of Adam, not one of int4


def test_an_engine_that_rounds_nothing_leaves_the_weights_alone():
    params = make_params()
    rounded = engine_formats.straight_through(params, MODEL, Precision())
    made = jax.tree.map(derived.array, rounded, is_leaf=derived.is_weight)
    jax.tree.map(np.testing.assert_array_equal, made, params)
    assert decoder.contracting_axes(MODEL).keys() == made.keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"server": "http://localhost:1"}, "rollout.server does not read"),
        ({"sampler": max}, "rollout.sampler does not read"),
        ({"precision": Precision(activations="int8")}, "precision.activations=int8 is not of"),
        ({"precision": Precision(cache="int8")}, "precision.cache=int8 is not of"),
        ({"precision": Precision(experts_per_token=1)}, "precision.experts_per_token=1 is not of"),
    ],
)
def test_what_the_trainer_cannot_round_is_refused(changes, message):
    config = make_config(quantize_aware=True)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **changes))


def test_diagnose_is_refused():
    with pytest.raises(ValueError, match="diagnose with --algorithm.quantize_aware no"):
        diagnose.check(make_config(quantize_aware=True))
