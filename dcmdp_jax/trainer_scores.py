"""Log-probs and entropies of a batch under the trainer's parameters or the reference's."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from dcmdp_jax import train_state
from dcmdp_jax.config import Config
from dcmdp_jax.models import engine_formats, scoring
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Batch, TrainState


class Scores(NamedTuple):
    """The log-probs of which a loss is a function, and by which it is differentiated."""

    logp: jax.Array  # [A, n, T]
    top_logp: jax.Array | None = None  # [A, n, T, k], if `rollout.top_logprobs` is k


def score(
    params: Any, batch: Batch, config: Config, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probs and entropies [M, A, n, T] of a batch under the decoder's `params`."""
    return jax.lax.map(lambda minibatch: score_minibatch(params, minibatch, config, model), batch)


def score_reference(
    state: TrainState, batch: Batch, config: Config, model: ModelConfig
) -> jax.Array | None:
    """Returns the reference's log-probs [M, A, n, T]; None if there is no reference penalty."""
    if not config.algorithm.reference_penalty:
        return None
    params = train_state.decoder_params(state.reference, state.frozen, config)
    return score(params, batch, config, model)[0]


def scored_params(params: Any, config: Config, model: ModelConfig) -> Any:
    """Returns the decoder's parameters that the forward pass is run with: `params`, or those with
    the engine's rounding and a straight-through gradient.
    """
    if not config.algorithm.quantize_aware:
        return params
    return engine_formats.straight_through(params, model, config.rollout.precision)


def score_minibatch(
    params: Any, minibatch: Batch, config: Config, model: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies of [A, ...] microbatches, one after the other: [A, n, T]."""
    return jax.lax.map(lambda micro: _logp(params, micro, config, model, entropy=True), minibatch)


def score_microbatch(
    params: Any,
    micro: Batch,
    config: Config,
    model: ModelConfig,
    *,
    entropy: bool,
    slope: bool = False,
) -> tuple[Scores, jax.Array | None]:
    """As `_logp`, with the log-probs of the sampler's likeliest tokens if the batch has them."""
    if micro.top_tokens is None:
        logp, entropies = _logp(params, micro, config, model, entropy=entropy, slope=slope)
        return Scores(logp), entropies
    logp, entropies, top_logp = scoring.packed_top_logp(
        scored_params(params, config, model),
        micro.tokens,
        micro.positions,
        micro.segment_ids,
        micro.index,
        micro.top_tokens,
        model,
        config.rollout.temperature,
        entropy=entropy,
        entropy_gradient=slope,
        prefix_ids=micro.prefix_ids,
        replayed=micro.replayed,
    )
    return Scores(logp, top_logp), entropies


def _logp(
    params: Any,
    micro: Batch,
    config: Config,
    model: ModelConfig,
    *,
    entropy: bool,
    slope: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    return scoring.packed_logp(
        scored_params(params, config, model),
        micro.tokens,
        micro.positions,
        micro.segment_ids,
        micro.index,
        model,
        config.rollout.temperature,
        entropy=entropy,
        entropy_gradient=slope,
        prefix_ids=micro.prefix_ids,
        replayed=micro.replayed,
    )
