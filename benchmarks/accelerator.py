"""What this machine's accelerator does, in some minutes: `python -m benchmarks.accelerator`.

Random-weight Qwen3 models in bfloat16 on the first device. A model that does not fit keeps its
layer and loses layers, and its name says how many it has. Printed are, beside each figure, its
share of the device's peak (model FLOPs without what is recomputed; causal attention by half) or of
its memory bandwidth (decode: weights and live cache read once a token).

The parts come in the order of their weight and are bounded in time. One that fails or takes too
long is named at the end, and the others go on.

    python -m benchmarks.accelerator --minutes 12 --json accelerator.json
    python -m benchmarks.accelerator --toy            # every part in a size for a CPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bounded, step
from benchmarks.measure import SMALL, make_prompts
from dcmdp_jax import errors, files, sharding, sync
from dcmdp_jax.config import Precision
from dcmdp_jax.models import decoder, sizes
from dcmdp_jax.models.kernels import attention
from dcmdp_jax.models.model_config import Compute, ModelConfig
from dcmdp_jax.models.quantized import FORMATS
from dcmdp_jax.records import Sampling
from dcmdp_jax.report import tables
from dcmdp_jax.rollout import decode
from dcmdp_jax.tools import cost_model

GIB = 2**30
QUICKSTART = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"
# bfloat16 FLOP/s and bytes/s of memory, from the makers' data sheets (without sparsity), by the
# beginning of `device_kind`
PUBLISHED = {
    "TPU v4": (275e12, 1.2e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v5": (459e12, 2.77e12),
    "TPU v6": (918e12, 1.64e12),
    "TPU7x": (1153e12, 3.69e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
    "NVIDIA A100 80GB PCIe": (312e12, 1.94e12),
    "NVIDIA A100": (312e12, 1.56e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H100 NVL": (835e12, 3.9e12),
    "NVIDIA H100": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA B200": (2250e12, 8.0e12),
    "NVIDIA L40S": (362e12, 0.86e12),
    "NVIDIA L40": (181e12, 0.86e12),
    "NVIDIA L4": (121e12, 0.3e12),
}


class Figure(NamedTuple):
    """A line of the table."""

    name: str
    value: float
    unit: str
    share: float | None = None
    of: str = ""  # what it is a share of


class Device(NamedTuple):
    """The device, and what shares are of: the maker's figures, or measured ones."""

    kind: str
    memory: float  # bytes; infinite where the device does not say
    flops: float
    bandwidth: float  # bytes/s


class Size(NamedTuple):
    """How much is measured."""

    models: dict[str, ModelConfig]
    rows: int  # of a train step
    row_length: int
    batches: tuple[int, ...]  # of decode
    context: int  # positions of a cached sequence at the end
    tokens: int  # of a decode dispatch
    attention: int  # positions
    matrix: int  # side of the matrices that measure the peak
    buffer: int  # bytes that measure the bandwidth
    quickstart: dict[str, str]  # options


MOE = dataclasses.replace(sizes.QWEN3_30B_A3B, num_layers=4)
REAL = Size(
    {
        "Qwen3-0.6B": sizes.QWEN3_0_6B,
        "Qwen3-1.7B": sizes.QWEN3_1_7B,
        "Qwen3-8B": sizes.QWEN3_8B,
        "30B-A3B's layers": MOE,
    },
    rows=8,
    row_length=2048,
    batches=(256, 64),
    context=1024,
    tokens=32,
    attention=4096,
    matrix=8192,
    buffer=GIB,
    quickstart={"steps": "30"},
)
TINY = dataclasses.replace(SMALL, num_layers=2, hidden_size=64, intermediate_size=128, head_dim=16)
TOY = Size(
    {
        "Qwen3-0.6B": dataclasses.replace(TINY, tie_word_embeddings=True),
        "Qwen3-1.7B": TINY,
        "Qwen3-8B": TINY,
        "30B-A3B's layers": dataclasses.replace(
            TINY, num_experts=4, experts_per_token=2, expert_size=32
        ),
    },
    rows=2,
    row_length=64,
    batches=(4,),
    context=64,
    tokens=4,
    attention=64,
    matrix=128,
    buffer=2**20,
    quickstart={"steps": "2", "warmup.steps": "2", "eval.every": "0", "data.prompts_per_step": "4"},
)
FORMATS_OF_DECODE = ("bfloat16", "int8", "float8_e4m3fn")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=12, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", default="accelerator.json", help="file of the figures")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    parser.add_argument("--answer", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        file, *names = args.answer
        answer(file, names, TOY if args.toy else REAL)
        return
    command = [sys.executable, "-m", "benchmarks.accelerator", *["--toy"] * args.toy, "--answer"]
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of a GPU's memory
    limits = {name: 600 if args.toy else PARTS[name].limit for name in args.parts}
    figures = []
    failures = {}
    for result in bounded.run(command, limits, 60 * args.minutes):
        made = [(device, Figure(*figure)) for device, figure in result.values]
        figures += [(result.part, *row) for row in made]
        print(f"\n{result.part}\n{table([figure for _, figure in made])}", flush=True)
        if result.failure:
            failures[result.part] = result.failure
            print(f"not complete: {result.failure}", flush=True)
    print(f"\n{' '.join({device for _, device, _ in figures})}, jax {jax.__version__}")
    print(table([figure for _, _, figure in figures]))
    for part, failure in failures.items():
        print(f"{part} is not complete: {failure}")
    record = {
        "jax": jax.__version__,
        "figures": [
            {"part": part, "device": device, **figure._asdict()} for part, device, figure in figures
        ],
        "failures": failures,
    }
    files.write_json(pathlib.Path(args.json), record)
    print(f"wrote {args.json}")


