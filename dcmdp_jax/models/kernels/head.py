"""Log-probs and entropies of given tokens, without the logits of a whole batch, and only at wanted
positions.

R rows, S positions, D model, V vocabulary. Logits are computed in tiles [R, c, v]: c positions of
each row, and a block of v tokens of the vocabulary. The wanted positions of each row are moved to
its front, so that full tiles come first: C >= S, a multiple of c.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.models.kernels import tiles
from dcmdp_jax.models.layers import compute_dtype
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import einsum

TOKENS = ("rows", "positions")  # logical axes of [R, S]
LOW = -1e30  # below every logit; finite, so that it may be subtracted from itself


class Tiling(NamedTuple):
    """How logits are computed."""

    # tile lengths c, descending; each divides the one before; smaller tiles cover the remainder
    sizes: tuple[int, ...]
    width: int  # v, of a block of the vocabulary
    vocabulary: int  # V, or this device's part of it
    tied: bool  # the weight is [V, D], not [D, V]
    dtype: Any  # of the operands of products
    temperature: float
    entropy: bool
    entropy_gradient: bool
    sharded: bool  # over the current mesh: rows, positions, and both axes of the weight


class Compacted(NamedTuple):
    """The wanted positions of each row moved to its front, in order."""

    hidden: jax.Array  # [R, C, D]
    targets: jax.Array  # [R, C]
    source: jax.Array  # [R, C], the position that each comes from
    rank: jax.Array  # [R, S], the place that each position went to
    count: jax.Array  # [], the largest number of wanted positions in a row


class Span(NamedTuple):
    """The positions of a tile."""

    start: jax.Array
    size: int

    def of(self, x: jax.Array) -> jax.Array:
        """[R, C, ...] -> [R, c, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=1)

    def write(self, x: jax.Array, tile: jax.Array) -> jax.Array:
        """Returns x [R, C, ...] with the tile [R, c, ...] in it."""
        return jax.lax.dynamic_update_slice_in_dim(x, tile, self.start, axis=1)


def weight_of(params: Any, config: ModelConfig) -> jax.Array:
    """Returns the head's weight: [V, D] if embeddings are tied, else [D, V]. A tied head that is
    rounded by itself is a parameter beside the embedding.
    """
    return params.get("head", params["embed"]) if config.tie_word_embeddings else params["head"]


