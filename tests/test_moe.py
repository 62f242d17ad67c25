"""The grouped expert product against every expert on every token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.models import layers, moe, quantized
from dcmdp_jax.models.kernels import experts, grouped_product, swiglu
from dcmdp_jax.models.kernels.experts import FEW_BITS, expert_outputs
from support.accelerators import accelerator_programs
from support.tiny_models import TINY_MOE

pytestmark = pytest.mark.full

CONFIG = dataclasses.replace(TINY_MOE, hidden_size=12, num_experts=5, expert_size=7)


def random_experts(config, seed=0) -> dict:
    d = config.hidden_size
    e = config.num_experts
    f = config.expert_size
    shapes = {
        "router": (d, e),
        "gate_proj": (e, d, f),
        "up_proj": (e, d, f),
        "down_proj": (e, f, d),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: 0.5 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@functools.partial(jax.jit, static_argnames="config")
def apply(params, x, config):
    return layers.MoE(config).apply({"params": params}, x)[0]


def dense(params, x, config):
    """Every expert on every token; experts outside the top k get gate 0."""
    probs = jax.nn.softmax(x @ params["router"], axis=-1)
    kth = jnp.sort(probs, axis=-1)[..., -config.experts_per_token, None]
    gates = jnp.where(probs >= kth, probs, 0.0)
    if config.norm_topk_prob:
        gates = gates / gates.sum(-1, keepdims=True)
    inner = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, params["gate_proj"]))
    inner = inner * jnp.einsum("bsd,edf->bsef", x, params["up_proj"])
    return jnp.einsum("bsef,efd,bse->bsd", inner, params["down_proj"], gates)


@pytest.mark.parametrize(("k", "norm"), [(1, True), (1, False), (3, True), (5, False)])
def test_values_and_gradients_equal_the_dense_form(k, norm):
    config = dataclasses.replace(CONFIG, experts_per_token=k, norm_topk_prob=norm)
    params = random_experts(config)
    x = jax.random.normal(jax.random.key(1), (3, 4, config.hidden_size))
    np.testing.assert_allclose(apply(params, x, config), dense(params, x, config), atol=1e-5)
    direction = jax.random.normal(jax.random.key(2), x.shape)

    def gradient(f):
        return jax.jit(jax.grad(lambda p, x: jnp.sum(f(p, x, config) * direction), argnums=(0, 1)))(
            params, x
        )

    got = gradient(apply)
    want = gradient(dense)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    router = got[0]["router"]
    # With one expert and gates that sum to one the router has no say; otherwise it learns through
    # the gates.
    assert (np.abs(router).max() > 1e-3) == (k > 1 or not norm)


@pytest.mark.parametrize("is_split", [False, True])
def test_the_program_of_accelerators_equals_that_of_cpus(is_split):
    """`ragged_dot`, with gate and up as XLA stores them on a mesh or not; values and gradients."""
    mesh = sharding.single_device_mesh() if is_split else None
    weights = swiglu.Experts(
        *(random_experts(CONFIG)[name] for name in ("gate_proj", "up_proj", "down_proj"))
    )
    x = jax.random.normal(jax.random.key(1), (9, CONFIG.hidden_size))
    chosen = jax.random.randint(jax.random.key(2), (9, 2), 0, CONFIG.num_experts)
    direction = jax.random.normal(jax.random.key(3), (9, 2, CONFIG.hidden_size))

    def run():
        def loss(x, weights):
            return jnp.sum(direction * expert_outputs(x, chosen, weights, mesh=mesh))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, weights)

    want = run()
    with accelerator_programs():
        got = run()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)


@pytest.mark.parametrize("has_kernel", [False, True])
@pytest.mark.parametrize("name", FEW_BITS)
def test_weights_of_few_bits_are_multiplied_as_they_are_stored(name, has_kernel, monkeypatch):
    """By `ragged_dot` or the kernel, in bfloat16, with whose elements products are exact. What
    is rounded, by a unit of roundoff (2^-8) each: the three products and, before the last, silu,
    and its product.
    """
    config = dataclasses.replace(CONFIG, hidden_size=32, expert_size=64)
    floats = random_experts(config)
    weights = swiglu.Experts(
        *(
            quantized.quantize(floats[f"{part}_proj"], name, (-2,))
            for part in ("gate", "up", "down")
        )
    )
    x = jax.random.normal(jax.random.key(1), (9, config.hidden_size), jnp.bfloat16)
    chosen = jax.random.randint(jax.random.key(2), (9, 2), 0, config.num_experts)
    exact = jax.tree.map(
        lambda w: np.asarray(w.dequantize(), np.float64)[np.asarray(chosen)],
        weights,
        is_leaf=lambda w: isinstance(w, quantized.Quantized),
    )
    gate, up = (np.einsum("nd,nkdf->nkf", x.astype(jnp.float32), w) for w in exact[:2])
    inner = gate / (1 + np.exp(-gate)) * up
    want = np.einsum("nkf,nkfd->nkd", inner, exact.down)
    # d silu(g) is at most 1.1 dg, and dg at most a unit of |g|
    size = np.einsum(
        "nkf,nkfd->nkd", np.abs(gate * up) * 1.1 + 3 * np.abs(inner), np.abs(exact.down)
    )
    mesh = sharding.single_device_mesh()
    table = grouped_product.FORMATS if has_kernel else experts.AS_STORED
    monkeypatch.setitem(table, mesh.devices.flat[0].device_kind, (name,))
    interpreted = functools.partial(grouped_product.product, interpret=True)
    monkeypatch.setattr(grouped_product, "product", interpreted)
    monkeypatch.setattr(quantized.Quantized, "dequantize", None)
    with accelerator_programs():
        got = jax.jit(functools.partial(expert_outputs, mesh=mesh))(x, chosen, weights)
    assert got.dtype == jnp.bfloat16
    assert (np.abs(got.astype(jnp.float32) - want) <= 1.01 * 2**-8 * (size + np.abs(want))).all()


def test_no_token_is_dropped_if_all_choose_one_expert():
    config = dataclasses.replace(CONFIG, experts_per_token=1)
    params = random_experts(config)
    params["router"] = jnp.zeros_like(params["router"]).at[0, 3].set(100.0)
    x = jax.random.normal(jax.random.key(1), (2, 16, config.hidden_size)).at[..., 0].set(1.0)
    mlp = {name: params[name][3] for name in ("gate_proj", "up_proj", "down_proj")}
    want = layers.MLP(dataclasses.replace(config, intermediate_size=config.expert_size)).apply(
        {"params": mlp}, x
    )
    np.testing.assert_allclose(apply(params, x, config), want, atol=1e-5)


def test_a_token_does_not_depend_on_the_others():
    params = random_experts(CONFIG)
    x = jax.random.normal(jax.random.key(1), (2, 6, CONFIG.hidden_size))
    together = apply(params, x, CONFIG)
    for b, s in np.ndindex(2, 6):
        alone = apply(params, x[b : b + 1, s : s + 1], CONFIG)
        np.testing.assert_allclose(together[b, s], alone[0, 0], atol=1e-5)


def test_route_takes_the_most_probable_experts():
    x = jax.random.normal(jax.random.key(1), (50, CONFIG.hidden_size))
    router = random_experts(CONFIG)["router"]
    probs = np.asarray(jax.nn.softmax(x @ router, axis=-1))
    raw, experts = moe.route(x, router, dataclasses.replace(CONFIG, norm_topk_prob=False))
    np.testing.assert_array_equal(
        experts, np.argsort(-probs, axis=-1)[:, : CONFIG.experts_per_token]
    )
    np.testing.assert_allclose(raw, np.take_along_axis(probs, np.asarray(experts), -1), rtol=1e-5)


def test_norm_topk_prob_makes_gates_sum_to_one():
    x = jax.random.normal(jax.random.key(1), (50, CONFIG.hidden_size))
    router = random_experts(CONFIG)["router"]
    raw, _ = moe.route(x, router, dataclasses.replace(CONFIG, norm_topk_prob=False))
    gates, _ = moe.route(x, router, CONFIG)
    np.testing.assert_allclose(gates, raw / np.asarray(raw).sum(-1, keepdims=True), rtol=1e-5)


def test_the_router_computes_in_float32():
    x = jnp.ones((2, CONFIG.hidden_size), jnp.bfloat16)
    gates, _ = moe.route(x, random_experts(CONFIG)["router"], CONFIG)
    assert gates.dtype == jnp.float32


def test_zero_and_padding_rows_are_finite():
    params = random_experts(CONFIG)
    x = jnp.zeros((1, 3, CONFIG.hidden_size))
    grads = jax.grad(lambda p: jnp.sum(apply(p, x, CONFIG) ** 2))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(apply(params, x, CONFIG), x)


@pytest.mark.parametrize(("j", "norm"), [(1, True), (2, False), (3, True), (4, True)])
def test_replayed_experts_replace_the_choice_of_the_router(j, norm):
    """The router chooses three. Values and gradients equal the dense form's, restricted to the
    replayed experts; the router's gradient also equals a finite difference.
    """
    config = dataclasses.replace(CONFIG, experts_per_token=3, norm_topk_prob=norm)
    params = random_experts(config)
    x = jax.random.normal(jax.random.key(1), (3, 4, config.hidden_size))
    replayed = np.argsort(np.random.default_rng(0).random((3, 4, config.num_experts)), axis=-1)[
        ..., :j
    ].astype(np.int16)
    free = np.arange(12).reshape(3, 4, 1) % 3 == 0
    direction = jax.random.normal(jax.random.key(2), x.shape)

    def replay(params, x):
        y, _ = layers.MoE(config).apply(
            {"params": params}, x, replayed=jnp.where(free, -1, replayed).astype(jnp.int16)
        )
        return y

    def restricted(params, x):
        probs = jax.nn.softmax(x @ params["router"], axis=-1)
        own = probs >= jnp.sort(probs, axis=-1)[..., -3, None]
        gates = jnp.where(
            jnp.where(free, own, jax.nn.one_hot(replayed, config.num_experts).any(-2)), probs, 0
        )
        gates = gates / gates.sum(-1, keepdims=True) if norm else gates
        gate, up = (
            jnp.einsum("bsd,edf->bsef", x, params[name]) for name in ("gate_proj", "up_proj")
        )
        return jnp.einsum("bsef,efd,bse->bsd", jax.nn.silu(gate) * up, params["down_proj"], gates)

    def value(f):
        return jax.jit(
            jax.value_and_grad(lambda p, x: jnp.sum(f(p, x) * direction), argnums=(0, 1))
        )

    (loss, got), (expected, want) = value(replay)(params, x), value(restricted)(params, x)
    assert abs(loss - expected) < 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), got, want)
    along = jax.random.normal(jax.random.key(3), params["router"].shape)
    up, down = (
        value(replay)(params | {"router": params["router"] + e * along}, x)[0]
        for e in (1e-2, -1e-2)
    )
    assert (up - down) / 2e-2 == pytest.approx(
        float(jnp.sum(got[0]["router"] * along)), rel=1e-2, abs=2e-3
    )


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
def test_quantized_experts_equal_the_dequantized_ones(dtype):
    params = random_experts(CONFIG)
    x = jax.random.normal(jax.random.key(1), (2, 6, CONFIG.hidden_size))
    few = {
        name: w if name == "router" else quantized.quantize(w, dtype, (-2,))
        for name, w in params.items()
    }
    plain = {name: w if name == "router" else w.dequantize() for name, w in few.items()}
    np.testing.assert_allclose(apply(few, x, CONFIG), apply(plain, x, CONFIG), atol=1e-5)
    assert np.abs(apply(few, x, CONFIG) - apply(params, x, CONFIG)).max() > 1e-3


def test_tokens_that_are_not_active_change_nothing_for_the_others():
    """With tiles that are full, half full and empty."""
    config = dataclasses.replace(CONFIG, experts_per_token=3)
    params = random_experts(config)
    x = jax.random.normal(jax.random.key(1), (40, 1, config.hidden_size))
    some = jax.jit(lambda x, active: layers.MoE(config).apply({"params": params}, x, active)[0])
    for count in (0, 1, 7, 40):
        active = np.isin(np.arange(40), np.random.default_rng(count).permutation(40)[:count])
        poisoned = jnp.where(active[:, None, None], x, jnp.nan)
        np.testing.assert_allclose(
            some(poisoned, active)[active], dense(params, x, config)[active], atol=1e-5
        )
        assert not np.asarray(some(x, active))[~active].any()
