"""Experts on many devices: tokens are sent to the devices that hold their experts, and back, in
rounds of bounded size.

Assignments of tokens to experts are sorted by expert. In each round every device sends at most
`max_rows / shards` rows to each shard of the expert axis, so that buffers do not grow with the
number of shards. There are as many rounds as it takes to send all rows, so that none is dropped
however unequal the load. The backward pass repeats the rounds and saves no row. R rows, S
positions, k experts a token, D model, F expert size, E experts; E, F and D may be a shard's.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models.kernels import tiles
from dcmdp_jax.models.kernels.experts import expert_outputs
from dcmdp_jax.models.kernels.swiglu import Experts

SLACK = 1.25  # room for an unequal load before a second round is needed

# Logical axes of x, gates and experts, of the gathered weights and of their sharded gradients.
TOKENS = ("rows", "positions", None)
GATHERED = ("experts", None, "mlp"), ("experts", None, "mlp"), ("experts", "mlp", None)
SHARDED = (
    ("experts", "split_expert_embed", "mlp"),
    ("experts", "split_expert_embed", "mlp"),
    ("experts", "mlp", "split_expert_embed"),
)


def mixture(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    weights: Experts,
    *,
    max_rows: int = tiles.EXCHANGE_ROWS,
) -> jax.Array:
    """Returns `moe.mixture` over the current mesh: x [R, S, D], gates, experts [R, S, k] -> [R, S,
    D]. A device receives at most `max_rows` rows in a round.
    """
    return _mixture(max_rows, x, gates, experts, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(
    max_rows: int, x: jax.Array, gates: jax.Array, experts: jax.Array, weights: Experts
) -> jax.Array:
    def on_shard(x, gates, experts, *weights):
        plan = _plan(experts, weights[0].shape[0], max_rows)
        tokens = x.reshape(-1, x.shape[-1])

        def exchange(t, y):
            row, token, valid = _round(plan, t, gates.shape[-1])
            received = _send(_rows(tokens, token, valid))
            out = _back(_expert(received, _ids(plan, row, valid), Experts(*weights)))
            gate = jnp.where(valid, gates.reshape(-1)[row], 0)
            return y.at[token].add(out.astype(jnp.float32) * gate[..., None])

        y = jax.lax.fori_loop(0, plan.rounds, exchange, jnp.zeros(tokens.shape, jnp.float32))
        return jax.lax.psum(y, "tensor").astype(x.dtype).reshape(x.shape)

    return sharding.shard_map(on_shard, TOKENS, TOKENS, TOKENS, *GATHERED, out=TOKENS)(
        x, gates, experts, *weights
    )


def _forward(max_rows, x, gates, experts, weights):
    return _mixture(max_rows, x, gates, experts, weights), (x, gates, experts, weights)


def _backward(max_rows, residuals, dy):
    """Sends the rows and the gradients of their results; the experts' gradients stay where the
    experts are.
    """

    def on_shard(x, gates, experts, dy, *weights):
        plan = _plan(experts, weights[0].shape[0], max_rows)
        weights = Experts(*weights)
        tokens = x.reshape(-1, x.shape[-1])
        dy = dy.reshape(-1, x.shape[-1])
        flat = gates.reshape(-1)

        def exchange(t, carry):
            dx, dgates, dweights = carry
            row, token, valid = _round(plan, t, gates.shape[-1])
            ids = _ids(plan, row, valid)
            gate = _send(jnp.where(valid, flat[row], 0))
            received = _send(_rows(tokens, token, valid))
            out, vjp = jax.vjp(lambda rows, w: _expert(rows, ids, w), received, weights)
            dy_received = _send(_rows(dy, token, valid)).astype(jnp.float32)
            drows, dw = vjp((dy_received * gate[..., None]).astype(out.dtype))
            dgate = _back(jnp.sum(dy_received * out.astype(jnp.float32), axis=-1))
            dx = dx.at[token].add(jnp.where(valid[..., None], _back(drows).astype(jnp.float32), 0))
            dgates = dgates.at[row].add(jnp.where(valid, dgate, 0))
            dweights = jax.tree.map(lambda total, d: total + d.astype(jnp.float32), dweights, dw)
            return dx, dgates, dweights

        zero = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), (tokens, flat, weights))
        dx, dgates, dweights = jax.lax.fori_loop(0, plan.rounds, exchange, zero)
        dx, dgates = jax.lax.psum((dx, dgates), "tensor")
        dweights = [
            _reduced(d.astype(w.dtype), names)
            for d, w, names in zip(dweights, weights, SHARDED, strict=True)
        ]
        return dx.astype(x.dtype).reshape(x.shape), dgates.reshape(gates.shape), *dweights

    x, gates, experts, weights = residuals
    dx, dgates, *dweights = sharding.shard_map(
        on_shard, TOKENS, TOKENS, TOKENS, TOKENS, *GATHERED, out=(TOKENS, TOKENS, *SHARDED)
    )(x, gates, experts, dy, *weights)
    return dx, dgates, None, Experts(*dweights)


_mixture.defvjp(_forward, _backward)


class _Plan(NamedTuple):
    """One device's assignments, in the order in which they are sent."""

    experts: jax.Array  # [a], the expert of each assignment
    order: jax.Array  # [a], assignments sorted by expert
    start: jax.Array  # [shards], the first of the sorted assignments that go to a shard
    count: jax.Array  # [shards], how many go there
    size: int  # assignments sent to each shard in a round
    local: int  # experts of a shard
    rounds: jax.Array  # [], the same on all devices


def _plan(experts: jax.Array, local: int, max_rows: int) -> _Plan:
    flat = experts.reshape(-1)
    shards = jax.lax.axis_size("expert")
    size = min(math.ceil(flat.size * SLACK / shards), max(max_rows // shards, 8))
    count = jnp.bincount(flat // local, length=shards)
    rounds = jax.lax.pmax(-(-jnp.max(count) // size), sharding.AXES)
    return _Plan(flat, jnp.argsort(flat), jnp.cumsum(count) - count, count, size, local, rounds)


def _round(plan: _Plan, t: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the assignments, tokens and validity of round t, [shards, size] each."""
    place = t * plan.size + jnp.arange(plan.size)
    valid = place < plan.count[:, None]
    row = plan.order[jnp.where(valid, plan.start[:, None] + place, 0)]
    return row, row // k, valid


def _ids(plan: _Plan, row: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the expert of each received row, by its number in the shard; empty rows are zero and
    go to the last expert.
    """
    return _send(jnp.where(valid, plan.experts[row] % plan.local, plan.local - 1))


def _rows(tokens: jax.Array, token: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.where(valid[..., None], tokens[token], 0)


def _expert(rows: jax.Array, ids: jax.Array, weights: Experts) -> jax.Array:
    """[shards, size, D] -> [shards, size, D], each row by its expert."""
    flat = rows.reshape(-1, rows.shape[-1])
    return expert_outputs(flat, ids.reshape(-1, 1), weights).reshape(rows.shape)


def _send(x: jax.Array) -> jax.Array:
    """Sends part i of [shards, ...] to shard i of the expert axis."""
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)


_back = _send  # the exchange is its own inverse


def _reduced(d: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Returns this device's part of the sum over the devices that hold the same experts."""
    axis = names.index("split_expert_embed")
    d = jax.lax.psum_scatter(d, ("fsdp", "sequence"), scatter_dimension=axis, tiled=True)
    return jax.lax.psum(d, "data")
