"""Sampling a token and its log-prob, independent of the slot it is sampled in."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, key: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws tokens from softmax(logits / temperature); temperature 0 takes the argmax.

    Formula: token = argmin_v E_v / p_v with E_v ~ Exp(1), the exponential race (equal in law to Gumbel-max).
    logp = log softmax(logits / temperature)[token] in float32 nats; at temperature 0, of the plain softmax.

    Args:
      logits: [B, V] float32.
      key: [B, 2] uint32, one per row and token: the draw depends on the key and the row's logits alone.
      temperature: [B] float32, >= 0.

    Returns:
      token [B] int32, logp [B] float32.
    """
    greedy = temperature <= 0
    logits = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)  # or a log-prob near 0 carries the rounding of a large logit
    race = logits - jnp.log(exponential(key, logits.shape[-1]))
    token = jnp.argmax(jnp.where(greedy[:, None], logits, race), axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jnp.log(jnp.sum(jnp.exp(logits), axis=-1))


def exponential(key: jax.Array, size: int) -> jax.Array:
    """[B, size] unit exponentials from [B, 2] uint32 keys by a counter-based hash, two rounds of MurmurHash3's finalizer.

    Threefry bits for 16 x 151,936 draws cost tens of milliseconds a step on a CPU; these cost a few. The keys themselves
    come from `jax.random`, so streams of different tokens are as independent as Threefry makes them. E = -log1p(-u) with
    u a multiple of 2^-32: the smallest, which win the race, keep full relative precision.
    """
    counter = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = _mix(_mix(counter[None] ^ key[:, :1]) + key[:, 1:])
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24 + ((bits & 0xFF).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