def token_logp(
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    config: ModelConfig,
    temperature: float,
    *,
    entropy: bool = False,
    entropy_gradient: bool = False,
    max_logits: int = tiles.LOGITS,
    cpu_tokens: tuple[int, ...] = tiles.HEAD_CPU_TOKENS,
    cpu_vocab: int = tiles.HEAD_CPU_VOCAB,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-prob of `targets` and entropy under softmax(head(hidden) / temperature), float32 nats.

    Formula, with z = logits / temperature: logp = z_target - logsumexp(z), entropy = logsumexp(z) -
    sum_v softmax(z)_v z_v.

    Args:
        hidden: [R, S, D]; targets: [R, S] int32; wanted: [R, S] bool, the positions whose values
            are needed. Rows are scored up to the largest number of wanted positions in a row. A CPU
            scores all rows as one.
        entropy: whether to compute it.
        entropy_gradient: whether it has one; the backward pass is that of logp alone otherwise.
        max_logits: largest number of logits in memory at a time, except that a tile has at least
            one position of each row.
        cpu_tokens: lengths of the tiles on a CPU.
        cpu_vocab: entries of the vocabulary in a tile on a CPU.

    Returns:
        logp [R, S], entropy [R, S] or None; 0 at positions that are not wanted. The backward pass
        recomputes the logits.
    """
    weight = weight_of(params, config)
    rows, columns = targets.shape
    mesh = sharding.current_mesh()

    def tiling(rows, columns, vocabulary, max_vocab=tiles.HEAD_VOCAB, sizes=()):
        blocks = -(-vocabulary // max_vocab)
        # multiples of 128 fill the processor's vectors
        width = min(-(-vocabulary // blocks // 128) * 128, vocabulary)
        largest = max(min(max_logits // (rows * width), columns), 1)
        # XLA hoists a tile as long as the row out of the loop even if no iteration uses it; leave
        # that size out.
        sizes = tuple(size for size in sizes if size <= largest and size < columns) or (largest,)
        return Tiling(
            sizes,
            width,
            vocabulary,
            tied=config.tie_word_embeddings,
            dtype=compute_dtype(config),
            temperature=temperature,
            entropy=entropy,
            entropy_gradient=entropy_gradient,
            sharded=mesh is not None,
        )

    def as_one_row(hidden, weight, targets, wanted):
        flat = tiling(1, rows * columns, config.vocab_size, cpu_vocab, cpu_tokens)
        hidden, targets, wanted = (
            x.reshape(1, rows * columns, *x.shape[2:]) for x in (hidden, targets, wanted)
        )
        return [x.reshape(rows, columns) for x in _score(flat, hidden, weight, targets, wanted)]

    if mesh is not None:
        local = sharding.local_shape(TOKENS, (rows, columns))
        local_vocabulary = config.vocab_size // mesh.shape["tensor"]
        out = _score(tiling(*local, local_vocabulary), hidden, weight, targets, wanted)
    else:
        by_row = partial(_score, tiling(rows, columns, config.vocab_size))
        out = jax.lax.platform_dependent(
            hidden, weight, targets, wanted, cpu=as_one_row, default=by_row
        )
    return out[0], out[1] if entropy else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(
    tiling: Tiling, hidden: jax.Array, weight: jax.Array, targets: jax.Array, wanted: jax.Array
) -> list[jax.Array]:
    """Returns [logp] or [logp, entropy], [R, S] each."""
    return _forward(tiling, hidden, weight, targets, wanted)[0]


def _logical_axes(tiling: Tiling) -> tuple[tuple, ...]:
    """Returns those of hidden, weight, targets and wanted."""
    weight = ("vocab", "split_embed") if tiling.tied else ("split_embed", "vocab")
    return (*TOKENS, None), weight, TOKENS, TOKENS


def _forward(tiling: Tiling, *arguments: jax.Array) -> tuple:
    f = partial(_values, tiling)
    if tiling.sharded:
        f = sharding.shard_map(f, *_logical_axes(tiling), out=(TOKENS,) * (2 + tiling.entropy))
    *out, log_total = f(*arguments)
    entropy = out[1:] if tiling.entropy_gradient else []
    return out, (*arguments, log_total, *entropy)


def _backward(tiling: Tiling, residuals: tuple, cotangents: list[jax.Array]) -> tuple:
    f = partial(_gradients, tiling)
    slopes = cotangents if tiling.entropy_gradient else cotangents[:1]
    if tiling.sharded:
        axes = _logical_axes(tiling)
        of_tokens = [TOKENS] * (len(residuals) - len(axes) + len(slopes))
        f = sharding.shard_map(f, *axes, *of_tokens, out=axes[:2])
    return *f(*residuals, *slopes), None, None


_score.defvjp(_forward, _backward)


def _values(
    tiling: Tiling, hidden: jax.Array, weight: jax.Array, targets: jax.Array, wanted: jax.Array
) -> tuple:
    """Returns logp, entropy if `tiling.entropy`, and the compacted log-sum-exp.

    The softmax is made by a running maximum and sum over blocks of the vocabulary.
    """
    compacted = _compact(tiling, hidden, targets, wanted)

    def block(i, sums):
        w = _vocab_block(tiling, weight, i)

        def tile(span, sums):
            top, total, moment, target_logit = (span.of(x) for x in sums)
            z, in_block, place = _logits(tiling, compacted, w, i, span)
            new_top = jnp.maximum(top, jnp.max(z, axis=-1))
            shrink = jnp.exp(top - new_top)
            p = jnp.exp(z - new_top[..., None])
            if tiling.entropy:
                added = jnp.sum(p * (z - new_top[..., None]), axis=-1)
                moment = shrink * (moment + (top - new_top) * total) + added
            total = shrink * total + jnp.sum(p, axis=-1)
            at_target = jnp.take_along_axis(z, place[..., None], axis=-1)[..., 0]
            target_logit = jnp.where(in_block, at_target, target_logit)
            new = (new_top, total, moment, target_logit)
            return tuple(span.write(x, y) for x, y in zip(sums, new, strict=True))

        return _for_each_tile(tiling, compacted, tile, sums)

    zero = jnp.zeros(compacted.targets.shape, jnp.float32)
    sums = _for_each_block(tiling, block, (zero + LOW, zero, zero, zero))
    top, total, moment, target_logit = sums
    if tiling.sharded:
        highest = jax.lax.pmax(top, "tensor")
        shrink = jnp.exp(top - highest)
        sums = shrink * total, shrink * (moment + (top - highest) * total), target_logit
        total, moment, target_logit = jax.lax.psum(sums, "tensor")
        top = highest
    total = jnp.where(total > 0, total, 1)  # at places that no tile reached
    log_total = jnp.log(total)
    # The maximum is subtracted first, as the sampler does, so that both round alike.
    out = [target_logit - top - log_total]
    if tiling.entropy:
        out.append(log_total - moment / total)
    out = (jnp.where(wanted, _take(x, compacted.rank), 0) for x in out)
    return *out, (top + log_total)[:, : wanted.shape[1]]


def _gradients(
    tiling: Tiling,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    log_total: jax.Array,
    *rest: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of hidden and weight, from recomputed logits:

    d logp / d z = onehot(target) - p and d entropy / d z = -p (log p + entropy), p = softmax(z).

    The weight's gradient is accumulated in place. `rest` is the cotangent of logp, or the entropy
    and the cotangents of logp and entropy.
    """
    cotangent = rest[-1]
    if tiling.entropy_gradient:
        entropy, cotangent, entropy_cotangent = rest
    compacted = _compact(tiling, hidden, targets, wanted)
    places = compacted.source.shape[1]
    is_wanted = jnp.arange(places) < jnp.sum(wanted, axis=1)[:, None]

    def compact(x):
        return jnp.where(is_wanted, _take(x, compacted.source), 0)

    slope = compact(cotangent) / tiling.temperature
    if tiling.entropy_gradient:
        entropy = compact(entropy)
        entropy_slope = compact(entropy_cotangent) / tiling.temperature
    # The places after the last position: p is 0 there. A small total would let it overflow.
    padding = (0, 0), (0, places - log_total.shape[1])
    log_total = jnp.pad(log_total, padding, constant_values=-LOW)
    axis = 0 if tiling.tied else 1

    def block(i, grads):
        d_hidden, d_weight = grads
        w = _vocab_block(tiling, weight, i)
        before = _vocab_slice(tiling, d_weight, i)

        def tile(span, grads):
            d_hidden, d_w = grads
            z, in_block, place = _logits(tiling, compacted, w, i, span)
            is_target = in_block[..., None] & (jnp.arange(tiling.width) == place[..., None])
            log_p = z - span.of(log_total)[..., None]
            p = jnp.exp(log_p)
            dz = span.of(slope)[..., None] * (is_target - p)
            if tiling.entropy_gradient:
                surprise = log_p + span.of(entropy)[..., None]
                dz = dz - span.of(entropy_slope)[..., None] * p * surprise
            x = span.of(compacted.hidden)
            if tiling.tied:
                d_w = d_w + einsum("rcv,rcd->vd", dz, x, tiling.dtype)
                dx = einsum("rcv,vd->rcd", dz, w, tiling.dtype)
            else:
                d_w = d_w + einsum("rcd,rcv->dv", x, dz, tiling.dtype)
                dx = einsum("rcv,dv->rcd", dz, w, tiling.dtype)
            return span.write(d_hidden, span.of(d_hidden) + dx), d_w

        start = d_hidden, jnp.zeros(w.shape, jnp.float32) if tiling.sharded else before
        d_hidden, d_w = _for_each_tile(tiling, compacted, tile, start)
        if tiling.sharded:
            own = sharding.reduce_scatter(d_w.astype(tiling.dtype), 1 - axis)
            d_w = before + own.astype(jnp.float32)
        first = _block_start(tiling, i)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_weight, d_w, first, axis)

    zero = jnp.zeros(compacted.hidden.shape, jnp.float32), jnp.zeros(weight.shape, jnp.float32)
    d_hidden, d_weight = _for_each_block(tiling, block, zero)
    if tiling.sharded:
        d_hidden = jax.lax.psum(d_hidden, "tensor")
    return _take(d_hidden, compacted.rank).astype(hidden.dtype), d_weight.astype(weight.dtype)


