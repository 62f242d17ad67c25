"""What the benchmarks share: shapes of models, prompts, and the clock."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import sizes
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Example, Prompts
from dcmdp_jax.tools import slices

SMALL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
)
SHAPES = {"small": SMALL, "0.6B": sizes.QWEN3_0_6B, "8B": sizes.QWEN3_8B}


def absent_chip(description: str) -> jax.sharding.Mesh:
    """Returns a mesh of one chip of the command line's `--topology`, which need not be there, and
    prints its name.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2")
    topology = parser.parse_args().topology
    print(f"{topology}, jax {jax.__version__}")
    return sharding.make_mesh(MeshConfig(), slices.slice_devices(topology)[:1])


def make_prompts(lengths: np.ndarray) -> Prompts:
    tokens = (
        np.random.default_rng(0)
        .integers(2, 4000, (len(lengths), int(lengths.max())))
        .astype(np.int32)
    )
    return Prompts(tokens, lengths.astype(np.int32), (Example("", ""),) * len(lengths))


def measure(programs: list[Callable], repeats: int, prepare: Callable | None = None) -> np.ndarray:
    """Returns the median seconds of each program over `repeats` rounds, after one that compiles.

    Each round runs every program once, with what `prepare` returns, which is not timed.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds = np.zeros((repeats + 1, len(programs)))
    for row in seconds:
        for i, program in enumerate(programs):
            given = () if prepare is None else (prepare(),)
            start = clock()
            program(*given)
            row[i] = clock() - start
    return np.median(seconds[1:], axis=0)
