"""Log-probs and entropies of given tokens, without logits for a whole batch, and only where they
are asked for.

R rows, S positions, D model, V vocabulary; c positions of a row are scored together, v words at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models import decoder
from dcmdp_jax.models.layers import compute_dtype
from dcmdp_jax.models.quantized import einsum

CHUNK = 1 << 24  # logits held at a time
CPU_TOKENS = (1024, 256, 64)
CPU_WIDTH = 1024  # of tiles of logits on a CPU: they stay in its last cache
WIDTH = 8192  # words of a tile elsewhere; of a split weight, what is gathered at a time
PLACE = ("rows", "positions")
At = tuple[jax.Array, int]  # where a tile begins, and its size
LOW = -1e30  # below every logit; finite, so that it may be subtracted from itself


class Tiling(NamedTuple):
    """How logits are made, c x `width` of each row at a time."""

    # c, and those of the tiles of what is left after whole ones; each divides the one before
    sizes: tuple[int, ...]
    width: int  # v
    vocabulary: int  # V, or this device's part of it
    tied: bool  # the weight is [V, D], not [D, V]
    dtype: Any  # of the operands of products
    temperature: float
    entropy: bool
    split: bool  # over the ambient mesh: rows, positions, and the weight along both axes


class Moved(NamedTuple):
    """The wanted positions of each row moved to its front, in order; C >= S is a multiple of c."""

    hidden: jax.Array  # [R, C, D]
    targets: jax.Array  # [R, C]
    order: jax.Array  # [R, C], where each comes from
    rank: jax.Array  # [R, S], where each position went
    count: jax.Array  # [], wanted positions in the row that has most


def token_logp(
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    config: ModelConfig,
    temperature: float,
    *,
    entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-prob of `targets` and entropy under softmax(head(hidden) / temperature), float32 nats.

    Formula: logp = z_target - logsumexp(z), entropy = logsumexp(z) - sum_v softmax(z)_v z_v, z =
        logits / temperature.

    Args:
      hidden: [R, S, D]; targets: [R, S] int32; wanted: [R, S] bool, where values are needed.
          Nothing is computed for the
        others: rows are scored as long as one has wanted positions left, and on a CPU all of them
            as one row.
      entropy: whether to make it.

    Returns:
      logp [R, S], entropy [R, S] or None, 0 where not wanted. The entropy carries no gradient. At
      most `CHUNK` logits are held
      at a time (or one position's of each row); the backward pass makes them again.
    """
    weight = params["embed"] if config.tie_word_embeddings else params["head"]
    rows, columns = targets.shape
    mesh = sharding.current_mesh()

    def tiling(rows, columns, vocabulary, most_words=WIDTH, sizes=()):
        parts = -(-vocabulary // most_words)
        # whole vectors of the processor
        width = min(-(-vocabulary // parts // 128) * 128, vocabulary)
        most = max(min(CHUNK // (rows * width), columns), 1)
        # A tile of all positions would be made before the loops over tiles, though none of them
        # takes it.
        sizes = tuple(size for size in sizes if size <= most and size < columns) or (most,)
        return Tiling(
            sizes,
            width,
            vocabulary,
            config.tie_word_embeddings,
            compute_dtype(config),
            temperature,
            entropy,
            mesh is not None,
        )

    if mesh is not None:
        here = (
            *sharding.local_shape(PLACE, (rows, columns)),
            config.vocab_size // mesh.shape["tensor"],
        )
        out = _score(tiling(*here), hidden, weight, targets, wanted)
        return out[0], out[1] if entropy else None

    def in_one(hidden, weight, targets, wanted):
        flat = [x.reshape(1, rows * columns, *x.shape[2:]) for x in (hidden, targets, wanted)]
        made = _score(
            tiling(1, rows * columns, config.vocab_size, CPU_WIDTH, CPU_TOKENS),
            flat[0],
            weight,
            *flat[1:],
        )
        return [x.reshape(rows, columns) for x in made]

    by_row = partial(_score, tiling(rows, columns, config.vocab_size))
    out = jax.lax.platform_dependent(hidden, weight, targets, wanted, cpu=in_one, default=by_row)
    return out[0], out[1] if entropy else None


def packed_logp(
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    index: jax.Array,
    config: ModelConfig,
    temperature: float,
    *,
    entropy: bool = False,
    experts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-prob and entropy [n, T] of completion tokens in packed rows [R, S]; `index` and `experts`
    as in `records.Batch`.

    What stands at masked places means nothing.
    """
    rows = None
    if sharding.current_mesh() is None:
        rows, table = _look_up(params["embed"], tokens)
        params = params | {"embed": table}
        rows = rows.astype(compute_dtype(config))
    hidden = decoder.hidden(
        params,
        tokens,
        config,
        positions=positions,
        segment_ids=segment_ids,
        embedded=rows,
        experts=experts,
    )
    # the last column predicts nothing and is not in `index`
    following = jnp.roll(tokens, -1, axis=1)
    wanted = jnp.zeros(tokens.size, bool).at[index].set(True).reshape(tokens.shape)
    out = token_logp(params, hidden, following, wanted, config, temperature, entropy=entropy)
    return jax.tree.map(lambda x: x.reshape(-1)[index], out)


@jax.custom_vjp
def _look_up(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of the table, and the table for a head tied to it: their gradients add up in one array,
    which is as large.
    """
    return table[tokens], table


_look_up.defvjp(
    lambda table, tokens: (_look_up(table, tokens), tokens),
    lambda tokens, grads: (grads[1].at[tokens].add(grads[0]), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(
    tiling: Tiling, hidden: jax.Array, weight: jax.Array, targets: jax.Array, wanted: jax.Array
) -> list[jax.Array]:
    return _forward(tiling, hidden, weight, targets, wanted)[0]


def _layout(tiling: Tiling) -> tuple[tuple, ...]:
    """Logical axes of hidden, weight, targets and wanted."""
    weight = ("vocab", "split_embed") if tiling.tied else ("split_embed", "vocab")
    return (*PLACE, None), weight, PLACE, PLACE


def _forward(tiling: Tiling, *arguments: jax.Array) -> tuple:
    """[logp, and entropy if asked for], [R, S] each."""
    f = partial(_values, tiling)
    if tiling.split:
        f = sharding.shard_map(f, *_layout(tiling), out=(PLACE,) * (2 + tiling.entropy))
    *out, log_total = f(*arguments)
    return out, (*arguments, log_total)


def _backward(tiling: Tiling, kept: tuple, cotangents: list[jax.Array]) -> tuple:
    f = partial(_slopes, tiling)
    if tiling.split:
        layout = _layout(tiling)
        f = sharding.shard_map(f, *layout, PLACE, PLACE, out=layout[:2])
    return *f(*kept, cotangents[0]), None, None


_score.defvjp(_forward, _backward)


def _values(
    tiling: Tiling, hidden: jax.Array, weight: jax.Array, targets: jax.Array, wanted: jax.Array
) -> tuple:
    """logp, entropy if asked for, and the moved log-sum-exp: softmax by a running maximum and sum
    over parts of the words.
    """
    moved = _move(tiling, hidden, targets, wanted)

    def part(i, sums):
        w = _words(tiling, weight, i)

        def tile(at, sums):
            top, total, moment, picked = (_cut(x, at) for x in sums)
            z, own, place = _logits(tiling, moved, w, i, at)
            new = jnp.maximum(top, jnp.max(z, axis=-1))
            shrink = jnp.exp(top - new)
            p = jnp.exp(z - new[..., None])
            if tiling.entropy:
                moment = shrink * (moment + (top - new) * total) + jnp.sum(
                    p * (z - new[..., None]), axis=-1
                )
            total = shrink * total + jnp.sum(p, axis=-1)
            picked = jnp.where(
                own, jnp.take_along_axis(z, place[..., None], axis=-1)[..., 0], picked
            )
            return tuple(_put(x, y, at) for x, y in zip(sums, (new, total, moment, picked)))

        return _each_tile(tiling, moved, tile, sums)

    zero = jnp.zeros(moved.targets.shape, jnp.float32)
    top, total, moment, picked = _each_part(tiling, part, (zero + LOW, zero, zero, zero))
    if tiling.split:
        most = jax.lax.pmax(top, "tensor")
        shrink = jnp.exp(top - most)
        sums = shrink * total, shrink * (moment + (top - most) * total), picked
        top = most
        (total, moment, picked) = jax.lax.psum(sums, "tensor")
    total = jnp.where(total > 0, total, 1)  # of places that no tile reached
    # The maximum is taken off first, as the sampler does, to round alike.
    out = [picked - top - jnp.log(total)] + [jnp.log(total) - moment / total] * tiling.entropy
    return *(jnp.where(wanted, _take(x, moved.rank), 0) for x in out), (top + jnp.log(total))[
        :, : wanted.shape[1]
    ]


def _slopes(
    tiling: Tiling,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    log_total: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """d logp / d z = onehot(target) - softmax(z), from logits made again; the weight's gradient
    adds up in place.
    """
    moved = _move(tiling, hidden, targets, wanted)
    ours = jnp.arange(moved.order.shape[1]) < jnp.sum(wanted, axis=1)[:, None]
    slope = jnp.where(ours, _take(cotangent, moved.order), 0) / tiling.temperature
    log_total = jnp.pad(log_total, ((0, 0), (0, moved.order.shape[1] - log_total.shape[1])))
    to_hidden, to_weight = (
        ("rcv,vd->rcd", "rcv,rcd->vd") if tiling.tied else ("rcv,dv->rcd", "rcd,rcv->dv")
    )
    axis = 0 if tiling.tied else 1

    def part(i, grads):
        d_hidden, d_weight = grads
        w = _words(tiling, weight, i)
        held = _cut_words(tiling, d_weight, i)

        def tile(at, grads):
            d_hidden, d_w = grads
            z, own, place = _logits(tiling, moved, w, i, at)
            g = _cut(slope, at)
            hit = own[..., None] & (jnp.arange(tiling.width) == place[..., None])
            dz = g[..., None] * (hit - jnp.exp(z - _cut(log_total, at)[..., None]))
            pair = (dz, _cut(moved.hidden, at))
            d_w = d_w + einsum(to_weight, *(pair if tiling.tied else pair[::-1]), tiling.dtype)
            rows = _cut(d_hidden, at) + einsum(to_hidden, dz, w, tiling.dtype)
            return _put(d_hidden, rows, at), d_w

        start = d_hidden, jnp.zeros(w.shape, jnp.float32) if tiling.split else held
        d_hidden, d_w = _each_tile(tiling, moved, tile, start)
        if tiling.split:
            d_w = held + sharding.reduce_scatter(d_w.astype(tiling.dtype), 1 - axis).astype(
                jnp.float32
            )
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_weight, d_w, _first(tiling, i), axis)

    zero = jnp.zeros(moved.hidden.shape, jnp.float32), jnp.zeros(weight.shape, jnp.float32)
    d_hidden, d_weight = _each_part(tiling, part, zero)
    if tiling.split:
        d_hidden = jax.lax.psum(d_hidden, "tensor")
    return _take(d_hidden, moved.rank).astype(hidden.dtype), d_weight.astype(weight.dtype)


def _move(tiling: Tiling, hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> Moved:
    rows, columns = targets.shape
    count = jnp.sum(wanted, axis=1, keepdims=True)
    rank = jnp.where(wanted, jnp.cumsum(wanted, axis=1), count + jnp.cumsum(~wanted, axis=1)) - 1
    size = -(-columns // tiling.sizes[0]) * tiling.sizes[0]
    order = (
        jnp.zeros((rows, size), jnp.int32)
        .at[jnp.arange(rows)[:, None], rank]
        .set(jnp.arange(columns), unique_indices=True)
    )
    return Moved(_take(hidden, order), _take(targets, order), order, rank, jnp.max(count))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[r, index[r, i]]: [R, S, ...], [R, C] -> [R, C, ...]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _logits(
    tiling: Tiling, moved: Moved, w: jax.Array, i: jax.Array, at: At
) -> tuple[jax.Array, ...]:
    """z [R, c, v] of a tile over part i of the vocabulary; whether each target is in that part, and
    where: [R, c].
    """
    z = einsum(
        "rcd,vd->rcv" if tiling.tied else "rcd,dv->rcv", _cut(moved.hidden, at), w, tiling.dtype
    )
    first = _first(tiling, i)
    new = i * tiling.width
    targets = _cut(moved.targets, at)
    if tiling.split:
        targets = targets - jax.lax.axis_index("tensor") * tiling.vocabulary
    if tiling.vocabulary % tiling.width:  # the last part begins with words of the one before
        z = jnp.where(first + jnp.arange(tiling.width) >= new, z, LOW)
    own = (targets >= new) & (targets < new + tiling.width)
    return z / tiling.temperature, own, jnp.clip(targets - first, 0, tiling.width - 1)


def _each_part(tiling: Tiling, part: Callable, start: Any) -> Any:
    parts = -(-tiling.vocabulary // tiling.width)
    return part(0, start) if parts == 1 else jax.lax.fori_loop(0, parts, part, start)


def _first(tiling: Tiling, i: jax.Array) -> jax.Array:
    """The word that part i begins with; the last part ends with the vocabulary."""
    return jnp.minimum(i * tiling.width, tiling.vocabulary - tiling.width)


def _words(tiling: Tiling, weight: jax.Array, i: jax.Array) -> jax.Array:
    """Part i of the vocabulary, whole along D: [v, D] or [D, v]."""
    part = _cut_words(tiling, weight, i)
    return (
        sharding.all_gather(part.astype(tiling.dtype), 1 if tiling.tied else 0)
        if tiling.split
        else part
    )


def _cut_words(tiling: Tiling, weight: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(
        weight, _first(tiling, i), tiling.width, axis=0 if tiling.tied else 1
    )


def _each_tile(tiling: Tiling, moved: Moved, tile: Callable, carry: Any) -> Any:
    """Whole tiles, and smaller ones of what is left, as far as there are wanted positions."""
    done = 0
    for size in tiling.sizes:
        left = moved.count - done
        count = -(-left // size) if size == tiling.sizes[-1] else left // size
        carry = jax.lax.fori_loop(
            0, count, lambda j, carry: tile((done + j * size, size), carry), carry
        )
        done += count * size
    return carry


def _cut(x: jax.Array, at: At) -> jax.Array:
    """A tile's positions: [R, C, ...] -> [R, c, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, *at, axis=1)


def _put(x: jax.Array, tile: jax.Array, at: At) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, tile, at[0], axis=1)