def _compact(tiling: Tiling, hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> Compacted:
    rows, columns = targets.shape
    count = jnp.sum(wanted, axis=1, keepdims=True)
    rank = jnp.where(wanted, jnp.cumsum(wanted, axis=1), count + jnp.cumsum(~wanted, axis=1)) - 1
    size = -(-columns // tiling.sizes[0]) * tiling.sizes[0]
    source = jnp.zeros((rows, size), jnp.int32)
    source = source.at[jnp.arange(rows)[:, None], rank].set(
        jnp.arange(columns), unique_indices=True
    )
    return Compacted(_take(hidden, source), _take(targets, source), source, rank, jnp.max(count))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[r, index[r, i]]: [R, S, ...], [R, C] -> [R, C, ...]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _logits(
    tiling: Tiling, compacted: Compacted, w: jax.Array, i: jax.Array, span: Span
) -> tuple[jax.Array, ...]:
    """Returns z [R, c, v] of a tile over block i of the vocabulary, and of each target [R, c],
    whether it is in that block, and its place there.
    """
    x = span.of(compacted.hidden)
    z = einsum("rcd,vd->rcv" if tiling.tied else "rcd,dv->rcv", x, w, tiling.dtype)
    first = _block_start(tiling, i)
    first_new = i * tiling.width
    targets = span.of(compacted.targets)
    if tiling.sharded:
        targets = targets - jax.lax.axis_index("tensor") * tiling.vocabulary
    if tiling.vocabulary % tiling.width:  # the last block overlaps the one before
        z = jnp.where(first + jnp.arange(tiling.width) >= first_new, z, LOW)
    in_block = (targets >= first_new) & (targets < first_new + tiling.width)
    return z / tiling.temperature, in_block, jnp.clip(targets - first, 0, tiling.width - 1)


def _for_each_block(tiling: Tiling, block: Callable, start: Any) -> Any:
    """Carries `start` through `block(i, carry)` for every block of the vocabulary."""
    blocks = -(-tiling.vocabulary // tiling.width)
    return block(0, start) if blocks == 1 else jax.lax.fori_loop(0, blocks, block, start)


def _for_each_tile(tiling: Tiling, compacted: Compacted, tile: Callable, carry: Any) -> Any:
    """Carries `carry` through `tile(span, carry)`: largest tiles, then smaller ones for the rest of
    the wanted positions.
    """

    def run(carry, first, size, count):
        return jax.lax.fori_loop(
            0, count, lambda j, carry: tile(Span(first + j * size, size), carry), carry
        )

    done = 0
    for size in tiling.sizes:
        remaining = compacted.count - done
        is_smallest = size == tiling.sizes[-1]
        count = -(-remaining // size) if is_smallest else remaining // size
        carry = run(carry, done, size, count)
        done += count * size
    return carry


def _block_start(tiling: Tiling, i: jax.Array) -> jax.Array:
    """Returns the token that block i begins with; the last block ends with the vocabulary."""
    return jnp.minimum(i * tiling.width, tiling.vocabulary - tiling.width)


def _vocab_block(tiling: Tiling, weight: jax.Array, i: jax.Array) -> jax.Array:
    """Returns block i of the head, gathered along D: [v, D] or [D, v]."""
    block = _vocab_slice(tiling, weight, i)
    if tiling.sharded:
        return sharding.all_gather(block.astype(tiling.dtype), 1 if tiling.tied else 0)
    return block


def _vocab_slice(tiling: Tiling, weight: jax.Array, i: jax.Array) -> jax.Array:
    """Returns block i of the head, or of this device's part of it along D."""
    axis = 0 if tiling.tied else 1
    return jax.lax.dynamic_slice_in_dim(weight, _block_start(tiling, i), tiling.width, axis)
