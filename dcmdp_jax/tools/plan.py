"""Plans a run on a TPU slice: compiles its programs for the topology with no TPU attached.

`libtpu` compiles ahead of time. The memory per chip is the compiler's own figure. FLOPs and bytes
over the interconnect are counted by `cost_model`, because the compiler's count leaves out Pallas
kernels and the repetitions of loops. Times are a roofline lower bound: the largest of FLOPs over
the peak, bytes over the memory's bandwidth and bytes over the links' bandwidth.

Lengths are the longest: every prompt and completion at its limit.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dcmdp_jax import compiled_step, files, limits, sharding, sync, train_state, trainer_scores
from dcmdp_jax.config import AlgorithmConfig, Calibrated, Config, with_tolerance
from dcmdp_jax.evaluation import held_out
from dcmdp_jax.models import weights
from dcmdp_jax.models.kernels import decode_attention
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Batch, Weights
from dcmdp_jax.rollout import generate
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.run import supervised
from dcmdp_jax.run.inputs import check as check_inputs
from dcmdp_jax.run.inputs import read_pairs, read_problems, read_tokenizer, verifier_pool
from dcmdp_jax.tokens import packing
from dcmdp_jax.tokens import tokenizer as tokenizers
from dcmdp_jax.tools import cost_model
from dcmdp_jax.tools.slices import CHIPS, GIB, Chip, slice_devices


class Program(NamedTuple):
    """A compiled function of a run, per chip."""

    name: str
    lowered: Any  # jax.stages.Lowered
    work: cost_model.Work  # of one call
    calls: float  # of it in a constrained step
    # Bytes that something else holds on the device meanwhile, such as the training state while the
    # same devices sample.
    beside: int
    settings: str  # the settings that reduce its memory


class Compiled(NamedTuple):
    """The compiler's figures of a program; sizes in bytes per chip."""

    program: Program
    arguments: int
    temporaries: int
    peak: int  # arguments, results that reuse no argument's memory, temporaries, and `beside`
    seconds: float  # CPU seconds of compilation
    excess: str  # why it does not fit; empty if it does


class Plan(NamedTuple):
    """All programs of a run on one slice."""

    topology: str
    devices: int
    chip: Chip
    tokens: int  # sampled in a constrained step, at most
    programs: tuple[Compiled, ...]