def table(figures: list[Figure]) -> str:
    """Returns the figures as aligned text."""
    rows = [["", "", "", "share", "of"]]
    for figure in figures:
        share = "" if figure.share is None else f"{figure.share:.1%}"
        rows.append([figure.name, f"{figure.value:,.4g}", figure.unit, share, figure.of])
    return tables.aligned_text(rows, left=1)


def answer(file: str, names: list[str], size: Size) -> None:
    """Measures the named parts in this process, for `bounded.run`."""
    device = None

    def measure(name: str) -> Iterator[tuple[str, Figure]]:
        nonlocal device
        if device is None:
            device = describe(size)
        for figure in PARTS[name].measure(size, device):
            yield device.kind, figure
        jax.clear_caches()

    bounded.answer(file, names, measure, errors.type_and_message)


# ------------------------------------------------------------ the device


def describe(size: Size) -> Device:
    """Returns what the first device is."""
    device = jax.devices()[0]
    published = [v for kind, v in PUBLISHED.items() if device.device_kind.startswith(kind)]
    stats = device.memory_stats() or {}
    flops, bandwidth = published[0] if published else (peak(size), copied(size))
    return Device(device.device_kind, stats.get("bytes_limit", np.inf), flops, bandwidth)


def measure_device(size: Size, device: Device) -> Iterator[Figure]:
    """What a large product and a copy reach of the peak and of the memory's bandwidth."""
    flops = peak(size)
    yield Figure("product in bfloat16", flops / 1e12, "TFLOP/s", flops / device.flops, "peak")
    moved = copied(size)
    yield Figure("memory", moved / 1e9, "GB/s", moved / device.bandwidth, "bandwidth")
    if device.memory < np.inf:
        yield Figure("memory that programs may use", device.memory / GIB, "GiB")


def peak(size: Size) -> float:
    """Returns the FLOP/s of products of square matrices in bfloat16."""
    times = 8
    x = jnp.ones((size.matrix, size.matrix), jnp.bfloat16)
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: x @ y * 1e-3, x))
    return times * 2 * size.matrix**3 / seconds(lambda: multiply(x))


def copied(size: Size) -> float:
    """Returns the bytes/s that are read and written by adding 1 to a large array."""
    times = 8
    x = jnp.zeros((size.buffer // 4,), jnp.float32)
    add = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: y + 1, x))
    return times * 2 * x.nbytes / seconds(lambda: add(x))


def seconds(program: Callable[[], Any], repeats: int = 3) -> float:
    """Returns the median wall seconds of a program, after a call that compiles it."""
    jax.block_until_ready(program())
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program())
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def fitting(
    name: str, model: ModelConfig, device: Device, bytes_of_parameter: float
) -> tuple[str, ModelConfig]:
    """Returns the model, or as many of its layers as fit with so many bytes for each parameter in
    0.85 of the memory, and its name. Raises ValueError where not two layers do.
    """
    for layers in range(model.num_layers, 1, -1):
        part = dataclasses.replace(model, num_layers=layers)
        if bytes_of_parameter * cost_model.parameters(part).total <= 0.85 * device.memory:
            whole = layers == model.num_layers
            return name if whole else f"{name}, {layers} layers", part
    raise ValueError(f"{name}: two layers do not fit into {device.memory / GIB:.1f} GiB")


