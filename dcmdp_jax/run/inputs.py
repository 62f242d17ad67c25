"""What a run reads: devices, model shape, tokenizer and problems, checked before anything is
compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, NamedTuple

import jax

from dcmdp_jax import data, hub, seeds, sharding, sync
from dcmdp_jax.config import Config, DataConfig
from dcmdp_jax.distributed import processes
from dcmdp_jax.losses import _arguments
from dcmdp_jax.losses._separable import is_separable
from dcmdp_jax.models import decoder, lora, peft, weights
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Prompts
from dcmdp_jax.rollout import servers
from dcmdp_jax.run import pairs, staging
from dcmdp_jax.run.pairs import Pair
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tokens import tokenizer as tokenizers
from dcmdp_jax.tokens.tokenizer import Tokenizer
from dcmdp_jax.verifier_pool import VerifierPool


class Inputs(NamedTuple):
    """What a run reads."""

    model_config: ModelConfig
    tokenizer: Tokenizer
    prompts: Iterator[Prompts]  # endless; with get_state() and set_state(state)
    held_out: Prompts | None
    mesh: jax.sharding.Mesh  # that trains
    decode_mesh: jax.sharding.Mesh  # that samples
    pairs: list[Pair] | None  # that a warm-up learns, if `warmup.path` is set
    verifiers: VerifierPool | None  # if the verifier has a time limit
    lock: IO[str] | staging.Lock | None = (
        None  # on the work folder, held by process 0 until the run ends
    )


def read_inputs(config: Config, devices: Sequence[jax.Device] | None = None) -> Inputs:
    """Reads and checks model shape, tokenizer and problems, and lays the meshes over `devices`.

    Args:
        devices: those of all processes that the run may use; None: all there are.

    Raises ValueError, in one sentence, on whatever cannot work.
    """
    mesh, decode_mesh = sharding.meshes(config, jax.devices() if devices is None else devices)
    model = read_model(config)
    if config.model.folder:
        weights.check(hub.model_folder(config.model.folder))
    if config.algorithm.reference_folder:
        check_reference(hub.model_folder(config.algorithm.reference_folder), model)
    if config.model.lora.folder:
        peft.check(hub.model_folder(config.model.lora.folder), config.model.lora, model)
    engines = processes.num_engines(config.rollout)
    check(config, model, mesh, decode_mesh, engines)
    if config.rollout.server:
        servers.check(config)
    tokenizer = read_tokenizer(config)
    tokenizers.check_vocab_size(tokenizer, model.vocab_size)
    prompts, held_out = read_problems(config, tokenizer, engines)
    if config.eval.every and held_out is None:
        processes.log0("no held-out evaluation: data.eval_path names no file")
    learnt = read_pairs(config, model, tokenizer) if config.warmup.path else None
    verifiers = verifier_pool(config)
    return Inputs(model, tokenizer, prompts, held_out, mesh, decode_mesh, learnt, verifiers)


def check(
    config: Config,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    decode_mesh: jax.sharding.Mesh,
    engines: int,
) -> None:
    """Raises ValueError on options that cannot work together on these meshes.

    Compiles nothing and reads no file.
    """
    if config.algorithm.replay_routing and not model.num_experts:
        raise ValueError(
            "algorithm.replay_routing replays the choices of a router, and this model is dense; "
            "leave it out"
        )
    rollout = config.rollout
    if config.algorithm.accept and (rollout.staleness or config.algorithm.offload):
        raise ValueError(
            "algorithm.accept judges a step by the next batch and keeps the state before it on the "
            "devices; set rollout.staleness to 0 and algorithm.offload to no"
        )
    if rollout.top_logprobs and (rollout.top_k or rollout.top_p < 1 or rollout.min_p):
        raise ValueError(
            f"rollout.top_logprobs={rollout.top_logprobs} are compared over the full vocabulary, "
            "and rollout.top_k, top_p or min_p cuts it; leave these at 0, 1 and 0"
        )
    if rollout.top_logprobs > model.vocab_size:
        raise ValueError(
            f"rollout.top_logprobs={rollout.top_logprobs} tokens are more than the model's "
            f"vocabulary of {model.vocab_size}; set it to that at most"
        )
    takes_top = _arguments.takes(config.algorithm.surrogate, "top_logp")
    if bool(config.rollout.top_logprobs) != takes_top:
        raise ValueError(
            "rollout.top_logprobs is for a surrogate that takes top_logp, such as "
            "losses.centering.centred, and such a surrogate needs it; set both or neither"
        )
    if takes_top and not is_separable(config.algorithm.surrogate):
        raise ValueError(
            "the surrogate takes top_logp, and its microbatches are scored one at a time; let each "
            "completion's loss depend on that completion alone, and set surrogate.separable = True"
        )
    learns_task = config.warmup.steps and not config.warmup.path
    if learns_task and not hasattr(config.data.task, "solution"):
        raise ValueError(
            "warmup learns the solutions of data.task, and there are none; give the task a method "
            "solution(example, rng), set warmup.path to a file of pairs, or set --warmup.steps 0"
        )
    if config.model.lora.rank:
        lora.check(config.model.lora, model)
    shapes = jax.eval_shape(partial(decoder.init, config=model), jax.random.key(0))
    sharding.param_shardings(decoder.logical_axes(model), mesh, sharding.TRAIN, shapes)
    split = []
    if learns_task:  # pairs of a file are packed into rows instead
        shards = sharding.num_batch_shards(mesh)
        split.append(("warmup.batch_size", config.warmup.batch_size, shards))
    if config.rollout.own_engine:
        sync.check(model, config.rollout.precision, decode_mesh)
        shards = engines * sharding.num_batch_shards(decode_mesh)
        split.append(("rollout.slots", config.rollout.slots, shards))
    for name, size, shards in split:
        if size % shards:
            raise ValueError(f"{name}={size} does not divide over the mesh's {shards} batch shards")
    if config.data.prompts_per_step % engines:
        raise ValueError(
            f"data.prompts_per_step={config.data.prompts_per_step} does not divide over {engines} "
            "engines"
        )
    positions = config.data.max_prompt_tokens + config.rollout.max_tokens
    if positions > model.max_position:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_tokens = {positions} positions are more than "
            f"the model's {model.max_position}"
        )


def check_reference(folder: str, model: ModelConfig) -> None:
    """Raises ValueError if a folder does not hold weights of the policy's architecture."""
    weights.check(folder)
    found = dataclasses.replace(weights.read_config(folder), compute=model.compute)
    differing = [
        field.name
        for field in dataclasses.fields(model)
        if getattr(found, field.name) != getattr(model, field.name)
    ]
    if differing:
        raise ValueError(
            f"algorithm.reference_folder={folder} holds a model of another architecture than the "
            f"policy's (it differs in {', '.join(differing)}); give a folder of the same one"
        )


