"""Sampling a token and its log-prob, independent of the slot it is sampled in."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax.records import Sampling

BLOCK = 128  # tokens that are one entry in the first race


class Drawn(NamedTuple):
    """One sampled token per row, [B] each."""

    token: jax.Array  # int32
    # float32, nats, of the distribution drawn from: tempered, renormalised over its support
    rollout_logp: jax.Array
    # float32, mass of the support under softmax(logits / temperature); 1 if nothing is cut
    support_mass: jax.Array


class Top(NamedTuple):
    """The k likeliest tokens of each row, [B, k]."""

    token: jax.Array  # int32
    logp: jax.Array  # float32, nats, under softmax(logits / temperature)


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> Drawn:
    """Draws a token of each row.

    Formula: z = logits / temperature; p = softmax(z) over the support of `sampling`; the token is
    the winner of an exponential race, argmin_v E_v / p_v with E_v ~ Exp(1), run first over blocks
    of 128 tokens and then within the winning block. Both races are exact, so the token has law p,
    and only V / 128 + 128 numbers are drawn. Temperature 0 takes the argmax and reports plain
    softmax log-probs. If a row's logits hold NaN or +inf, its token means nothing and its log-prob
    is NaN.

    A race is decided by the order of E / p, so that round-off in p changes a token only in a near
    tie. (Inverting a cumulative sum would move every boundary.)

    Args:
        logits: [B, V] float32.
        key: [B, 2] uint32, one per row and token: the draw depends on the key and the row's logits
            alone.
        sampling: fields [B]; temperature >= 0, 0 <= top_k, 0 < top_p <= 1, 0 <= min_p < 1.
    """
    greedy = sampling.temperature <= 0
    scale = jnp.where(greedy, 1.0, 1.0 / sampling.temperature)
    blocks = _blocks(logits)
    block_max = jnp.max(blocks, axis=-1)
    top = jnp.max(block_max, axis=-1)
    cuts = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    lowest = jax.lax.cond(
        jnp.any(~greedy & cuts),
        lambda: _lowest_logit(logits, top, scale, sampling, greedy),
        lambda: jnp.full_like(top, -jnp.inf),
    )

    # the largest is subtracted first, or a log-prob near 0 carries the rounding of a large logit
    def tempered(x):
        column = (..., *[None] * (x.ndim - 1))
        z = (x - top[column]) * scale[column]
        return jnp.where(x < lowest[column], -jnp.inf, z)  # keeps NaN

    mass = jnp.sum(jnp.exp(tempered(blocks)), axis=-1)
    support = jnp.sum(mass, axis=-1)
    race = jnp.log(mass) - jnp.log(_exponential(key, mass.shape[1]))
    block = jnp.argmax(jnp.where(greedy[:, None], block_max, race), axis=-1)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    race = tempered(within) - jnp.log(_exponential(key ^ jnp.uint32(0x5BD1E995), BLOCK))
    place = jnp.argmax(jnp.where(greedy[:, None], within, race), axis=-1)
    chosen = jnp.take_along_axis(within, place[:, None], axis=-1)[:, 0] - top

    uncut = jnp.isneginf(lowest)
    total = jax.lax.cond(jnp.all(uncut), lambda: support, lambda: _total_mass(logits, top, scale))
    support_mass = jnp.where(uncut, 1.0, jnp.minimum(support / total, 1.0))
    last = logits.shape[-1] - 1  # NaN may win in the block's padding
    token = jnp.minimum(block * BLOCK + place, last).astype(jnp.int32)
    return Drawn(token, chosen * scale - jnp.log(support), support_mass)


def log_prob(logits: jax.Array, token: jax.Array, temperature: jax.Array) -> jax.Array:
    """Returns the log-prob of `token` [B] under softmax(logits / temperature), logits [B, V].

    The terms are summed block by block as `sample` sums them, so that both round alike.
    """
    z = (logits - jnp.max(logits, axis=-1, keepdims=True)) * (1.0 / temperature)
    mass = jnp.sum(jnp.exp(_blocks(z)), axis=-1)
    chosen = jnp.take_along_axis(z, token[:, None], axis=-1)[:, 0]
    return chosen - jnp.log(jnp.sum(mass, axis=-1))


def top(logits: jax.Array, temperature: jax.Array, k: int) -> Top:
    """Returns the k likeliest tokens of logits [B, V], in descending order, at temperatures [B].

    Temperature 0 counts as 1, as in `sample`. The terms are summed as `sample` sums them.
    """
    scale = jnp.where(temperature <= 0, 1.0, 1.0 / temperature)
    highest, token = jax.lax.top_k(logits, k)
    z = (logits - highest[:, :1]) * scale[:, None]
    total = jnp.sum(jnp.sum(jnp.exp(_blocks(z)), axis=-1), axis=-1)
    logp = (highest - highest[:, :1]) * scale[:, None] - jnp.log(total)[:, None]
    return Top(token.astype(jnp.int32), logp)


def _blocks(z: jax.Array) -> jax.Array:
    """[B, V] -> [B, V / BLOCK, BLOCK], the last block padded with -inf."""
    padding = -z.shape[-1] % BLOCK
    padded = jnp.pad(z, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return padded.reshape(z.shape[0], -1, BLOCK)


def _total_mass(logits: jax.Array, top: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp((logits - top[:, None]) * scale[:, None]), axis=-1)


def _lowest_logit(
    logits: jax.Array, top: jax.Array, scale: jax.Array, sampling: Sampling, greedy: jax.Array
) -> jax.Array:
    """Returns the smallest logit [B] of each row's support; -inf for a row that is not cut."""
    distance = top[:, None] - logits
    size = logits.shape[-1]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, size), size)
    by_k = _smallest_reaching(lambda inside: jnp.sum(inside, axis=-1), distance, k)
    probability = jnp.where(distance <= by_k[:, None], jnp.exp(-distance * scale[:, None]), 0)
    by_p = _smallest_reaching(
        lambda inside: jnp.sum(jnp.where(inside, probability, 0), axis=-1),
        distance,
        sampling.top_p * jnp.sum(probability, axis=-1),
    )
    by_min = -jnp.log(sampling.min_p) / scale
    nearest = jnp.minimum(
        jnp.where(k < size, by_k, jnp.inf), jnp.where(sampling.top_p < 1, by_p, jnp.inf)
    )
    nearest = jnp.minimum(nearest, jnp.where(sampling.min_p > 0, by_min, jnp.inf))
    # The support is given by a logit, so that comparing with it leaves out no token that ties with
    # the last.
    last = jnp.min(jnp.where(distance <= nearest[:, None], logits, jnp.inf), axis=-1)
    return jnp.where(greedy | jnp.isposinf(nearest), -jnp.inf, last)