# ------------------------------------------------------------ training


def measure_train(name: str, size: Size, device: Device) -> Iterator[Figure]:
    """Scoring, a train step and a weight sync of one microbatch of full rows."""
    # parameter, two moments, gradient; activations and the engine's weights take the rest
    name, model = fitting(name, size.models[name], device, 18)
    model = dataclasses.replace(model, compute=Compute(bfloat16=True, remat=True))
    prompt = size.row_length // 4
    new = size.row_length - prompt
    before = peak_bytes()
    task = step.Task(
        model,
        size.row_length,
        1,
        scored=step.completions(size.rows, prompt, new),
    )
    tokens = size.rows * size.row_length
    flops = sum(cost_model.forward(model, tokens, size.row_length / 2, size.rows * new))
    took = seconds(task.update)
    yield Figure(
        f"{name}: train step", tokens / took, "tokens/s", 3 * flops / took / device.flops, "peak"
    )
    after = peak_bytes()
    yield Figure(f"{name}: train step, planned memory", task.peak / GIB, "GiB")
    if after > before:  # else an earlier part has used more
        yield Figure(
            f"{name}: train step, used memory", after / GIB, "GiB", after / task.peak, "planned"
        )
    took = seconds(task.score)
    yield Figure(f"{name}: scoring", tokens / took, "tokens/s", flops / took / device.flops, "peak")
    convert = sync.converter(model, Precision("bfloat16"), sharding.single_device_mesh())
    took = seconds(lambda: convert(task.state.params, 0))
    moved = (4 + 2) * cost_model.parameters(model).total
    yield Figure(f"{name}: weight sync", took, "s", moved / took / device.bandwidth, "bandwidth")


