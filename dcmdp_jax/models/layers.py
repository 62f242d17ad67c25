"""A layer of the decoder and its parts: attention, SwiGLU, mixture of experts, RMS norm.

    x = x + attention(norm(x))
    x = x + feed_forward(norm(x))

The switches of `ModelConfig` decide which parameters a part has. B rows, S positions, D model, H
q-heads, KV kv-heads, G = H / KV, h head size, F feed-forward, E experts, k experts a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models import moe
from dcmdp_jax.models.kernels import dispatch, swiglu
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import project
from dcmdp_jax.models.rope import rotate

# (q [B, KV, G, S, h], k, v [B, KV, S, h]) -> (out [B, KV, G, S, h], anything the caller keeps)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Layer(nn.Module):
    """Pre-norm decoder layer, dense or sparse.

    `attend` computes the attention of queries, keys and values. Training masks whole rows with it;
    decoding reads and writes a cache, which is what it keeps.
    """

    config: ModelConfig
    sparse: bool
    param_dtype: Any = jnp.float32
    mesh: jax.sharding.Mesh | None = None  # as in `moe.mixture`

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        attend: Attend,
        active: jax.Array | None = None,
        replayed: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """x [B, S, D] -> [B, S, D], what `attend` keeps, and a sparse layer's experts [B, S, k].

        `active` and `replayed` as for `MoE`.
        """
        c = self.config
        dtype = self.param_dtype
        y = RMSNorm(c, param_dtype=dtype, name="input_norm")(x)
        y, kept = Attention(c, dtype, name="attention")(y, cos, sin, attend)
        x = x + y
        y = RMSNorm(c, param_dtype=dtype, name="post_attention_norm")(x)
        if not self.sparse:
            return x + MLP(c, dtype, name="mlp")(y), kept, None
        y, experts = MoE(c, dtype, self.mesh, name="moe")(y, active, replayed)
        return x + y, kept, experts


class Attention(nn.Module):
    """Grouped-query attention."""

    config: ModelConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """x [B, S, D] -> [B, S, D], and what `attend` keeps."""
        c = self.config
        rows, length, _ = x.shape
        q_BxSxHxh = self._heads(x, "q", c.num_heads, "q_heads")
        k_BxSxKVxh = self._heads(x, "k", c.num_kv_heads, "kv_heads")
        v_BxSxKVxh = self._heads(x, "v", c.num_kv_heads, "kv_heads")
        if c.qk_norm:
            q_BxSxHxh = RMSNorm(c, "head_dim", self.param_dtype, name="q_norm")(q_BxSxHxh)
            k_BxSxKVxh = RMSNorm(c, "head_dim", self.param_dtype, name="k_norm")(k_BxSxKVxh)
        q = rotate(q_BxSxHxh, cos, sin).reshape(rows, length, c.num_kv_heads, -1, c.head_dim)
        k = rotate(k_BxSxKVxh, cos, sin)
        out_BxKVxGxSxh, kept = attend(
            q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v_BxSxKVxh.swapaxes(1, 2)
        )
        out = out_BxKVxGxSxh.transpose(0, 3, 1, 2, 4).reshape(rows, length, c.num_heads, c.head_dim)
        shape = (c.num_heads, c.head_dim, c.hidden_size)
        o_proj = parameter(self, "o_proj", shape, ("q_heads", "head_dim", "embed"))
        y = project(out, o_proj, contract=2)
        if c.o_bias:
            y = y + self._bias("o", (c.hidden_size,), ("embed",), x.dtype)
        return y, kept

    def _heads(self, x: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
        """Projects [B, S, D] to [B, S, heads, h]."""
        c = self.config
        w = parameter(
            self, f"{name}_proj", (c.hidden_size, heads, c.head_dim), ("embed", axis, "head_dim")
        )
        y = project(x, w)
        if c.qkv_bias:
            y = y + self._bias(name, (heads, c.head_dim), (axis, "head_dim"), x.dtype)
        return y

    def _bias(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], dtype) -> jax.Array:
        return parameter(self, f"{name}_bias", shape, axes, nn.initializers.zeros).astype(dtype)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): `down(silu(gate x) * up x)`."""

    config: ModelConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, S, D] -> [B, S, D]."""
        d = self.config.hidden_size
        f = self.config.intermediate_size
        gate_proj = parameter(self, "gate_proj", (d, f), ("embed", "mlp"))
        up_proj = parameter(self, "up_proj", (d, f), ("embed", "mlp"))
        down_proj = parameter(self, "down_proj", (f, d), ("mlp", "embed"))
        return swiglu.dense(x, gate_proj, up_proj, down_proj)


class MoE(nn.Module):
    """A router (see `moe.route`) and a mixture of SwiGLU experts (see `moe.mixture`; over several
    devices, `dispatch.mixture`).
    """

    config: ModelConfig
    param_dtype: Any = jnp.float32
    mesh: jax.sharding.Mesh | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, active: jax.Array | None = None, replayed: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, S, D] -> [B, S, D], and its experts [B, S, k]; active [B, S] as in `moe.mixture`,
        replayed [B, S, j] as in `moe.route`.
        """
        c = self.config
        e = c.num_experts
        d = c.hidden_size
        f = c.expert_size
        # The softmax is over all experts, so the router is not split along them.
        router = parameter(self, "router", (d, e), ("embed", None))
        gate_proj = parameter(self, "gate_proj", (e, d, f), ("experts", "expert_embed", "mlp"))
        up_proj = parameter(self, "up_proj", (e, d, f), ("experts", "expert_embed", "mlp"))
        down_proj = parameter(self, "down_proj", (e, f, d), ("experts", "mlp", "expert_embed"))
        weights = swiglu.Experts(gate_proj, up_proj, down_proj)
        gates, experts = moe.route(x, router, c, replayed)
        if sharding.current_mesh() is not None and not self.is_initializing():
            return dispatch.mixture(x, gates, experts, weights), experts
        return moe.mixture(x, gates, experts, weights, active, self.mesh), experts


class RMSNorm(nn.Module):
    """`rms_norm` with its learned scale; `axis` is the logical name of the normalized axis."""

    config: ModelConfig
    axis: str = "embed"
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., n] -> [..., n]."""
        scale = parameter(self, "scale", x.shape[-1:], (self.axis,), nn.initializers.ones)
        return rms_norm(x, scale, self.config.rms_norm_eps)


# Recomputed in the backward pass, which is cheaper than saving its intermediates.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32 (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def compute_dtype(config: ModelConfig):
    """Returns the dtype of activations and matrix products."""
    return jnp.bfloat16 if config.compute.bfloat16 else jnp.float32


def parameter(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Callable = nn.initializers.normal(0.02),
) -> jax.Array:
    """Declares a parameter: its shape, the logical name of each axis, and its initializer."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype)
