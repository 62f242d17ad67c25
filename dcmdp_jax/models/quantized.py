"""A weight held in few bits, and the matrix products that accept it in place of an array."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.int4): 7.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight `values * scale`, symmetric, one scale per output channel.

    values: int8, int4 or float8_e4m3fn, the weight's shape.
    scale: float32, the same rank; the axes the matrix product contracts have size 1.
    """

    values: jax.Array
    scale: jax.Array

    def dequantize(self) -> jax.Array:
        """`values * scale` in float32."""
        return self.values.astype(jnp.float32) * self.scale


def quantize(w: jax.Array, dtype, contract_axes: tuple[int, ...]) -> Quantized:
    """Round `w` to `dtype` with one scale per output channel.

        scale = max |w| over `contract_axes` / largest value of `dtype`,    values = round(w / scale)

    Channels that are zero throughout get scale 1. Raises ValueError for a dtype other than int8, int4, float8_e4m3fn.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in LARGEST:
        raise ValueError(f"quantize: {dtype} is not one of {', '.join(map(str, LARGEST))}; cast with astype instead")
    w = w.astype(jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=contract_axes, keepdims=True) / LARGEST[dtype]
    scale = jnp.where(scale > 0, scale, 1.0)
    values = jnp.clip(w / scale, -LARGEST[dtype], LARGEST[dtype])
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return Quantized(values.astype(dtype), scale)


def precision(dtype) -> jax.lax.Precision:
    """Float32 stays float32 on accelerators that would otherwise multiply it in fewer bits."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def einsum(spec: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """`einsum` of operands cast to `dtype`, accumulated and returned in float32."""
    return jnp.einsum(
        spec, x.astype(dtype), y.astype(dtype), precision=precision(dtype), preferred_element_type=jnp.float32
    )


def project(spec: str, x: jax.Array, w: jax.Array | Quantized, dtype) -> jax.Array:
    """`einsum(spec, x, w)` in `dtype`; a `Quantized` weight is scaled after the product.

    The output must end with the weight's free axes in the weight's order, as in `"...d,dnh->...nh"`.
    """
    if not isinstance(w, Quantized):
        return einsum(spec, x, w, dtype).astype(dtype)
    operands, out = spec.split("->")
    contracted = tuple(i for i, axis in enumerate(operands.split(",")[1]) if axis not in out)
    return (einsum(spec, x, w.values, dtype) * jnp.squeeze(w.scale, contracted)).astype(dtype)
