"""Does this CPU multiply bfloat16 more quickly than float32? `taskset -c 1 python -m
benchmarks.bfloat16`.

CPU milliseconds of the products of a train step, one thread: forward, and backward to the inputs
and to the weights. Operands are stored in float32 or in bfloat16, sums are float32, and the two
programs run in turn. Where the ratio is above 1, bfloat16 is quicker, and
`--model.compute.bfloat16 yes` trains with it.
"""

from __future__ import annotations

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import measure
from dcmdp_jax.models import quantized

SHAPES = {  # tokens, inputs, outputs
    "SmolLM2-135M, feed-forward": (512, 576, 1536),
    "SmolLM2-135M, head": (256, 576, 49_152),
    "tiny dense, feed-forward": (4096, 256, 768),
    "Qwen3-0.6B, feed-forward": (4736, 1024, 3072),
}
PRODUCTS = {"forward": "ti,io->to", "to inputs": "to,io->ti", "to weights": "ti,to->io"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"{'':28}{'':12} float32  bfloat16  ratio")
    for name, (tokens, inputs, outputs) in SHAPES.items():
        rng = np.random.default_rng(0)
        sizes = {"ti": (tokens, inputs), "io": (inputs, outputs), "to": (tokens, outputs)}
        arrays = {k: jnp.float32(rng.standard_normal(size)) for k, size in sizes.items()}
        for product, spec in PRODUCTS.items():
            operands = [arrays[k] for k in spec.split("->")[0].split(",")]
            programs = [multiply(spec, operands, dtype) for dtype in (jnp.float32, jnp.bfloat16)]
            float32, bfloat16 = 1e3 * measure(programs, repeats)
            print(f"{name:28}{product:12}{float32:8.1f}{bfloat16:10.1f}{float32 / bfloat16:7.2f}")


def multiply(spec: str, operands: list[jax.Array], dtype):
    """Returns the program that multiplies the operands, stored in `dtype`."""
    stored = [x.astype(dtype) for x in operands]
    program = jax.jit(lambda x, y: quantized.einsum(spec, x, y, dtype))
    return lambda: jax.block_until_ready(program(*stored))


if __name__ == "__main__":
    main()
