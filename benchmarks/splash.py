"""What attention with shared prompts takes on a TPU: `python -m benchmarks.splash`.

For one row of 8,192 positions and the heads of Qwen3-8B in bfloat16, forward and backward, it
compiles the splash kernel for a TPU that need not be there (`pip install libtpu`), and prints the
temporary memory and the products of blocks of queries and keys: 2 a block that is computed in the
forward pass, 7 in the backward, or 5 where dq is computed with dk and dv. The row is a prefix with
its branches; without `prefix_ids` every block on or below the diagonal is computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import absent_chip
from dcmdp_jax import sharding
from dcmdp_jax.models.kernels import splash

LENGTH = 8192
BLOCK = 1024
GROUPS = ((8, 512, 960), (7, 1024, 1024), (1, 256, 7936))  # branches, prefix, branch
HEADS = 32
WIDTH = 128


def main() -> None:
    mesh = absent_chip(__doc__)
    place = sharding.replicated(mesh)
    row = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32, sharding=place)
    product = 2 * HEADS * BLOCK**2 * WIDTH / 1e12
    below = LENGTH // BLOCK * (LENGTH // BLOCK + 1) // 2
    print(
        f"whole segments: {temporary_mebibytes(place, row):.0f} MiB, {below} blocks, "
        f"{below * (2 + 5) * product:.2f} TFLOP"
    )
    print(f"shared prompts: {temporary_mebibytes(place, row, row):.0f} MiB")
    for branches, prefix, branch in GROUPS:
        count = num_blocks(branches, prefix, branch)
        print(
            f"  {branches} branches of {branch} behind {prefix}: {count} blocks, "
            f"{count * (2 + 7) * product:.2f} TFLOP; without sharing "
            f"{branches * (prefix + branch) / LENGTH:.2f} rows"
        )


def temporary_mebibytes(place: jax.sharding.NamedSharding, *row: jax.ShapeDtypeStruct) -> float:
    def step(q, k, v, d_out, *row):
        out, gradients = jax.vjp(lambda *arrays: splash.attention(*arrays, *row), q, k, v)
        return out, gradients(d_out)

    q = jax.ShapeDtypeStruct((1, 8, HEADS // 8, LENGTH, WIDTH), jnp.bfloat16, sharding=place)
    k = jax.ShapeDtypeStruct((1, 8, LENGTH, WIDTH), jnp.bfloat16, sharding=place)
    lowered = jax.jit(step).trace(q, k, k, q, *row).lower(lowering_platforms=("tpu",))
    return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20


def num_blocks(branches: int, prefix: int, branch: int) -> int:
    """The blocks with a query that attends to a key of the prefix, and those of a branch."""
    segment = np.repeat(np.arange(branches + 1), [prefix] + [branch] * branches)
    index = np.arange(LENGTH)
    causal = index[:, None] >= index
    to_prefix = causal & (segment == 0)
    to_branch = causal & (segment > 0) & (segment[:, None] == segment)
    shape = (LENGTH // BLOCK, BLOCK, LENGTH // BLOCK, BLOCK)
    return sum(int(m.reshape(shape).any(axis=(1, 3)).sum()) for m in (to_prefix, to_branch))


if __name__ == "__main__":
    main()