def programs(config: Config, model: ModelConfig, devices: list[Any]) -> Iterator[Program]:
    """Yields the programs that a run compiles on `devices`, each at its greatest lengths.

    Those of a sampler that is not the library's own are left out, and the weight sync to it. Raises
    ValueError if the run cannot be laid out on the devices.
    """
    measures_floor = isinstance(config.constraint.tolerance, Calibrated)
    if measures_floor:
        config = with_tolerance(config, 1.0)  # the programs do not depend on the number
    mesh, decode_mesh = sharding.meshes(config, devices, process=0)
    engines = 1 if config.rollout.one_engine else len({device.process_index for device in devices})
    check_inputs(config, model, mesh, decode_mesh, engines)
    state = train_state.abstract(config, model, mesh)
    batch = abstract_batch(config, model, mesh)
    params = train_state.abstract_policy_params(config, model, mesh)
    # What a training device holds between two steps, and beside the decoder's parameters: these are
    # a part of the state, unless `policy_params` makes a copy.
    idle = sharding.local_bytes((state, batch))
    others = idle
    if config.model.policy_params is None:
        others -= sharding.local_bytes(params)
    shared = set(decode_mesh.devices.flat) <= set(mesh.devices.flat)
    engine = None
    if config.rollout.own_engine:
        prompts = config.data.prompts_per_step // engines
        # otherwise the evaluation's exact engine needs more
        evaluates = held_out.is_exact(config) and _has_held_out(config)
        evaluated = -(-config.eval.prompts // engines) if evaluates else 0
        engine = engine_of(config, model, params, decode_mesh, engines, prompts, evaluated)
    # Stale rollouts are sampled while the step runs, into the next batch. Others are over, and
    # their weights are freed.
    ahead = sharding.local_bytes(batch) if config.rollout.staleness else 0
    stale = engine.held if engine and shared and config.rollout.staleness else 0
    parts = config.algorithm.minibatches * config.algorithm.microbatches
    (rows, length) = batch.tokens.shape[2:]
    row_length = "algorithm.row_length, " if config.algorithm.row_length else ""
    yield Program(
        "train step",
        compiled_step.compile_step(config, model, mesh).lower(state, batch),
        cost_model.update(model, rows, length, config, mesh, compiled_step.in_one_pass(config)),
        1,
        stale + ahead,
        f"{row_length}algorithm.microbatches, model.compute.remat, mesh.sequence or mesh.tensor",
    )
    if config.warmup.path:
        yield _supervised(config, model, mesh)
    score = jax.jit(
        sharding.with_mesh(mesh, partial(trainer_scores.score, config=config, model=model))
    )
    # the floor of delta is measured between two rollouts
    scoring = engine.weights_held if engine and shared and measures_floor else 0
    yield Program(
        "scoring pass",
        score.lower(params, batch),
        cost_model.scoring(model, rows, length, parts, config, mesh),
        0,
        others - sharding.local_bytes(batch) + max(stale + ahead, scoring),
        f"{row_length}algorithm.microbatches, mesh.sequence or mesh.tensor",
    )
    if engine is None:
        return
    evaluating = idle + ahead  # the next batch is there
    sampling = evaluating if _has_held_out(config) else idle
    yield from _sampling(config, model, engine, sampling if shared else 0)
    yield _sync(config, model, params, mesh, decode_mesh, others)
    if held_out.is_exact(config) or not _has_held_out(config):
        return
    # The engine that rounds nothing lies beside the run's own.
    config = held_out.exact(config)
    own_weights = engine.weights_held
    prompts = -(-config.eval.prompts // engines)
    exact = engine_of(config, model, params, decode_mesh, engines, prompts)
    held = evaluating + own_weights if shared else own_weights
    for program in (
        *_sampling(config, model, exact, held),
        _sync(config, model, params, mesh, decode_mesh, others + ahead + own_weights * shared),
    ):
        yield program._replace(
            name=f"evaluation: {program.name}",
            calls=0,
            settings="eval.every (0: no evaluation), rollout.slots, rollout.mesh.tensor",
        )


def _supervised(config: Config, model: ModelConfig, mesh: Any) -> Program:
    """Returns the step of the supervised stage, in which no two pairs share a row."""
    warmup = config.warmup
    algorithm = config.algorithm
    as_rollout = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, prompts_per_step=warmup.batch_size, max_refills=0),
        rollout=dataclasses.replace(
            config.rollout, samples=1, staleness=0, in_flight=False, top_logprobs=0
        ),
        algorithm=AlgorithmConfig(
            algorithm.advantage,
            algorithm.surrogate,
            algorithm.reduce,
            microbatches=warmup.microbatches,
            row_length=algorithm.row_length,
        ),
    )
    batch = abstract_batch(as_rollout, model, mesh)
    (rows, length) = batch.tokens.shape[2:]
    return Program(
        "warm-up step",
        supervised.compile_step(config, model, mesh).lower(
            supervised.abstract(config, model, mesh), batch
        ),
        cost_model.update(model, rows, length, as_rollout, mesh, True),
        0,
        0,
        "warmup.microbatches, model.compute.remat, mesh.sequence or mesh.tensor",
    )


def _has_held_out(config: Config) -> bool:
    """True if a run with these settings evaluates on held-out problems."""
    generated = config.data.task is not None and not config.data.path
    return config.eval.every > 0 and bool(config.data.eval_path or generated)


class _Engine(NamedTuple):
    """One of a run's engines, with the bytes that it holds on a device."""

    engine: Engine
    weights: Weights  # shapes
    prompts: int  # of a rollout
    at_once: int  # prompts of one prefill, at most
    is_repeated: bool  # whether a rollout or an evaluation has more
    cache: int
    prefix: int  # the prompts of a prefill, cached, until the next rollout

    @property
    def weights_held(self) -> int:
        return sharding.local_bytes(self.weights)

    @property
    def held(self) -> int:
        """All that it holds while it samples."""
        return self.weights_held + self.cache + self.prefix


