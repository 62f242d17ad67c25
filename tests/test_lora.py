"""LoRA: the sum and its gradients by hand, what is trained, how it is laid out, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import objective, sharding, step, sync, train_state, trainer_scores
from dcmdp_jax.config import Lora, MeshConfig, Precision
from dcmdp_jax.models import decoder, derived, lora, sizes
from dcmdp_jax.models.model_config import PROJECTIONS
from dcmdp_jax.models.quantized import Quantized
from dcmdp_jax.tokens import packing
from support.steps import MODEL, MOE, ONE, assert_close, make_config, make_params, make_scored, run

RANK = 3
ALPHA = 6.0
# of a layer's (or expert's) projection: inputs, outputs
SUMS = {
    "q_proj": "lir,lrho->liho",
    "k_proj": "lir,lrho->liho",
    "v_proj": "lir,lrho->liho",
    "o_proj": "lhir,lro->lhio",
}
DENSE_SUM = "lir,lro->lio"
EXPERT_SUM = "leir,lero->leio"
MODELS = pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "moe"])


def adapted(config, **changes):
    source = dataclasses.replace(
        config.model, lora=Lora(**{"rank": RANK, "alpha": ALPHA} | changes)
    )
    return dataclasses.replace(config, model=source)


@functools.cache
def random_adapters(model, seed=0):
    """Adapters that change every projection."""
    rng = np.random.default_rng(seed)
    shapes = lora.abstract(Lora(rank=RANK, alpha=ALPHA), model)
    return jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)


def projections(model, tree):
    """(name, einsum of the sum, leaf of `tree`, its adapter) of each stack."""
    for stack, adapters in zip(tree["stacks"], random_adapters(model)["stacks"], strict=True):
        for part, inner in adapters.items():
            for name, adapter in inner.items():
                other = EXPERT_SUM if part == "moe" else DENSE_SUM
                yield name, SUMS.get(name, other), stack[part][name], adapter


@MODELS
def test_every_projection_is_the_sum(model):
    params = make_params(model)
    made = lora.with_adapters(random_adapters(model), params, Lora(rank=RANK, alpha=ALPHA))
    found = list(projections(model, made))
    assert len(found) == len(PROJECTIONS) * len(decoder.stacks(model))
    bases = [leaf for _, _, leaf, _ in projections(model, params)]
    for (_, spec, weight, adapter), base in zip(found, bases, strict=True):
        product = np.einsum(spec, *(np.float64(adapter[x]) for x in ("down", "up")))
        np.testing.assert_allclose(
            weight.array(), base + ALPHA / RANK * product, atol=1e-6, rtol=1e-6
        )


def test_new_adapters_change_nothing():
    params = make_params(MOE)
    adapters = lora.init(params, jax.random.key(0), Lora(rank=RANK))
    made = derived.arrays(lora.with_adapters(adapters, params, Lora(rank=RANK)))
    jax.tree.map(np.testing.assert_array_equal, made, params)


def test_new_adapters_differ_and_are_as_wide_as_their_inputs_ask():
    adapters = lora.init(make_params(), jax.random.key(0), Lora(rank=64))
    downs = [pair["down"] for part in adapters["stacks"][0].values() for pair in part.values()]
    for down in downs:
        inputs = down[0].size // 64
        assert np.abs(down).max() <= inputs**-0.5
        np.testing.assert_allclose(down.std(), (3 * inputs) ** -0.5, rtol=0.1)
    assert len({float(down.reshape(-1)[0]) for down in downs}) == len(downs)


def test_targets_alone_are_adapted():
    adapters = lora.init(make_params(), jax.random.key(0), Lora(rank=2, targets=("v_proj",)))
    assert {name for part in adapters["stacks"][0].values() for name in part} == {"v_proj"}
    assert set(adapters["stacks"][0]) == {"attention"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": ("q_proj", "embed")}, "must be some of q_proj"),
        ({"targets": ()}, "must be some of q_proj"),
        ({"rank": 0, "folder": "adapter"}, "set model.lora.rank to their r"),
        ({"rank": -1}, "model.lora.rank"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        adapted(make_config(), **changes)


@pytest.mark.parametrize(
    "changes, message",
    [({"base": "int3"}, "base='int3' is not one of"), ({"base_group": 5}, "groups of 5 do not")],
)
def test_formats_that_the_frozen_weights_cannot_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        lora.check(Lora(**{"rank": 1, "base": "int8"} | changes), MODEL)


def test_two_ways_to_say_what_is_trained_are_refused():
    config = make_config()
    source = dataclasses.replace(config.model, lora=Lora(rank=1), trainable=max, policy_params=max)
    with pytest.raises(ValueError, match="leave one of the two out"):
        dataclasses.replace(config, model=source)


@pytest.mark.full
@MODELS
def test_gradients_are_those_of_a_low_rank_difference_of_all_weights(model):
    """The chain rule from the gradient of the complete weights, which training all of them has:
    d down = s dW up^T, d up = s down^T dW.
    """
    config = adapted(make_config(model))
    adapters = random_adapters(model)
    base = make_params(model)
    batch = packing.pack(
        make_scored(), minibatches=1, microbatches=1, row_length=24, share_prompts=True
    )
    batch = jax.device_put(batch, train_state.batch_shardings(config, ONE))

    def grads(params, frozen, config):
        policy = train_state.decoder_params(params, frozen, config)
        advantage = objective.group_advantage(batch, config)
        old_logp, _ = trainer_scores.score(policy, batch, config, model)
        minibatch = jax.tree.map(
            lambda x: x[0],
            objective.Minibatch(
                batch, old_logp, None, jnp.broadcast_to(advantage, batch.mask.shape)
            ),
        )
        return step.gradients(params, frozen, minibatch, jnp.float32(0.1), config, model)[1]

    of_adapters = jax.jit(functools.partial(grads, config=config))(adapters, base)
    summed = derived.arrays(lora.with_adapters(adapters, base, config.model.lora))
    of_all = jax.jit(functools.partial(grads, config=make_config(model)))(summed, ())
    got = [
        pair for stack in of_adapters["stacks"] for part in stack.values() for pair in part.values()
    ]
    scale = ALPHA / RANK
    for (name, spec, dw, adapter), pair in zip(projections(model, of_all), got, strict=True):
        down, rest = spec.split(",")
        up, weight = rest.split("->")
        down_grad = np.einsum(f"{weight},{up}->{down}", dw, adapter["up"])
        up_grad = np.einsum(f"{down},{weight}->{up}", adapter["down"], dw)
        assert np.abs(dw).max() > 1e-3, name
        np.testing.assert_allclose(pair["down"], scale * down_grad, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(pair["up"], scale * up_grad, atol=2e-6, err_msg=name)


@pytest.mark.full
def test_the_adapters_alone_are_trained_and_have_moments():
    config = adapted(make_config())
    before, state, _ = run(config, make_scored())
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert size == sum(leaf.size for leaf in jax.tree.leaves(random_adapters(MODEL)))
    assert 2 * size <= sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 2 * size + 10
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
    ups = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if "up" in str(path[-1])
    ]
    assert all(np.abs(up).max() > 1e-4 for up in ups)


@pytest.mark.full
@pytest.mark.parametrize(
    "model, mesh, base",
    [
        (MODEL, MeshConfig(fsdp=2, tensor=2), "float32"),
        (MOE, MeshConfig(fsdp=2, expert=2, tensor=2), "float32"),
        (MODEL, MeshConfig(fsdp=2, sequence=2), "nf4"),
    ],
    ids=["dense", "moe", "nf4"],
)
def test_devices_change_nothing(model, mesh, base):
    config = adapted(make_config(model, microbatches=2), base=base, base_group=4)
    _, one, metrics = run(config, make_scored())
    count = mesh.fsdp * mesh.expert * mesh.sequence * mesh.tensor
    _, split, split_metrics = run(
        config, make_scored(), sharding.make_mesh(mesh, jax.devices()[:count])
    )
    assert_close(split.params, one.params, 1e-5)
    np.testing.assert_allclose(split_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-4)


def test_adapters_lie_as_the_projections_do():
    """Each axis that they share; an expert's adapter is with the expert."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    config = adapted(make_config(MOE))
    layout = train_state.shardings(config, MOE, mesh).params["stacks"][0]
    attention = layout["attention"]
    assert tuple(attention["q_proj"]["down"].spec) == (None, ("fsdp", "expert", "sequence"), None)
    assert tuple(attention["q_proj"]["up"].spec) == (None, None, "tensor", None)
    assert tuple(layout["moe"]["down_proj"]["down"].spec) == (None, "expert", "tensor", None)
    up = tuple(layout["moe"]["down_proj"]["up"].spec)
    assert up == (None, "expert", None, ("fsdp", "sequence"))


