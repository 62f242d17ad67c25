"""What decoding reads for a sampled token on TPUs, in the paper's setting:
`python -m benchmarks.decode_reads`.

Weights and cached keys and values that one engine of `v5p:4x4x4` reads (a host's four chips, 32
slots), in bytes a token. Its slots are filled and its dispatches end as in `rollout.generate`, with
no model: 32 completions, which is what an engine samples in a step, behind prompts of 1,024 tokens.
Completions have all 8,192 tokens, or lengths drawn evenly from 1 to 8,192.

  one window   every slot reads as many positions: the power of two over the longest sequence
  live blocks  a slot reads the blocks that hold its tokens, an idle one a block
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools

import numpy as np

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig, Precision, RolloutConfig
from dcmdp_jax.models import sizes
from dcmdp_jax.models.kernels import decode_attention
from dcmdp_jax.models.model_config import Compute, ModelConfig
from dcmdp_jax.models.quantized import FORMATS
from dcmdp_jax.tokens.packing import power_of_two
from dcmdp_jax.tools import cost_model, slices

MODELS = {"8B": sizes.QWEN3_8B, "30B-A3B": sizes.QWEN3_30B_A3B}
WEIGHTS = {"bfloat16": Precision("bfloat16"), "fp8": Precision("float8_e4m3fn")}
ENGINES = (("bfloat16", "bfloat16"), ("fp8", "bfloat16"), ("fp8", "int8"))  # weights and cache
PROMPT = 1024
NEW = 8192
SLOTS = 32
STEPS = 32  # of a dispatch
CHIPS = 4
TOPOLOGY = "v5p:2x2x1"
SEED = 0


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    drawn = np.random.default_rng(SEED).integers(1, NEW + 1, SLOTS)
    print("| model | weights | cache | completions | weights MB | one window MB | live MB | all |")
    print("|---|---|---|---|---|---|---|---|")
    for (name, shape), (engine, cache) in itertools.product(MODELS.items(), ENGINES):
        model = dataclasses.replace(shape, compute=Compute(bfloat16=True))
        for said, lengths in (("8,192", np.full(SLOTS, NEW)), ("1 to 8,192", drawn)):
            weights, window, live = bytes_a_token(model, WEIGHTS[engine], cache, lengths)
            print(
                f"| {name} | {engine} | {cache} | {said} | {weights / 1e6:,.0f} | "
                f"{window / 1e6:,.0f} | {live / 1e6:,.0f} | "
                f"{(weights + live) / (weights + window):.2f} |"
            )


def bytes_a_token(
    model: ModelConfig, weights: Precision, cache: str, lengths: np.ndarray
) -> tuple[float, float, float]:
    """Returns the bytes of weights, of one window's keys and values, and of live blocks'."""
    precision = dataclasses.replace(weights, cache=cache, head="bfloat16")
    rollout = RolloutConfig(max_tokens=NEW, tokens_per_dispatch=1, precision=precision)
    mesh = sharding.make_mesh(MeshConfig(tensor=CHIPS), slices.slice_devices(TOPOLOGY))
    # all that a step of no slot reads is weights; of experts, those that the slots choose
    per_slot = cost_model.cache_read(model, rollout, PROMPT + NEW, CHIPS)
    step = cost_model.decode(model, rollout, SLOTS, PROMPT + NEW, mesh).memory - SLOTS * per_slot
    width = model.head_dim * FORMATS[cache].bits // 8
    scale = 4 if cache == "int8" else 0
    block = decode_attention.block_positions(model.num_kv_heads // CHIPS, PROMPT + NEW, width)
    window, live = positions_read(lengths, block)
    heads = 2 * model.num_layers * model.num_kv_heads
    tokens = lengths.sum()
    copied = 2 * scale * (PROMPT + NEW) * SLOTS * lengths.max()  # of scales, into another layout
    return (
        CHIPS * step * lengths.max() / tokens,
        heads * window * (width + scale) / tokens,
        heads * (live * (width + scale) + copied) / tokens,
    )


def positions_read(lengths: np.ndarray, block: int) -> tuple[int, int]:
    """Returns the cached positions that all steps read, in one window and in live blocks."""
    window = live = 0
    for step in range(lengths.max()):
        longest = PROMPT + step - step % STEPS + STEPS
        window += SLOTS * power_of_two(longest, PROMPT + NEW)
        busy = int((lengths > step).sum())
        live += busy * min(-(-(PROMPT + step) // block) * block, PROMPT + NEW)
        live += (SLOTS - busy) * block
    return window, live


if __name__ == "__main__":
    main()
