"""Rotary positions (arXiv 2104.09864) and their context extensions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.models.model_config import Linear, Llama3, ModelConfig, Yarn


def rotary(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of the pairs' angles: positions [B, S] -> two [B, S, 1, h/2], float32."""
    freqs, factor = frequencies(config)
    angles = positions[..., None, None].astype(jnp.float32) * freqs
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + h/2}) by their angles: [B, S, heads, h]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Returns each rotary pair's angular frequency [h/2], float32 radians per position, and the
    factor by which cos and sin are multiplied.
    """
    scaling = config.rope_scaling
    freqs = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    factor = 1.0
    if isinstance(scaling, Linear):
        freqs = freqs / scaling.factor
    elif isinstance(scaling, Llama3):
        freqs = llama3_frequencies(freqs, scaling)
    elif isinstance(scaling, Yarn):
        freqs = _yarn(freqs, scaling, config.rope_theta)
        factor = _yarn_attention_factor(scaling)
    return freqs.astype(np.float32), factor


def llama3_frequencies(freqs: np.ndarray, scaling: Llama3) -> np.ndarray:
    """Returns the frequencies [h/2] as `Llama3` says."""
    rotations = scaling.original_max_position * freqs / (2 * math.pi)  # in the original context
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return freqs * kept + freqs / scaling.factor * (1 - kept)


def _yarn(freqs: np.ndarray, scaling: Yarn, theta: float) -> np.ndarray:
    """arXiv 2309.00071, section 3.2: divides low frequencies by `factor`, keeps high ones, and
    interpolates between.
    """
    head_dim = 2 * freqs.size

    def pair(rotations: float) -> float:
        """Returns the (real) index of the pair that rotates so often in the original context."""
        positions = scaling.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(positions) / (2 * math.log(theta))

    low = pair(scaling.beta_fast)
    high = pair(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_dim - 1)
    divided = np.clip((np.arange(freqs.size) - low) / max(high - low, 0.001), 0.0, 1.0)
    return freqs * (1 - divided) + freqs / scaling.factor * divided


def _yarn_attention_factor(scaling: Yarn) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