def test_the_saving_of_8b():
    """Adapters have a copy and two moments; all parameters are float32, or in four bits with a
    scale per 64 inputs, the tables in bfloat16.
    """
    plain = make_config(sizes.QWEN3_8B)
    mesh = sharding.single_device_mesh()

    def gigabytes(config):
        state = train_state.abstract(config, sizes.QWEN3_8B, mesh)
        halves = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint4) / 2
        return (sharding.local_bytes(state) - halves) / 1e9  # a CPU takes a byte for 4 bits

    d, kv, f = 4096, 1024, 12_288
    projections = 36 * (2 * d * d + 2 * d * kv + 3 * d * f)
    tables = 2 * 151_936 * d
    adapters = 12 * 16 * 36 * (4 * d + 2 * (d + kv) + 3 * (d + f))
    assert abs(gigabytes(plain) - 12 * (projections + tables) / 1e9) < 0.01
    assert (
        abs(gigabytes(adapted(plain, rank=16)) - (4 * (projections + tables) + adapters) / 1e9)
        < 0.01
    )
    rounded = adapted(plain, rank=16, base="nf4", base_group=64)
    four_bits = projections / 2 + projections / 64 * 4 + 2 * tables + adapters
    assert abs(gigabytes(rounded) - four_bits / 1e9) < 0.01


@pytest.mark.full
def test_an_engine_is_planned_with_the_formats_of_the_frozen_weights():
    """What it is planned to hold is what the weight sync makes."""
    config = adapted(make_config(), base="nf4", base_group=4, targets=("q_proj", "up_proj"))
    params = train_state.decoder_params(*train_state.divide(config, make_params()), config)
    precision = Precision("int8", head="int4")
    made = sync.converter(MODEL, precision, ONE)(params, 0)
    planned = sync.abstract_weights(params, MODEL, precision, ONE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), planned
    )
    assert made.params["embed"].dtype == jnp.bfloat16


def test_frozen_weights_have_their_format():
    """The targets are rounded as an engine's are, what else is large is bfloat16."""
    frozen = lora.freeze(make_params(), Lora(rank=2, base="int8", targets=("q_proj", "up_proj")))
    stack = frozen["stacks"][0]
    assert isinstance(stack["attention"]["q_proj"], Quantized)
    assert stack["mlp"]["up_proj"].values.dtype == jnp.int8
    assert stack["mlp"]["down_proj"].dtype == frozen["embed"].dtype == jnp.bfloat16
    assert stack["input_norm"]["scale"].dtype == jnp.float32
