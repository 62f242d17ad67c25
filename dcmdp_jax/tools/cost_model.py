"""FLOPs and bytes of a run's programs, from the shapes: per device, for one call, at the greatest
lengths.

A multiplication with its addition counts as two FLOPs. Matrix products and attention scores are
counted, causal attention by half; what the backward pass recomputes is counted again. Bytes over
the links are those that a device receives. D hidden size, V vocabulary, L layers, H query heads, KV
key-value heads, h head size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from dcmdp_jax import sharding
from dcmdp_jax.config import Config, Precision, RolloutConfig
from dcmdp_jax.models import lora
from dcmdp_jax.models.kernels import decode_attention, experts, grouped_product
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.models.quantized import FORMATS, SCALED
from dcmdp_jax.tokens.packing import power_of_two


class Work(NamedTuple):
    """The work of one device."""

    flops: float
    memory: float  # bytes read and written: weights, moments, cached keys and values
    link: float  # bytes received from other devices

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(tuple(self), tuple(other))))

    def __mul__(self, times: float) -> Work:
        return Work(*(a * times for a in self))


class Weights(NamedTuple):
    """Numbers of parameters."""

    layers: int  # used by every token, routers included
    experts: int  # of all layers together
    routed: int  # of the experts that one token is sent to
    head: int
    embed: int  # 0 if it is tied to the head

    @property
    def total(self) -> int:
        """All parameters of the model."""
        return self.layers + self.experts + self.head + self.embed


def parameters(model: ModelConfig) -> Weights:
    """Returns the numbers of parameters, without the scales of norms."""
    d = model.hidden_size
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    sparse = sum(model.is_sparse(layer) for layer in range(model.num_layers))
    dense = (model.num_layers - sparse) * 3 * d * model.intermediate_size
    every = model.num_layers * d * heads + dense + sparse * d * model.num_experts
    expert = 3 * d * model.expert_size
    table = model.vocab_size * d
    return Weights(
        every,
        sparse * model.num_experts * expert,
        sparse * model.experts_per_token * expert,
        table,
        0 if model.tie_word_embeddings else table,
    )


def trained(model: ModelConfig, config: Config) -> int:
    """Returns the number of parameters that the optimizer changes: all, or those of adapters."""
    if not config.model.lora.rank:
        return parameters(model).total
    return sum(leaf.size for leaf in jax.tree.leaves(lora.abstract(config.model.lora, model)))


def forward(
    model: ModelConfig, tokens: float, context: float, scored: float
) -> tuple[float, float, float]:
    """Returns the FLOPs of one pass: of the layers' products, of attention, and of the head.

    Args:
        tokens: tokens that pass through the layers.
        context: positions that each attends to.
        scored: tokens that pass through the head.
    """
    w = parameters(model)
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * context
    return 2 * (w.layers + w.routed) * tokens, attention * tokens, 2 * w.head * scored


def update(
    model: ModelConfig, rows: int, length: int, config: Config, mesh: Any, one_pass: bool
) -> Work:
    """Returns the work of a constrained step: scoring, forward, backward and optimizer.

    Adapters save none of the backward pass, because the gradient of the complete weights is taken
    on the way to theirs; the FLOPs of the sums are left out.

    The scoring pass is left out if the update's own forward pass scores (`one_pass`); a stale
    rollout needs a second one, and a reference policy one of its own.
    """
    algorithm = config.algorithm
    layers, attention, head = _batch(model, rows, length, config)
    recomputed = 1 if model.compute.remat else 0
    # The backward pass of attention recomputes its scores.
    flops = (3 + recomputed) * layers + (3.5 + recomputed) * attention + 4 * head
    parts = algorithm.minibatches * algorithm.microbatches
    link = _exchange(model, rows * length, mesh, 2 + recomputed, gradients=True)
    microbatch = Work(flops / mesh.size, 0, link)
    moments = Work(0, 7 * 4 * trained(model, config) / (mesh.size / mesh.shape["data"]), 0)
    updates = microbatch * (parts * algorithm.epochs)
    updates += moments * (algorithm.minibatches * algorithm.epochs)
    passes = (not one_pass) + (config.rollout.staleness > 0)
    passes += algorithm.reference_penalty is not None
    return updates + scoring(model, rows, length, parts, config, mesh) * passes


def scoring(
    model: ModelConfig, rows: int, length: int, parts: int, config: Config, mesh: Any
) -> Work:
    """Returns the work of scoring a batch of `parts` microbatches."""
    flops = sum(_batch(model, rows, length, config))
    return (
        Work(flops / mesh.size, 0, _exchange(model, rows * length, mesh, 1, gradients=False))
        * parts
    )


def prefill(model: ModelConfig, prompts: int, length: int, mesh: Any) -> Work:
    """Returns the work of filling the cache with `prompts` of `length` tokens."""
    layers, attention, _ = forward(model, prompts * length, length / 2, 0)
    held = _size(model) * parameters(model).total / mesh.shape["tensor"]
    return Work((layers + attention) / mesh.size, held, _reduced(model, prompts * length, mesh))


def cached(model: ModelConfig, positions: float, mesh: Any) -> float:
    """Returns the bytes of the keys and values that a device holds of prefilled positions."""
    size = 2 * model.num_layers * model.num_kv_heads * model.head_dim * _size(model)
    return size * positions / mesh.shape["tensor"]


def decode(model: ModelConfig, rollout: RolloutConfig, slots: int, length: int, mesh: Any) -> Work:
    """Returns the work of one dispatch: K tokens in every slot, in the mean over a longest
    completion.

    Only chosen experts are read: the expected share of them, if all are equally likely.
    """
    context = length - rollout.max_tokens / 2
    flops = sum(forward(model, slots, context, slots)) / mesh.size
    w = parameters(model)
    split = mesh.shape["tensor"]
    chosen = rollout.precision.experts_per_token or model.experts_per_token
    read = 1 - (1 - chosen / max(model.num_experts, 1)) ** slots
    weights = (
        _held(rollout.precision.weights) * w.layers
        + _expert_bytes(model, rollout.precision, read, mesh) * w.experts / mesh.shape["expert"]
        + _held(rollout.precision.head) * w.head
    ) / split
    own_slots = slots / sharding.num_batch_shards(mesh)
    memory = weights + own_slots * cache_read(model, rollout, length, split)
    return Work(flops, memory, _reduced(model, slots, mesh)) * rollout.tokens_per_dispatch


def _expert_bytes(model: ModelConfig, precision: Precision, read: float, mesh: Any) -> float:
    """Returns the bytes that a decode step moves for a parameter of an expert; `read` is the share
    of the experts that is chosen.

    Weights that the chip does not multiply as stored become a copy, of all experts: it is written,
    and read where chosen.
    """
    held = _held(precision.weights)
    kind = mesh.devices.flat[0].device_kind
    sizes = (model.hidden_size, model.expert_size)
    is_multiplied_as_stored = precision.weights in experts.AS_STORED.get(
        kind, ()
    ) or grouped_product.is_supported(precision.weights, sizes, mesh)
    if precision.weights not in SCALED or (
        model.compute.bfloat16 and precision.group <= 0 and is_multiplied_as_stored
    ):
        return held * read
    return held + _size(model) * (1 + read)


def positions_read(model: ModelConfig, rollout: RolloutConfig, length: int, split: int) -> float:
    """Returns the cached positions of a slot that a decode step on a TPU reads, in the mean over a
    longest completion, which fills `length` positions; kv-heads are split over `split` devices.

    The kernel reads the blocks that hold tokens. Where it does not apply, the step reads the window
    of its dispatch, as `generate.rollout` chooses it.
    """
    prompt = length - rollout.max_tokens
    if not decode_attention.is_supported(model.head_dim):
        steps = rollout.tokens_per_dispatch
        longest = range(prompt, length, steps)
        return float(np.mean([power_of_two(n + steps, length) for n in longest]))
    size = decode_attention.block_positions(
        model.num_kv_heads // split,
        length,
        int(model.head_dim * FORMATS[_cache_format(model, rollout)].bits / 8),
    )
    blocks = np.arange(prompt - 1, length - 1) // size + 1
    return float(np.minimum(blocks * size, length).mean())


def cache_read(model: ModelConfig, rollout: RolloutConfig, length: int, split: int) -> float:
    """Returns the bytes of a slot's cached keys and values that a device reads in a step.

    For the kernel, XLA also copies the scales of all positions into another layout.
    """
    read = positions_read(model, rollout, length, split)
    name = _cache_format(model, rollout)
    of_head = model.head_dim * FORMATS[name].bits / 8 * read
    if name in SCALED:
        copied = 2 * length if decode_attention.is_supported(model.head_dim) else 0
        of_head += 4 * (read + copied)
    return 2 * model.num_layers * model.num_kv_heads / split * of_head


def _cache_format(model: ModelConfig, rollout: RolloutConfig) -> str:
    computed = "bfloat16" if model.compute.bfloat16 else "float32"
    return rollout.precision.cache or computed


def sync(model: ModelConfig, precision: Precision, mesh: Any, chips: int) -> Work:
    """Returns the work of a weight sync: a device reads its part of the trainer's parameters in
    float32, and receives what it lacks of the engine's.
    """
    w = parameters(model)
    new = (
        _held(precision.weights) * (w.layers + w.experts)
        + _held(precision.head) * w.head
        + _held(precision.embed) * w.embed
    )
    new /= mesh.shape["tensor"]
    return Work(0, 4 * w.total / chips + new, new * (1 - mesh.shape["tensor"] / chips))


def _batch(
    model: ModelConfig, rows: int, length: int, config: Config
) -> tuple[float, float, float]:
    """Returns the FLOPs of a microbatch's forward pass.

    Every row is one longest completion, or has a longest prompt for the longest completions that
    share it. These are as many as the microbatch has, whatever the number of rows.
    """
    algorithm = config.algorithm
    new = config.rollout.max_tokens
    completions = config.data.prompts_per_step * config.rollout.samples
    completions //= algorithm.minibatches * algorithm.microbatches
    if not config.shares_prompts:
        return forward(model, rows * length, length / 2, completions * new)
    prefix = config.data.max_prompt_tokens - 1
    branch = 1 + new
    pairs = rows * prefix**2 / 2 + completions * branch * (prefix + branch / 2)
    return forward(model, rows * length, pairs / (rows * length), completions * new)


def _size(model: ModelConfig) -> int:
    """Returns the bytes of an activation or a gathered weight."""
    return 2 if model.compute.bfloat16 else 4


def _held(precision: str) -> float:
    return FORMATS[precision or "float32"].bits / 8


def _exchange(model: ModelConfig, tokens: int, mesh: Any, passes: int, *, gradients: bool) -> float:
    """Returns the bytes that a device receives in training one microbatch.

    Weights are gathered once a pass, gradients are summed and scattered, tokens are sent to their
    experts, keys and values along the sequence axis, and partial sums are added.
    """
    w = parameters(model)
    size = _size(model)
    shape = mesh.shape
    shards = math.prod(shape[axis] for axis in sharding.TRAIN["embed"])
    expert_shards = math.prod(shape[axis] for axis in sharding.TRAIN["expert_embed"])
    times = passes + gradients
    weights = (
        size
        / shape["tensor"]
        * (
            (w.layers + w.head) * (1 - 1 / shards)
            + w.experts / shape["expert"] * (1 - 1 / expert_shards)
        )
    )
    own = tokens / (sharding.num_batch_shards(mesh) * shape["sequence"])
    sent = (
        own
        * model.hidden_size
        * size
        * sum(model.is_sparse(i) for i in range(model.num_layers))
        * model.experts_per_token
    )
    to_experts = (1 - 1 / shape["expert"]) * sent * (2 * passes + gradients)
    keys = 2 * model.num_layers * model.num_kv_heads * model.head_dim * size / shape["tensor"]
    keys *= own * (shape["sequence"] - 1) * times
    copies = 2 * (1 - 1 / shape["data"]) * 4 * w.total / (shards * shape["tensor"]) * gradients
    return weights * times + to_experts + keys + copies + _reduced(model, tokens, mesh) * times


def _reduced(model: ModelConfig, tokens: float, mesh: Any) -> float:
    """Returns the bytes of the partial sums over the tensor axis: two all-reduces a layer."""
    split = mesh.shape["tensor"]
    own = tokens / (sharding.num_batch_shards(mesh) * mesh.shape["sequence"])
    return 2 * model.num_layers * 2 * (1 - 1 / split) * own * model.hidden_size * _size(model)