def read_problems(
    config: Config, tokenizer: Tokenizer, engines: int
) -> tuple[Iterator[Prompts], Prompts | None]:
    """Returns this process's prompts, and the held-out problems if there are any.

    Raises ValueError where one cannot be read or does not fit.
    """
    task = config.data.task
    prompt_format = read_format(config.data)
    tokenize = partial(
        data.tokenize,
        tokenizer=tokenizer,
        prompt_format=prompt_format,
        max_prompt_tokens=config.data.max_prompt_tokens,
    )
    seed = seeds.seed(config.seed, Stream.PROMPTS)
    prompts = data.prompt_batches(
        data.read(hub.data_file(config.data.path)) if config.data.path else task,
        tokenizer,
        prompt_format,
        batch_size=config.data.prompts_per_step,
        max_prompt_tokens=config.data.max_prompt_tokens,
        seed=seed,
        shuffle=config.data.shuffle,
        process_index=jax.process_index() % engines,
        process_count=engines,
    )
    if not config.data.path:  # a prompt that is too long is refused before any work
        tokenize([task.example(0, seed)])
    if not config.eval.every:
        return prompts, None
    if config.data.eval_path:
        problems = data.read(hub.data_file(config.data.eval_path))[: config.eval.prompts]
        return prompts, tokenize(problems)
    if config.data.path or task is None:
        return prompts, None
    return prompts, tokenize(task.held_out(config.eval.prompts))


def read_pairs(config: Config, model: ModelConfig, tokenizer: Tokenizer) -> list[Pair]:
    """Returns the pairs of `warmup.path` that fit in a row.

    Raises ValueError where one cannot be read.
    """
    longest = min(config.row_length, model.max_position)
    file = hub.data_file(config.warmup.path)
    return pairs.read(file, tokenizer, read_format(config.data), max_tokens=longest)


def read_format(config: DataConfig) -> data.PromptFormat:
    """Returns how prompts are made from problems."""
    return data.PromptFormat(
        chat=config.chat,
        enable_thinking=config.enable_thinking,
        instruction=config.instruction,
        special_tokens_in_text=config.special_tokens_in_text,
    )


def verifier_pool(config: Config) -> VerifierPool | None:
    """Returns the processes of the verifier, none started yet; None if it has no time limit.

    Raises ValueError where the verifier cannot be sent to a process.
    """
    options = config.data
    if not options.verifier_timeout:
        return None
    return VerifierPool(
        options.reward_function(), options.verifier_timeout, options.verifier_processes
    )


def read_model(config: Config) -> ModelConfig:
    """Returns the model's shape. Raises ValueError where the configuration names none."""
    source = config.model
    if not source.folder and source.architecture is None:
        raise ValueError(
            "model.folder names no folder and the experiment has no model.architecture; give "
            "--model.folder DIR"
        )
    folder = hub.settings_folder(source.folder)
    model = weights.read_config(folder) if folder else source.architecture
    return dataclasses.replace(model, compute=source.compute)


def read_tokenizer(config: Config) -> Tokenizer:
    """Returns the named tokenizer, else the model folder's, else the task's characters.

    Raises ValueError where there is none.
    """
    if config.model.tokenizer or config.model.folder:
        folder = hub.settings_folder(config.model.folder)
        return tokenizers.load(hub.settings_folder(config.model.tokenizer) or folder, folder)
    if not hasattr(config.data.task, "alphabet"):
        raise ValueError("model.tokenizer names no tokenizer; give --model.tokenizer DIR")
    return tokenizers.CharacterTokenizer(config.data.task.alphabet)