def _smallest_reaching(measure, distance: jax.Array, goal: jax.Array) -> jax.Array:
    """Returns the smallest d [B] with measure(distance <= d) >= goal.

    Bisects over the bits of d: floats >= 0 are ordered as their bits are. This costs 31 passes; a
    sort of 151,936 tokens takes several times as long on a CPU.
    """

    def halve(_, bounds):
        low, high = bounds  # bits of a distance that does not reach the goal, and of one that does
        middle = low + (high - low) // 2
        reached = (
            measure(distance <= jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]) >= goal
        )
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    infinite = jnp.full(goal.shape, 0x7F800000, jnp.int32)
    _, high = jax.lax.fori_loop(0, 31, halve, (jnp.full_like(infinite, -1), infinite))
    return jax.lax.bitcast_convert_type(high, jnp.float32)


def _exponential(key: jax.Array, size: int) -> jax.Array:
    """Returns [B, size] unit exponentials from [B, 2] uint32 keys by a counter-based hash: two
    rounds of MurmurHash3's finalizer.

    The keys come from `jax.random`, so streams of different tokens are as independent as Threefry
    makes them. E = -log1p(-u), with u in steps of 2^-32 where it is small: the smallest E, which
    win the race, keep their relative precision.
    """
    counter = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = _mix(_mix(counter[None] ^ key[:, :1]) + key[:, 1:])
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24 + (
        (bits & 0xFF).astype(jnp.float32) + 0.5
    ) * 2.0**-32
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
