"""Whether a TPU multiplies weights of few bits without a copy in bfloat16:
`python -m benchmarks.few_bits`.

Compiles products of decoding for a TPU that need not be there (`pip install libtpu`) and prints the
bytes of their arguments and of their temporary memory: one projection of Qwen3-8B's feed-forward
for 32 tokens, and the 128 experts of a layer of Qwen3-30B-A3B for 32 tokens with 8 experts each. A
copy of the projection in bfloat16 takes 96 MiB, one of an expert projection 384 MiB.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.measure import absent_chip
from dcmdp_jax import sharding
from dcmdp_jax.models import quantized
from dcmdp_jax.models.kernels.experts import expert_outputs
from dcmdp_jax.models.kernels.swiglu import Experts

FORMATS = ("bfloat16", "int8", "float8_e4m3fn", "int4", "nf4")
PROJECTION = (4096, 12_288)
GATE = (128, 2048, 768)
DOWN = (128, 768, 2048)
TOKENS = 32
CHOSEN = 8


def main() -> None:
    mesh = absent_chip(__doc__)
    place = sharding.replicated(mesh)
    print("MiB of arguments, of temporary memory")

    def show(name, f, *makers):
        shapes = jax.eval_shape(lambda: tuple(make() for make in makers))
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        lowered = jax.jit(f).trace(*shapes).lower(lowering_platforms=("tpu",))
        memory = lowered.compile().memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
        print(f"  {name:36}" + "".join(f"{size / 2**20:8.1f}" for size in sizes), flush=True)

    for name, group in ((name, group) for name in FORMATS for group in (0, 128)):
        if (name, group) == ("bfloat16", 128):
            continue
        said = f"{name}, groups of {group}" if group else name
        show(
            f"projection {said}",
            quantized.project,
            lambda: jnp.zeros((TOKENS, PROJECTION[0]), jnp.bfloat16),
            lambda name=name, group=group: weight(PROJECTION, name, group),
        )
    for name in FORMATS:
        show(
            f"experts {name}",
            lambda x, chosen, weights: expert_outputs(x, chosen, weights, mesh=mesh),
            lambda: jnp.zeros((TOKENS, GATE[1]), jnp.bfloat16),
            lambda: jnp.zeros((TOKENS, CHOSEN), jnp.int32),
            lambda name=name: Experts(*(weight(shape, name, 0) for shape in (GATE, GATE, DOWN))),
        )


def weight(shape: tuple[int, ...], name: str, group: int) -> jax.Array | quantized.Quantized:
    w = jnp.zeros(shape)
    if name not in quantized.SCALED:
        return w.astype(name)
    return quantized.quantize(w, name, (-2,), group)


if __name__ == "__main__":
    main()
