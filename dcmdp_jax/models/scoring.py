"""Log-probs of given tokens, without holding `[tokens, V]` for a whole batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dcmdp_jax import sharding
from dcmdp_jax.config import ModelConfig
from dcmdp_jax.models import qwen3

CHUNK = 1 << 24  # logits held at a time


def token_logp(params: Any, hidden: jax.Array, targets: jax.Array, config: ModelConfig,
               temperature: float) -> tuple[jax.Array, jax.Array]:
    """Log-prob of `targets` and entropy under softmax(head(hidden) / temperature), float32 nats.

    Formula: logp = z_target - logsumexp(z), entropy = logsumexp(z) - sum_v softmax(z)_v z_v, z = logits / temperature.

    Args:
      hidden: [P, D]; targets: [P] int32. Logits are made `CHUNK / V` positions at a time, and made again in the backward
        pass.

    Returns:
      logp [P], entropy [P]; the entropy carries no gradient.
    """
    def block(x):
        hidden, targets = x
        z = qwen3.head(params, hidden, config) / temperature
        z = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))  # as the sampler does, to round alike
        total = jnp.log(jnp.sum(jnp.exp(z), axis=-1))
        logp = jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0] - total
        z, total = jax.lax.stop_gradient((z, total))
        return logp, total - jnp.sum(jnp.exp(z - total[:, None]) * z, axis=-1)

    count, size = targets.shape[0], max(CHUNK // config.vocab_size, 1)
    if count <= size:
        return block((hidden, targets))
    blocks = -(-count // size)
    pad = blocks * size - count
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(blocks, size, -1)
    targets = jnp.pad(targets, (0, pad)).reshape(blocks, size)
    logp, entropy = jax.lax.map(jax.checkpoint(block), (hidden, targets))
    return logp.reshape(-1)[:count], entropy.reshape(-1)[:count]


def packed_logp(params: Any, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, index: jax.Array,
                config: ModelConfig, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy of completion tokens in packed rows [R, S]; `index` [n, T] as in `records.Batch`."""
    hidden = qwen3.hidden(params, tokens, config, positions=positions, segment_ids=segment_ids)
    following = jnp.roll(tokens, -1, axis=1)  # the last column predicts nothing and is not in `index`
    if sharding.ambient() is not None:
        logp, entropy = _proto(params, hidden, following, config, temperature)
    else:
        logp, entropy = token_logp(params, hidden.reshape(-1, hidden.shape[-1]), following.reshape(-1), config, temperature)
    return logp.reshape(-1)[index], entropy.reshape(-1)[index]


def _proto(params, hidden, targets, config, temperature, n=8):
    w = params["embed"].T if config.tie_word_embeddings else params["head"]
    D, V = w.shape
    size = V // n
    chunks = jnp.moveaxis(w.reshape(D, n, size), 1, 0)
    chunks = sharding.constrain(chunks, None, "split_embed", None)
    hidden = sharding.constrain(hidden, "rows", "positions", None)

    def body(carry, x):
        m, s, t, e = carry
        w, first = x
        w = sharding.gather(w.astype(hidden.dtype), ("embed", None))
        z = jnp.einsum("rsd,dv->rsv", hidden, w, preferred_element_type=jnp.float32) / temperature
        z = sharding.constrain(z, "rows", "positions", None)
        m2 = jax.lax.stop_gradient(jnp.maximum(m, jnp.max(z, -1)))
        p = jnp.exp(z - m2[..., None])
        scale = jnp.exp(m - m2)
        s = s * scale + jnp.sum(p, -1)
        e = e * scale + jax.lax.stop_gradient(jnp.sum(p * z, -1))
        at = targets - first
        inside = (at >= 0) & (at < size)
        t = t + jnp.where(inside, jnp.take_along_axis(z, jnp.clip(at, 0, size - 1)[..., None], -1)[..., 0], 0)
        return (m2, s, t, e), None

    zero = jnp.zeros(targets.shape, jnp.float32)
    (m, s, t, e), _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), (zero - 1e30, zero, zero, zero), (chunks, jnp.arange(n) * size))
    total = m + jnp.log(s)
    return t - total, jax.lax.stop_gradient(total - e / s)
