"""What a run needs of a TPU slice, before the chips are rented: its programs compiled for the topology, with no TPU attached.

`libtpu` compiles ahead of time; memory per chip is the compiler's own figure. FLOPs and bytes over the interconnect are counted
here (the compiler's count leaves out Pallas kernels and the trips of loops), and times are the roof's: the largest of FLOPs over
the peak, bytes over the memory's bandwidth and bytes over the links', so that no run is faster.
Lengths are the longest: every prompt and completion at its limit.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import count, sharding, step, sync
from dcmdp_jax.config import Config, ModelConfig
from dcmdp_jax.models import qwen3
from dcmdp_jax.records import Batch
from dcmdp_jax.rollout import generate
from dcmdp_jax.rollout.jetstream import Engine

GIB = 2**30


class Chip(NamedTuple):
    """One device. Sources: cloud.google.com/tpu/docs, the page of each version; links: the sum over a chip's, one way."""

    memory: float  # bytes
    flops: float  # bfloat16 FLOP/s
    bandwidth: float  # bytes/s of memory
    link: float  # bytes/s


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.2e12, 150e9),
    "v5e": Chip(16 * GIB, 197e12, 0.82e12, 200e9),
    "v5p": Chip(95 * GIB, 459e12, 2.77e12, 600e9),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, 400e9),
    "tpu7x": Chip(96 * GIB, 1153e12, 3.69e12, 300e9),  # a device is half a chip
}


class Program(NamedTuple):
    """A compiled function of a run, per chip."""

    name: str
    lowered: Any  # jax.stages.Lowered
    work: count.Work  # of one call
    calls: float  # of it in a constrained step
    knobs: str  # what makes it smaller


class Compiled(NamedTuple):
    """A program as the compiler left it; sizes in bytes per chip."""

    program: Program
    arguments: int
    temporaries: int
    peak: int  # arguments, results that take no argument's place, and temporaries
    seconds: float  # CPU seconds of compilation
    excess: str  # why it does not fit, empty where it does


def topology(name: str, slices: int = 1) -> list[Any]:
    """The devices of a slice such as "v5p:4x4x4", or of several. Raises ValueError where libtpu knows no such slice."""
    kind = name.split(":")[0]
    if kind not in CHIPS or ":" not in name:
        raise ValueError(f"--topology {name!r} is not KIND:SHAPE with KIND one of {', '.join(CHIPS)}, such as v5p:4x4x4 or v5e:8x8")
    # Compiling touches no TPU, so that several processes may; the metadata server is not there to be asked.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", num_slices=slices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"libtpu gives no topology {name!r} (pip install libtpu): {str(error).splitlines()[0]}") from error
    return list(found.devices)


def programs(config: Config, model: ModelConfig, devices: list[Any]) -> Iterator[Program]:
    """What a run compiles on `devices`, each at its longest."""
    mesh, decode_mesh = sharding.meshes(config, devices, process=0)
    chips, processes = mesh.size, len({device.process_index for device in devices})
    state, batch = abstract_state(config, model, mesh), abstract_batch(config, mesh)
    parts = config.algorithm.minibatches * config.algorithm.microbatches
    rows, length = batch.tokens.shape[2:]
    update = count.update(model, rows, length, config, mesh)
    yield Program("train step", step.compile(config, model, mesh).lower(state, batch), update, 1,
                  "algorithm.microbatches, mesh.sequence or mesh.tensor, model.remat")
    score = jax.jit(sharding.over(mesh, partial(step.score, config=config, model=model)))
    yield Program("scoring pass", score.lower(state.params, batch), count.scoring(model, rows, length, parts, config, mesh), 0,
                  "algorithm.microbatches, mesh.sequence or mesh.tensor")
    yield from _engine(config, model, decode_mesh, processes)
    yield Program("weight sync", sync.lower(model, config.rollout.precision, mesh, decode_mesh, state.params),
                  count.sync(model, config.rollout.precision, decode_mesh, chips), 1, "rollout.precision.weights, rollout.mesh.tensor")


def _engine(config: Config, model: ModelConfig, mesh: Any, processes: int) -> Iterator[Program]:
    """Prefill and decoding, of one process on its own devices."""
    rollout, data = config.rollout, config.data
    length = data.max_prompt_tokens + rollout.max_tokens
    slots, prompts = rollout.slots // processes, data.prompts_per_step // processes
    engine = Engine(model, slots=slots, steps=rollout.tokens_per_dispatch, max_length=length, stop_ids=(0,),
                    precision=rollout.precision, mesh=mesh)
    weights = sync.abstract(model, rollout.precision, mesh)
    at_once = max(min(generate.PREFILL_TOKENS // data.max_prompt_tokens, prompts), 1)
    prefill, decode = engine.lower(weights, at_once, data.max_prompt_tokens)
    yield Program("prefill", prefill, count.prefill(model, at_once, data.max_prompt_tokens, mesh), prompts / at_once,
                  "rollout.mesh.tensor, data.max_prompt_tokens")
    waves = -(-prompts * rollout.samples // slots)
    yield Program(f"decode ({rollout.tokens_per_dispatch} tokens)", decode,
                  count.decode(model, rollout, slots, length, mesh), waves * rollout.max_tokens / rollout.tokens_per_dispatch,
                  "rollout.slots, rollout.precision.cache, rollout.mesh.tensor")


def abstract_state(config: Config, model: ModelConfig, mesh: Any) -> Any:
    """Shapes and places of a run's state."""
    shapes = jax.eval_shape(lambda: step.init_state(config, qwen3.init(jax.random.key(0), model)))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes,
                        step.state_shardings(config, model, mesh))


def abstract_batch(config: Config, mesh: Any) -> Batch:
    """The largest batch of a run: no two completions share a row."""
    a, width = config.algorithm, config.rollout.max_tokens
    count = config.data.prompts_per_step * config.rollout.samples // (a.minibatches * a.microbatches)
    length = a.row_length or config.data.max_prompt_tokens + width
    rows = -(-count // sharding.batch_size(mesh)) * sharding.batch_size(mesh)
    sizes = {"tokens": (rows, length), "positions": (rows, length), "segment_ids": (rows, length), "reward": (count,), "group": (count,)}
    kinds = {"mask": jnp.bool_, "rollout_logp": jnp.float32, "reward": jnp.float32}

    def leaf(name, place):
        shape = (a.minibatches, a.microbatches, *sizes.get(name, (count, width)))
        return jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.int32), sharding=place)

    return Batch(**{name: leaf(name, place) for name, place in step.batch_shardings(mesh)._asdict().items()})


def compile(program: Program, chip: Chip) -> Compiled:
    """Compiles for the topology; what the compiler refuses for want of memory is told, not raised."""
    started = time.process_time()
    try:
        memory = program.lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([GMK]) of ([\d.]+)([GMK]) hbm", str(error))
        if not used:
            raise
        need, held = (float(used[i]) * {"G": 1, "M": 2**-10, "K": 2**-20}[used[i + 1]] for i in (1, 3))
        excess = f"needs {need:.1f} GiB of {held:.1f}, {need - held:.1f} too many"
        return Compiled(program, 0, 0, int(need * GIB), time.process_time() - started, excess)
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + fresh + memory.temp_size_in_bytes
    excess = f"needs {peak / GIB:.1f} GiB of {chip.memory / GIB:.0f}" if peak > chip.memory else ""
    return Compiled(program, memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, time.process_time() - started, excess)