def engine_of(
    config: Config,
    model: ModelConfig,
    params: Any,
    mesh: Any,
    engines: int,
    prompts: int,
    evaluated: int = 0,
) -> _Engine:
    """Returns one of a run's engines, which lies on `mesh` and samples `prompts` a rollout, and
    `evaluated` an evaluation.
    """
    rollout = config.rollout
    width = config.data.max_prompt_tokens
    engine = Engine(
        model,
        slots=rollout.slots // engines,
        steps=rollout.tokens_per_dispatch,
        max_length=width + rollout.max_tokens,
        stop_ids=(0,),
        precision=rollout.precision,
        record_experts=config.algorithm.replay_routing,
        top_logprobs=config.rollout.top_logprobs,
        mesh=mesh,
    )
    most = max(prompts, evaluated)
    rows = max(min(generate.PREFILL_TOKENS // width, most), 1)
    at_once = packing.power_of_two(rows, 1 << 30)
    return _Engine(
        engine,
        sync.abstract_weights(params, model, rollout.precision, mesh),
        prompts,
        at_once,
        most > rows,
        sharding.local_bytes(engine.state_shapes()),
        int(cost_model.cached(model, at_once * width, mesh)),
    )


def _sampling(
    config: Config, model: ModelConfig, sampler: _Engine, beside: int
) -> Iterator[Program]:
    """Yields prefill and decoding of one of the engines."""
    rollout = config.rollout
    width = config.data.max_prompt_tokens
    engine = sampler.engine
    prefill, decode = engine.lower(sampler.weights, sampler.at_once, width)
    yield Program(
        "prefill",
        prefill,
        cost_model.prefill(model, sampler.at_once, width, engine.mesh),
        math.ceil(sampler.prompts / sampler.at_once),
        # the prompts before these are cached until these are
        beside + sampler.cache + (sampler.prefix if sampler.is_repeated else 0),
        "rollout.mesh.tensor, data.max_prompt_tokens",
    )
    waves = -(-sampler.prompts * rollout.samples // engine.slots)
    yield Program(
        f"decode, {rollout.tokens_per_dispatch} tokens",
        decode,
        cost_model.decode(model, rollout, engine.slots, engine.max_length, engine.mesh),
        waves * rollout.max_tokens / rollout.tokens_per_dispatch,
        beside + sampler.prefix,
        "rollout.slots, rollout.precision.cache, rollout.mesh.tensor",
    )


def _sync(
    config: Config, model: ModelConfig, params: Any, mesh: Any, decode_mesh: Any, beside: int
) -> Program:
    """Returns the weight sync to the engine; its old weights are freed before."""
    shared = set(decode_mesh.devices.flat) <= set(mesh.devices.flat)
    own = decode_mesh if shared else sharding.process_block(mesh, 0)
    version = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    precision = config.rollout.precision
    return Program(
        "weight sync",
        sync.converter_per_process(model, precision, mesh, own).lower(params, version),
        cost_model.sync(model, precision, own, mesh.size),
        1,
        beside,
        "rollout.precision.weights, rollout.mesh.tensor",
    )


def abstract_batch(config: Config, model: ModelConfig, mesh: Any) -> Batch:
    """Returns shapes that no batch of a run exceeds (see `packing.most_rows`)."""
    a = config.algorithm
    width = config.rollout.max_tokens
    completions = config.data.prompts_per_step * config.rollout.samples
    parts = a.minibatches * a.microbatches
    count = completions // parts
    length = config.row_length
    rows = packing.most_rows(
        count=completions,
        samples=config.rollout.samples,
        parts=parts,
        prompt_tokens=config.data.max_prompt_tokens,
        completion_tokens=width,
        row_length=length,
        row_divisor=sharding.num_batch_shards(mesh),
        share_prompts=config.shares_prompts,
    )
    packed = ("tokens", "positions", "segment_ids", "prefix_ids")
    sizes = dict.fromkeys(packed, (rows, length)) | dict.fromkeys(
        ("reward", "length", "truncated", "group"), (count,)
    )
    routed = sum(model.is_sparse(layer) for layer in range(model.num_layers))
    sizes |= {
        "replayed": (
            rows,
            length,
            routed,
            config.rollout.precision.experts_per_token or model.experts_per_token,
        )
    }
    sizes |= dict.fromkeys(
        ("top_tokens", "top_rollout_logp"), (count, width, config.rollout.top_logprobs)
    )
    dtypes = {
        "mask": jnp.bool_,
        "truncated": jnp.bool_,
        "rollout_logp": jnp.float32,
        "top_rollout_logp": jnp.float32,
        "reward": jnp.float32,
        "replayed": jnp.int16,
    }

    def leaf(name, of_leaf):
        shape = (a.minibatches, a.microbatches, *sizes.get(name, (count, width)))
        return jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32), sharding=of_leaf)

    shardings = train_state.batch_shardings(config, mesh)._asdict()
    return Batch(**{name: leaf(name, of_leaf) for name, of_leaf in shardings.items() if of_leaf})


def compile_program(program: Program, chip: Chip) -> Compiled:
    """Compiles a program for its topology.

    Too little memory is reported in `excess`, not raised. Raises ValueError if the compiler cannot
    lay the program out on the slice.
    """
    began = time.process_time()
    arguments = temporaries = 0
    try:
        memory = program.lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        used = _bytes_used(error, program.name)
    else:
        arguments = memory.argument_size_in_bytes
        temporaries = memory.temp_size_in_bytes
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        used = arguments + results + temporaries
    peak = used + program.beside
    excess = ""
    if peak > chip.memory:
        gibibytes = (peak - chip.memory) / GIB
        excess = f"{gibibytes:.1f} GiB more than the {chip.memory / GIB:g} of a chip"
    return Compiled(program, arguments, temporaries, peak, time.process_time() - began, excess)


def _bytes_used(error: jax.errors.JaxRuntimeError, name: str) -> int:
    """Returns the bytes that a program would use, from the compiler's out-of-memory error.

    The compiler has no typed errors, so its messages are matched here, and here alone. Raises
    ValueError if the slice's shape is at fault, and `error` itself if it is neither.
    """
    message = str(error)
    if "limited ICI routing" in message or "Unexpected device_id" in message:
        raise ValueError(
            f"on this slice a program takes one device or all, and {name} takes some; set "
            "rollout.one_engine to yes, with a rollout.mesh of all devices"
        ) from error
    # "Used" counts arguments and temporaries; "HLO temporaries" appears if these alone do not fit.
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([TGMK])", message)
    if not used:
        raise error
    unit = {"T": 2**40, "G": 2**30, "M": 2**20, "K": 2**10}[used[2]]
    return int(float(used[1]) * unit)


def seconds(work: cost_model.Work, chip: Chip) -> float:
    """Returns the roofline lower bound: no device does this work in less time."""
    return max(_bounds(work, chip).values())


def _bounds(work: cost_model.Work, chip: Chip) -> dict[str, float]:
    """Returns the seconds that each resource takes, at its peak rate."""
    return {
        "FLOPs": work.flops / chip.flops,
        "memory": work.memory / chip.bandwidth,
        "links": work.link / chip.link,
    }


def plan_run(
    config: Config,
    model: ModelConfig,
    name: str,
    slices: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compiles every program of a run for the topology `name`.

    The files of model and data need not be on this machine; those that are there are read. `report`
    receives lines about the progress. Raises ValueError if the run cannot be laid out on the slice,
    or `train` would refuse it.
    """
    devices = slice_devices(name, slices)
    chip = CHIPS[name.split(":")[0]]
    _check_files(config, model)
    compiled = []
    for program in programs(config, model, devices):
        report(f"compiling {program.name}")
        compiled.append(compile_program(program, chip))
    tokens = config.data.prompts_per_step * config.rollout.samples * config.rollout.max_tokens
    return Plan(name, len(devices), chip, tokens, tuple(compiled))


def _check_files(config: Config, model: ModelConfig) -> None:
    """Raises ValueError where `train` does: on a verifier that no process can take, and on weights,
    tokenizer, problems and pairs that are on this machine.
    """
    verifier_pool(config)
    folder = config.model.folder
    if folder and any(pathlib.Path(folder).glob("*.safetensors")):
        weights.check(folder)
    source = config.model.tokenizer or folder
    if source and not tokenizers.is_there(pathlib.Path(source)):
        return
    named = (config.data.path, config.data.eval_path, config.warmup.path)
    if not all(pathlib.Path(path).is_file() for path in named if path):
        return
    tokenizer = read_tokenizer(config)
    tokenizers.check_vocab_size(tokenizer, model.vocab_size)
    read_problems(config, tokenizer, engines=1)
    if config.warmup.path:
        read_pairs(config, model, tokenizer)


def table(plan: Plan) -> list[list[str]]:
    """Returns the figures as rows of text, the header first, then one for each program."""
    head = [
        "program",
        "arguments",
        "temporaries",
        "peak",
        f"of {size(plan.chip.memory)}",
        "TFLOP",
        "link GB",
        "calls",
        "s a step",
        "bound by",
        "compile CPU s",
    ]
    rows = [head]
    for item in plan.programs:
        program = item.program
        work = program.work
        bounds = _bounds(work, plan.chip)
        rows.append(
            [
                program.name,
                size(item.arguments),
                size(item.temporaries),
                size(item.peak),
                "no" if item.excess else "yes",
                f"{work.flops / 1e12:.3g}",
                f"{work.link / 1e9:.3g}",
                f"{program.calls:g}",
                f"{program.calls * seconds(work, plan.chip):.3g}",
                max(bounds, key=bounds.get),
                f"{item.seconds:.0f}",
            ]
        )
    return rows


def size(number: float) -> str:
    """Returns bytes as GiB, or as MiB or KiB if they are few, or as 0."""
    if not number:
        return "0"
    if number < 0.01 * 2**20:
        return f"{number / 2**10:.2f} KiB"
    if number < 0.1 * GIB:
        return f"{number / 2**20:.2f} MiB"
    return f"{number / GIB:.2f} GiB"


def verdict(plan: Plan) -> list[str]:
    """Returns what does not fit and which settings to change, then the time of a step."""
    lines = [
        f"{item.program.name} does not fit: {item.excess}; change {item.program.settings}"
        for item in plan.programs
        if item.excess
    ]
    step_seconds = sum(
        item.program.calls * seconds(item.program.work, plan.chip) for item in plan.programs
    )
    rate = plan.tokens / step_seconds / plan.devices
    return lines + [
        f"a constrained step of {plan.tokens:,} sampled tokens takes at least {step_seconds:.3g} s "
        f"(roofline lower bound), at most {rate:,.0f} tokens/s a device"
    ]


def prompts_shared(config: Config) -> str:
    """Returns, in a sentence, how often the prompt of a group is computed."""
    if config.shares_prompts:
        return (
            "at the greatest lengths a prompt is computed once for "
            f"{config.longest_sharing} of its {config.rollout.samples} completions, as many as a "
            f"row of {config.row_length} tokens or a microbatch holds"
        )
    own = "every completion is computed with a prompt of its own"
    if not config.algorithm.share_prompts:
        return f"{own} (algorithm.share_prompts=False)"
    parts = config.algorithm.minibatches * config.algorithm.microbatches
    in_microbatch = config.data.prompts_per_step * config.rollout.samples // parts
    if min(in_microbatch, config.rollout.samples) == 1:
        return f"{own}: a microbatch holds one completion of each"
    two = config.data.max_prompt_tokens - 1 + 2 * (1 + config.rollout.max_tokens)
    most = limits.MAX_SHARED_ROW
    if two > most:
        return (
            f"{own}: two of the greatest length with one prompt take a row of {two} tokens, and "
            f"prompts are shared in rows of at most {most}"
        )
    if config.row_length > most:
        return (
            f"{own}, because a row of {config.row_length} tokens is longer than {most}; prompts "
            "are shared with a shorter algorithm.row_length"
        )
    return (
        f"{own}, because a row of {config.row_length} tokens does not hold two of the greatest "
        f"length with one prompt; prompts are shared with algorithm.row_length={two} or longer"
    )


def decode_reads(config: Config, model: ModelConfig) -> str:
    """Returns, in a sentence, what a decode step of the library's engine reads of the cache."""
    rollout = config.rollout
    mesh = rollout.mesh if rollout.devices else config.mesh
    length = config.data.max_prompt_tokens + rollout.max_tokens
    read = cost_model.positions_read(model, rollout, length, mesh.tensor)
    share = f"{read:,.0f} of {length:,} cached positions, in the mean over a longest completion"
    if decode_attention.is_supported(model.head_dim):
        return f"a decode step reads the blocks of each slot that hold tokens: {share}"
    return (
        f"a decode step reads one window for all slots: {share}; on a TPU it reads what each slot "
        f"holds if the model's head_dim is a multiple of {decode_attention.LANES}, and this one "
        f"has {model.head_dim}"
    )


def write(plan: Plan, path: str) -> None:
    """Writes the plan as JSON: bytes, FLOPs and seconds per device."""
    rows = [
        {
            "program": item.program.name,
            "arguments": item.arguments,
            "temporaries": item.temporaries,
            "peak": item.peak,
            "excess": item.excess,
            "settings": item.program.settings,
            "calls": item.program.calls,
            **item.program.work._asdict(),
            "seconds": seconds(item.program.work, plan.chip),
            "compile_cpu_seconds": item.seconds,
        }
        for item in plan.programs
    ]
    record = {
        "topology": plan.topology,
        "devices": plan.devices,
        "tokens": plan.tokens,
        "programs": rows,
    }
    files.write_json(pathlib.Path(path), record)
