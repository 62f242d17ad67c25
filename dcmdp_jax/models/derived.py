"""Projections that are made from other arrays where a layer is run: one layer's are in memory at a
time, in training as in the conversion to an engine's weights.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax.models.quantized import SCALED, Quantized, quantize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A projection with a low-rank adapter, `base + scale * (down @ up)` (arXiv 2106.09685).

    The sum is what is multiplied with, not the two products one after the other: it is the weight
    that the engine samples with, so that an adapter adds nothing to the gap between the two.

    base: [..., *I, *O], the axes of layers and experts first, then inputs and outputs.
    down: [..., *I, r]; up: [..., r, *O]; scale: alpha / r.
    """

    base: jax.Array | Quantized
    down: jax.Array
    up: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the sum."""
        return self.base.shape

    def array(self) -> jax.Array:
        """Returns the sum, in float32."""
        base = self.base
        base = base.dequantize() if isinstance(base, Quantized) else base.astype(jnp.float32)
        leading = tuple(range(self.down.ndim + self.up.ndim - 2 - base.ndim))
        product = jax.lax.dot_general(
            self.down,
            self.up,
            (((self.down.ndim - 1,), (len(leading),)), (leading, leading)),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return base + self.scale * product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A projection in a number format of the engine, as `straight_through` rounds it."""

    weight: jax.Array | LowRank
    form: str = dataclasses.field(metadata={"static": True})
    contracted: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the projection."""
        return self.weight.shape

    def array(self) -> jax.Array:
        """Returns the rounded weights, in float32."""
        exact = array(self.weight).astype(jnp.float32)
        return straight_through(exact, self.form, self.contracted, self.group)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def straight_through(
    w: jax.Array, form: str, contracted: tuple[int, ...], group: int = 0
) -> jax.Array:
    """Returns `w` rounded to a format of `quantized.FORMATS`, in its own dtype; "" is none.

    Its gradient is that of `w` itself (the straight-through estimator, arXiv 1308.3432): a loss has
    the gradient at the rounded weights. `contracted` and `group` as for `quantized.quantize`.
    """
    if form in ("", "float32"):
        return w
    if form not in SCALED:
        return w.astype(form).astype(w.dtype)
    return quantize(w, form, contracted, group).dequantize().astype(w.dtype)


straight_through.defvjp(
    lambda w, form, contracted, group: (straight_through(w, form, contracted, group), None),
    lambda form, contracted, group, _, gradient: (gradient,),
)


def array(w: Any) -> Any:
    """Returns the array that a weight stands for; arrays and `Quantized` ones are themselves."""
    return w.array() if isinstance(w, (LowRank, Rounded)) else w


def is_weight(node: Any) -> bool:
    """True if a node of a tree is one weight, made of several arrays."""
    return isinstance(node, (LowRank, Rounded, Quantized))


def arrays(params: Any) -> Any:
    """Returns parameters with all derived ones made, on their devices, and then all in float32."""
    if not any(
        isinstance(w, (LowRank, Rounded)) for w in jax.tree.leaves(params, is_leaf=is_weight)
    ):
        return params

    def in_float32(w: Any) -> jax.Array:
        return array(w).astype(jnp.float32)

    return jax.jit(partial(jax.tree.map, in_float32, is_leaf=is_weight))(params)
