"""The sparse feed-forward of Qwen3-MoE: a softmax router, and a grouped matrix product that drops no token."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models.quantized import Quantized, einsum, precision

NORMAL = nn.initializers.normal(0.02)


def parameter(module: nn.Module, name: str, shape: tuple, axes: tuple, init=NORMAL):
    """Declare a parameter: its shape, the logical name of each axis, and how it starts."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype)


def route(x: jax.Array, router: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Top-k experts of each token and their gates.

        p = softmax(x @ router) over all E experts, in float32
        gates = top-k of p, divided by their sum if norm_topk_prob

    x [N, D], router [D, E] -> gates [N, k] float32, experts [N, k] int32.
    """
    probs = jax.nn.softmax(einsum("nd,de->ne", x, router, jnp.float32), axis=-1)
    gates, experts = jax.lax.top_k(probs, config.experts_per_token)
    if config.norm_topk_prob:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return gates, experts


def grouped(x: jax.Array, w: jax.Array | Quantized, sizes: jax.Array, expert: jax.Array, dtype) -> jax.Array:
    """Row i of `x` times the matrix of its expert; rows are sorted by expert.

    x [M, I], w [E, I, O], sizes [E] rows per expert, expert [M] of each row -> [M, O] in `dtype`.
    """
    values = w.values if isinstance(w, Quantized) else w
    y = jax.lax.ragged_dot(
        x.astype(dtype), values.astype(dtype), sizes, precision=precision(dtype), preferred_element_type=jnp.float32
    )
    if isinstance(w, Quantized):
        y = y * w.scale[expert, 0]
    return y.astype(dtype)


class MoE(nn.Module):
    """Mixture of SwiGLU experts: `sum over the top-k e of gate_e * down_e(silu(gate_proj_e x) * up_proj_e x)`.

    Experts are `gate_proj`, `up_proj` [E, D, F] and `down_proj` [E, F, D]; `router` is [D, E].
    """

    config: ModelConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, D]."""
        c = self.config
        wide = (c.num_experts, c.hidden_size, c.expert_size)
        # The softmax runs over every expert, so the router is not split along them.
        router = parameter(self, "router", (c.hidden_size, c.num_experts), ("embed", None))
        gate_proj = parameter(self, "gate_proj", wide, ("experts", "embed", "mlp"))
        up_proj = parameter(self, "up_proj", wide, ("experts", "embed", "mlp"))
        down_proj = parameter(self, "down_proj", (wide[0], wide[2], wide[1]), ("experts", "mlp", "embed"))

        tokens = x.reshape(-1, c.hidden_size)
        gates, experts = route(tokens, router, c)
        order = jnp.argsort(experts.reshape(-1))
        expert = experts.reshape(-1)[order]
        sizes = jnp.bincount(expert, length=c.num_experts).astype(jnp.int32)
        rows = tokens[order // c.experts_per_token]
        inner = nn.silu(grouped(rows, gate_proj, sizes, expert, x.dtype))
        inner = inner * grouped(rows, up_proj, sizes, expert, x.dtype)
        rows = grouped(inner, down_proj, sizes, expert, x.dtype)
        # Undoing the sort by a gather keeps the sum over experts in one fixed order.
        rows = rows[jnp.argsort(order)].reshape(*gates.shape, c.hidden_size)
        return jnp.sum(rows.astype(jnp.float32) * gates[..., None], axis=1).astype(x.dtype).reshape(x.shape)