def peak_bytes() -> int:
    """Returns the most bytes that the device has held so far; 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


# ------------------------------------------------------------ decode


def measure_decode(name: str, size: Size, device: Device) -> Iterator[Figure]:
    """Decode of each batch from each format of weights, with a bfloat16 cache."""
    # the weights in bfloat16 twice, before and after conversion; the cache takes the rest
    name, model = fitting(name, size.models[name], device, 8)
    model = dataclasses.replace(model, compute=Compute(bfloat16=True))
    make = jax.jit(
        lambda key: jax.tree.map(lambda w: w.astype(jnp.bfloat16), decoder.init(key, model))
    )
    params = make(jax.random.key(0))
    for form in FORMATS_OF_DECODE:
        precision = Precision(form, embed="bfloat16", head="bfloat16", norms="bfloat16")
        weights = sync.converter(model, precision, sharding.single_device_mesh())(params, 0)
        for batch in size.batches:
            context = _context(model, batch, size, device)
            took = decode_seconds(model, weights, batch, context, size.tokens)
            least = read_bytes(model, weights, form, batch, context) / device.bandwidth
            yield Figure(
                f"{name}: decode, {form}, batch {batch}, {context} positions",
                batch / took,
                "tokens/s",
                least / took,
                "bandwidth",
            )


def _context(model: ModelConfig, batch: int, size: Size, device: Device) -> int:
    """The longest context, halved until the cache takes at most 0.4 of the memory."""
    position = 4 * model.num_layers * model.num_kv_heads * model.head_dim * batch
    context = size.context
    while position * context > 0.4 * device.memory and context > 8 * size.tokens:
        context //= 2
    return context


def decode_seconds(
    model: ModelConfig, weights: Any, batch: int, context: int, tokens: int
) -> float:
    """Returns the seconds of a token in every slot: the median of three dispatches, after one that
    compiles, the last of which fills the cache.
    """
    prompts = make_prompts(np.full(1, context - 4 * tokens))
    prefix = jax.jit(partial(decode.prefill, config=model))(
        weights.params, prompts.tokens, prompts.lengths
    )
    state = jax.jit(partial(decode.init_state, model, batch, context, "bfloat16"))()
    ones = jnp.ones((batch,))
    state = jax.jit(partial(decode.insert, positions=context), donate_argnums=0)(
        state,
        prefix,
        jnp.arange(batch),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, 2), jnp.uint32),
        jnp.full((batch,), context),
        Sampling(ones, jnp.zeros(batch, jnp.int32), ones, jnp.zeros(batch)),
    )
    dispatch = jax.jit(
        partial(
            decode.generate,
            config=model,
            stop_ids=(),
            steps=tokens,
            window=context,
            record_experts=False,
        ),
        donate_argnums=1,
    )

    def once() -> Any:
        nonlocal state
        state, sampled = dispatch(weights, state, jnp.int32(batch))
        return sampled.drawn.token

    return seconds(once) / tokens


def read_bytes(model: ModelConfig, weights: Any, form: str, batch: int, context: int) -> float:
    """Returns the bytes that a token in every slot reads: weights, chosen experts, live cache."""
    held = sum(x.nbytes for x in jax.tree.leaves(weights.params))
    if not model.tie_word_embeddings:
        held -= weights.params["embed"].nbytes  # a few rows of it are read
    experts = cost_model.parameters(model).experts * FORMATS[form].bits / 8
    unread = (1 - model.experts_per_token / max(model.num_experts, 1)) ** batch
    cached = 4 * model.num_layers * model.num_kv_heads * model.head_dim
    return held - unread * experts + cached * batch * context


# ------------------------------------------------------------ attention and the quickstart


def measure_attention(size: Size, device: Device) -> Iterator[Figure]:
    """The device's attention kernel, forward and backward, in the shape of Qwen3-8B's layer, and
    its largest error against float32 scores in full, relative to the largest value.
    """
    model = size.models["Qwen3-8B"]
    group = model.num_heads // model.num_kv_heads

    def inputs(length: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (2, model.num_kv_heads, length, model.head_dim)
        q = jax.random.normal(keys[0], (*shape[:2], group, *shape[2:]), jnp.bfloat16)
        k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
        ids = jnp.broadcast_to(1 + (jnp.arange(length) >= length // 4), (2, length))
        return q, k, v, ids.astype(jnp.int32)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        index = jnp.arange(ids.shape[1])
        mask = (index[:, None] >= index) & (ids[:, :, None] == ids[:, None, :])
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        with jax.default_matmul_precision("highest"):
            return attention.attention(q, k, v, mask[:, None, None])

    def both(attend: Callable) -> Callable:
        def value_and_gradients(q, k, v, ids):
            out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
            return out, *pullback(jnp.cos(q).astype(out.dtype))

        return jax.jit(value_and_gradients)

    kernel = both(attention.packed)
    small = inputs(size.attention // 4)
    found = kernel(*small)
    for part, a, b in zip(("values", "dq", "dk", "dv"), found, both(plain)(*small), strict=True):
        b = b.astype(jnp.float32)
        error = jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))
        yield Figure(f"attention: error of {part}", float(error), "relative")
    large = inputs(size.attention)
    took = seconds(lambda: kernel(*large))
    pairs = (1 / 16 + 9 / 16) / 2 * size.attention**2  # of the two segments of a row
    flops = 3.5 * 4 * 2 * model.num_heads * model.head_dim * pairs
    yield Figure(
        f"attention: {size.attention} positions",
        flops / took / 1e12,
        "TFLOP/s",
        flops / took / device.flops,
        "peak",
    )


def measure_quickstart(size: Size, device: Device) -> Iterator[Figure]:
    """The first steps of the quickstart, its warm-up and evaluations included."""
    del device
    from dcmdp_jax.experiment import load_experiment, override
    from dcmdp_jax.train import train

    config = override(load_experiment(str(QUICKSTART)), size.quickstart)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        train(config, pathlib.Path(folder), jax.devices()[:1])
        took = time.perf_counter() - began
        rows = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").open()]
    yield Figure(f"quickstart: {config.steps} steps", took, "s")
    yield Figure("quickstart: a step", float(np.median([row["seconds"] for row in rows])), "s")


class Part(NamedTuple):
    """A part of the measurement, and the most seconds that it may take."""

    measure: Callable[[Size, Device], Iterator[Figure]]
    limit: float


PARTS = {
    "device": Part(measure_device, 90),
    "train 8B": Part(partial(measure_train, "Qwen3-8B"), 240),
    "decode 8B": Part(partial(measure_decode, "Qwen3-8B"), 240),
    "attention": Part(measure_attention, 90),
    "train 0.6B": Part(partial(measure_train, "Qwen3-0.6B"), 150),
    "decode 0.6B": Part(partial(measure_decode, "Qwen3-0.6B"), 150),
    "train MoE": Part(partial(measure_train, "30B-A3B's layers"), 150),
    "decode MoE": Part(partial(measure_decode, "30B-A3B's layers"), 150),
    "quickstart": Part(measure_quickstart, 180),
    "train 1.7B": Part(partial(measure_train, "Qwen3-1.7B"), 150),
    "decode 1.7B": Part(partial(measure_decode, "Qwen3-1.7B"), 150),
}

if __name__ == "__main__":
    main()
