"""Experts on many devices: tokens travel to the devices that hold their experts, and back, a
bounded number at a time.

Assignments of tokens to experts are sorted by expert. In each round every device sends at most
`ROWS / shards` rows to each shard of the expert axis, so that buffers do not grow with the number
of shards; rounds go on until all rows have travelled, so that none is dropped however unequal the
load. The backward pass makes the same rounds again and keeps no row. r rows, s positions, k experts
a token, D model, F expert size, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models.moe import Experts, expert_outputs

ROWS = 16_384  # received by a device in a round, at most
SLACK = 1.25  # room for an unequal load before a second round is needed

TOKENS = ("rows", "positions", None)
WIDE = ("experts", None, "mlp"), ("experts", None, "mlp"), ("experts", "mlp", None)
SPLIT = (
    ("experts", "split_expert_embed", "mlp"),
    ("experts", "split_expert_embed", "mlp"),
    ("experts", "mlp", "split_expert_embed"),
)


@jax.custom_vjp
def mixture(x: jax.Array, gates: jax.Array, experts: jax.Array, weights: Experts) -> jax.Array:
    """`moe.mix` over the ambient mesh: x [R, S, D], gates, experts [R, S, k] -> [R, S, D]."""

    def local(x, gates, experts, *weights):
        plan = _plan(experts, weights[0].shape[0])
        tokens = x.reshape(-1, x.shape[-1])

        def one(t, y):
            row, token, valid = _turn(plan, t, gates.shape[-1])
            out = _back(
                _expert(
                    _send(_rows(tokens, token, valid)), _ids(plan, row, valid), Experts(*weights)
                )
            )
            gate = jnp.where(valid, gates.reshape(-1)[row], 0)
            return y.at[token].add(out.astype(jnp.float32) * gate[..., None])

        y = jax.lax.fori_loop(0, plan.rounds, one, jnp.zeros(tokens.shape, jnp.float32))
        return jax.lax.psum(y, "tensor").astype(x.dtype).reshape(x.shape)

    return sharding.shard_map(local, TOKENS, TOKENS, TOKENS, *WIDE, out=TOKENS)(
        x, gates, experts, *weights
    )


def _forward(x, gates, experts, weights):
    return mixture(x, gates, experts, weights), (x, gates, experts, weights)


def _backward(kept, dy):
    """Both the rows and what is to come back for them travel; the experts' gradients stay where the
    experts are.
    """

    def local(x, gates, experts, dy, *weights):
        plan = _plan(experts, weights[0].shape[0])
        weights = Experts(*weights)
        tokens = x.reshape(-1, x.shape[-1])
        dy = dy.reshape(-1, x.shape[-1])
        flat = gates.reshape(-1)

        def one(t, carry):
            dx, dgates, dweights = carry
            row, token, valid = _turn(plan, t, gates.shape[-1])
            ids = _ids(plan, row, valid)
            gate = _send(jnp.where(valid, flat[row], 0))
            out, pull = jax.vjp(
                lambda rows, w: _expert(rows, ids, w), _send(_rows(tokens, token, valid)), weights
            )
            coming = _send(_rows(dy, token, valid)).astype(jnp.float32)
            drows, dw = pull((coming * gate[..., None]).astype(out.dtype))
            dgate = _back(jnp.sum(coming * out.astype(jnp.float32), axis=-1))
            dx = dx.at[token].add(jnp.where(valid[..., None], _back(drows).astype(jnp.float32), 0))
            dgates = dgates.at[row].add(jnp.where(valid, dgate, 0))
            return (
                dx,
                dgates,
                jax.tree.map(lambda total, d: total + d.astype(jnp.float32), dweights, dw),
            )

        zero = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), (tokens, flat, weights))
        dx, dgates, dweights = jax.lax.fori_loop(0, plan.rounds, one, zero)
        dx, dgates = jax.lax.psum((dx, dgates), "tensor")
        dweights = [
            _reduced(d.astype(w.dtype), names) for d, w, names in zip(dweights, weights, SPLIT)
        ]
        return dx.astype(x.dtype).reshape(x.shape), dgates.reshape(gates.shape), *dweights

    x, gates, experts, weights = kept
    dx, dgates, *dweights = sharding.shard_map(
        local, TOKENS, TOKENS, TOKENS, TOKENS, *WIDE, out=(TOKENS, TOKENS, *SPLIT)
    )(x, gates, experts, dy, *weights)
    return dx, dgates, None, Experts(*dweights)


mixture.defvjp(_forward, _backward)


class _Plan(NamedTuple):
    """One device's assignments, in the order in which they leave."""

    experts: jax.Array  # [a] of each assignment
    order: jax.Array  # [a] assignments sorted by expert
    start: jax.Array  # [shards] first of the sorted assignments that go to a shard
    count: jax.Array  # [shards]
    size: int  # assignments that leave for each shard in a round
    local: int  # experts of a shard
    rounds: jax.Array  # [] the same on all devices


def _plan(experts: jax.Array, local: int) -> _Plan:
    flat = experts.reshape(-1)
    shards = jax.lax.axis_size("expert")
    size = min(math.ceil(flat.size * SLACK / shards), max(ROWS // shards, 8))
    count = jnp.bincount(flat // local, length=shards)
    rounds = jax.lax.pmax(-(-jnp.max(count) // size), sharding.AXES)
    return _Plan(flat, jnp.argsort(flat), jnp.cumsum(count) - count, count, size, local, rounds)


def _turn(plan: _Plan, t: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Assignments, tokens and validity [shards, size] of round t."""
    place = t * plan.size + jnp.arange(plan.size)
    valid = place < plan.count[:, None]
    row = plan.order[jnp.where(valid, plan.start[:, None] + place, 0)]
    return row, row // k, valid


def _ids(plan: _Plan, row: jax.Array, valid: jax.Array) -> jax.Array:
    """Expert of each received row, by its number in the shard; empty rows are the last expert's,
    and zero.
    """
    return _send(jnp.where(valid, plan.experts[row] % plan.local, plan.local - 1))


def _rows(tokens: jax.Array, token: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.where(valid[..., None], tokens[token], 0)


def _expert(rows: jax.Array, ids: jax.Array, weights: Experts) -> jax.Array:
    """[shards, size, D] -> [shards, size, D], each row by its expert."""
    return expert_outputs(rows.reshape(-1, rows.shape[-1]), ids.reshape(-1, 1), weights).reshape(
        rows.shape
    )


def _send(x: jax.Array) -> jax.Array:
    """Part i of [shards, ...] to shard i."""
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)


_back = _send  # the exchange is its own inverse


def _reduced(d: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """The sum over devices that hold the same experts, each keeping the part that it stores."""
    axis = names.index("split_expert_embed")
    d = jax.lax.psum_scatter(d, ("fsdp", "sequence"), scatter_dimension=axis, tiled=True)
    return jax.lax.psum(d, "data")
