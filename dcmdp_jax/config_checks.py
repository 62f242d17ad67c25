"""What every `config.Config` is checked for before a run is made of it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import typing
from typing import Any

from dcmdp_jax import limits
from dcmdp_jax.models.model_config import PROJECTIONS

# Smallest and largest value of a number. Numbers that are not listed have a rule of their own in
# `check`, in ModelConfig or in the task.
_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 2**30 - 1),  # the state counts them in int32
    "seed": (0, 2**32 - 1),
    "data.verifier_timeout": (0, 1e6),
    "data.verifier_processes": (1, 2**10),
    "data.max_refills": (0, 2**10 - 1),
    "model.lora.rank": (0, 2**16),
    "model.lora.alpha": (1e-6, limits.MAX_FLOAT),
    "model.lora.base_group": (-1, 2**24),
    "data.prompts_per_step": (1, 2**20),
    "data.max_prompt_tokens": (1, 2**24),
    "rollout.samples": (1, 2**20),
    "rollout.max_tokens": (1, 2**24),
    "rollout.slots": (1, 2**16),
    "rollout.tokens_per_dispatch": (1, 2**12),
    "rollout.temperature": (1e-6, 1e6),
    "rollout.top_k": (0, limits.MAX_INT),
    "rollout.top_logprobs": (0, 1024),
    "rollout.precision.group": (-1, 2**24),
    "rollout.precision.experts_per_token": (0, 2**16),
    "rollout.staleness": (0, 16),  # each is a copy of the parameters
    "algorithm.minibatches": (1, 2**20),
    "algorithm.microbatches": (1, 2**20),
    "algorithm.epochs": (1, 2**20),
    "algorithm.row_length": (0, 2**24),
    "algorithm.reference_coefficient": (0, limits.MAX_FLOAT),
    "algorithm.entropy_coefficient": (0, limits.MAX_FLOAT),
    "algorithm.entropy_target": (0, limits.MAX_FLOAT),
    "algorithm.entropy_lr": (0, limits.MAX_FLOAT),
    "algorithm.entropy_coefficient_max": (0, limits.MAX_FLOAT),
    "algorithm.learning_rate": (0, limits.MAX_FLOAT),
    "algorithm.lr_warmup_steps": (0, 2**30),
    "algorithm.weight_decay": (0, limits.MAX_FLOAT),
    "algorithm.grad_clip": (0, limits.MAX_FLOAT),
    "algorithm.max_skipped": (0, limits.MAX_INT),
    "warmup.steps": (0, 2**30),
    "warmup.batch_size": (1, 2**20),
    "warmup.microbatches": (1, 2**20),
    "warmup.learning_rate": (0, limits.MAX_FLOAT),
    "eval.every": (0, 2**30),
    "eval.prompts": (0, 2**16),
    "eval.temperature": (1e-6, 1e6),
    "checkpoint.every": (0, 2**30),
    "checkpoint.keep": (1, 2**20),
    **{
        f"{mesh}.{axis}": (0 if axis == "fsdp" else 1, 2**20)
        for mesh in ("mesh", "rollout.mesh")
        for axis in ("data", "fsdp", "expert", "sequence", "tensor")
    },
}


# What the functions of an experiment are called with.
_CALLS = {
    "algorithm.surrogate": "logp, old_logp, rollout_logp, advantage, mask",
    "algorithm.reduce": "loss, mask",
    "algorithm.update_scale": "logp, rollout_logp, mask, steps",
    "algorithm.accept": "old_logp, rollout_logp, advantage, mask",
    "algorithm.schedule": "updates",
    "constraint.shaping": "advantage, old_logp, rollout_logp, multiplier, tolerance, mask",
    "constraint.penalty": "logp, rollout_logp, mask, multiplier",
}
# Passed by name to a function that has such parameters; `run.inputs` checks that it gets them.
_BY_NAME = {"algorithm.surrogate": {"top_logp", "top_rollout_logp"}}


def check(config: Any) -> None:
    """Raises ValueError on what is wrong whatever the files, devices and model are."""
    data = config.data
    rollout = config.rollout
    algorithm = config.algorithm
    if not config.name:
        raise ValueError("name is empty; it names the run's folder")
    _check_numbers(config)
    _check_calls(config)
    for name, value in (("beta1", algorithm.beta1), ("beta2", algorithm.beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"algorithm.{name}={value} must lie in [0, 1)")
    _check_regularisers(algorithm)
    if algorithm.reference_folder and (config.model.trainable or config.model.lora.rank):
        raise ValueError(
            "algorithm.reference_folder holds all parameters, and model.trainable or model.lora "
            "trains others, of which a reference is kept; leave one of the two out"
        )
    completions = data.prompts_per_step * rollout.samples
    parts = algorithm.minibatches * algorithm.microbatches
    if completions % parts:
        raise ValueError(
            f"data.prompts_per_step * rollout.samples = {completions} completions do not divide "
            f"into algorithm.minibatches * algorithm.microbatches = {parts} parts"
        )
    if data.max_refills and rollout.samples < 2:
        raise ValueError(
            "data.max_refills replaces prompts whose completions all earn the same, and "
            "rollout.samples=1 leaves no other; sample more, or leave it out"
        )
    row = data.max_prompt_tokens + rollout.max_tokens
    if algorithm.row_length and algorithm.row_length < row:
        raise ValueError(
            f"algorithm.row_length={algorithm.row_length} is shorter than one prompt and "
            f"completion (data.max_prompt_tokens + rollout.max_tokens = {row})"
        )
    if rollout.devices < -1:
        raise ValueError(
            f"rollout.devices={rollout.devices} must be a number of devices, or -1 for all"
        )
    if not all(rollout.stop_strings):
        raise ValueError(
            "rollout.stop_strings holds an empty text, which would end every completion; leave it "
            "out"
        )
    if rollout.sampler is not None and rollout.server:
        raise ValueError(
            f"rollout.sampler and rollout.server={rollout.server!r} are both set, and one samples; "
            "leave one of the two out"
        )
    if rollout.in_flight and (rollout.staleness != 1 or rollout.own_engine):
        raise ValueError(
            "rollout.in_flight gives a server new weights in the middle of a batch, the one that "
            "it samples while an update runs; set rollout.staleness to 1 and a rollout.server or "
            "rollout.sampler, or leave rollout.in_flight out"
        )
    if rollout.weights_folder and not rollout.server:
        raise ValueError(
            "rollout.weights_folder is for rollout.server, which is not set; set it, or leave "
            "rollout.weights_folder out"
        )
    if not rollout.devices and rollout.mesh != type(rollout.mesh)():
        raise ValueError(
            "rollout.mesh needs rollout.devices, the devices that it lays out; set "
            "rollout.devices, or leave rollout.mesh out"
        )
    if not 0 < rollout.top_p <= 1 or not 0 <= rollout.min_p < 1:
        raise ValueError(
            f"rollout.top_p={rollout.top_p} must lie in (0, 1] and rollout.min_p={rollout.min_p} "
            "in [0, 1)"
        )
    if (config.model.trainable is None) != (config.model.policy_params is None):
        raise ValueError(
            "model.trainable makes what is trained, and model.policy_params the decoder's "
            "parameters from it; set both or neither"
        )
    _check_lora(config.model)
    _check_quantize_aware(config)
    dual = config.constraint
    measured = dual.tolerance if dataclasses.is_dataclass(dual.tolerance) else None
    if measured and (measured.slack < 0 or measured.batches < 2):
        raise ValueError(
            f"constraint.tolerance={measured} needs slack >= 0 and batches >= 2, for its standard "
            "error"
        )
    if (
        not measured
        and dual.tolerance < 0
        or dual.dual_lr < 0
        or not 0 <= dual.multiplier_init <= dual.multiplier_max
    ):
        raise ValueError(
            "constraint needs tolerance >= 0, dual_lr >= 0 and "
            "0 <= multiplier_init <= multiplier_max"
        )
    warmup = config.warmup
    if warmup.path and not warmup.steps:
        raise ValueError(
            "warmup.path names a file, and warmup.steps=0 learns nothing of it; set warmup.steps"
        )
    if warmup.microbatches > 1 and not warmup.path:
        raise ValueError(
            "warmup.microbatches divides the pairs of warmup.path, which names no file; set it, or "
            "leave warmup.microbatches out"
        )
    if warmup.batch_size % warmup.microbatches:
        raise ValueError(
            f"warmup.batch_size={warmup.batch_size} does not divide into "
            f"warmup.microbatches={warmup.microbatches} parts"
        )
    if config.eval.every and config.eval.prompts < 1:
        raise ValueError(
            f"eval.prompts={config.eval.prompts} must be at least 1; set eval.every=0 to leave "
            "evaluation out"
        )
    if data.verifier is None and data.task is None:
        raise ValueError(
            "data.verifier is not set; set a function (example, text) -> reward, such as "
            "rewards.math_answer"
        )
    if not (data.path or data.task):
        raise ValueError(
            "data.path names no file and the experiment has no data.task; give --data.path FILE"
        )


def _check_numbers(config: Any) -> None:
    """Checks the type and the range of every number of a configuration."""
    for name, kind in scalar_fields(config).items():
        value = _lookup(config, name)
        if kind is int and not isinstance(value, numbers.Integral):
            raise ValueError(f"{name}={value!r} must be an integer")
        largest = limits.MAX_INT if kind is int else limits.MAX_FLOAT
        if kind in (int, float) and not dataclasses.is_dataclass(value):  # config.Calibrated
            limits.check_number(name, value, *_RANGES.get(name, (-largest, largest)))


def _check_calls(config: Any) -> None:
    """Raises ValueError on a function that cannot be called as it will be."""
    for name, arguments in _CALLS.items():
        function = _lookup(config, name)
        if function is None:
            continue
        try:
            signature = inspect.signature(function)
        except ValueError:  # a builtin that tells none
            continue
        except TypeError as error:
            raise ValueError(f"{name}={function} is no function: {error}") from None
        try:
            named = dict.fromkeys(_BY_NAME.get(name, set()) & signature.parameters.keys())
            signature.bind(*arguments.split(", "), **named)
        except TypeError as error:
            hint = ""
            if name == "algorithm.surrogate":
                hint = "; losses.corrections.decoupled makes a surrogate of a loss of losses.policy"
            raise ValueError(
                f"{name}={getattr(function, '__name__', function)} is called with ({arguments}): "
                f"{error}{hint}"
            ) from None


def _default(config: Any, name: str) -> Any:
    """Returns the default of a field of a dataclass."""
    return next(item.default for item in dataclasses.fields(config) if item.name == name)


def _lookup(config: Any, name: str) -> Any:
    """Returns the value of a field by its dotted name."""
    return functools.reduce(getattr, name.split("."), config)


def _check_regularisers(algorithm: Any) -> None:
    """Raises ValueError on options of a reference policy or an entropy bonus that are not read."""
    options = {
        "reference_coefficient": algorithm.reference_coefficient != 1.0,
        "reference_in_reward": algorithm.reference_in_reward,
        "reference_folder": algorithm.reference_folder,
        "reference_update": algorithm.reference_update,
    }
    given = [name for name, is_set in options.items() if is_set]
    if given and algorithm.reference_penalty is None:
        raise ValueError(
            f"algorithm.{given[0]} needs algorithm.reference_penalty, such as losses.kl.k3; set "
            f"it, or leave algorithm.{given[0]} out"
        )
    followed = ("entropy_lr", "entropy_coefficient_max")
    given = [name for name in followed if getattr(algorithm, name) != _default(algorithm, name)]
    if given and not algorithm.entropy_target:
        raise ValueError(
            f"algorithm.{given[0]} needs algorithm.entropy_target, which the coefficient follows; "
            f"set it, or leave algorithm.{given[0]} out"
        )
    start = algorithm.entropy_coefficient
    if algorithm.entropy_target and start > algorithm.entropy_coefficient_max:
        raise ValueError(
            f"algorithm.entropy_coefficient={start}, where the coefficient starts, is more than "
            f"algorithm.entropy_coefficient_max={algorithm.entropy_coefficient_max}"
        )


def _check_lora(model: Any) -> None:
    lora = model.lora
    if not lora.rank:
        if lora.folder:
            raise ValueError(
                f"model.lora.folder={lora.folder} holds adapters, and model.lora.rank=0 trains "
                "none; set model.lora.rank to their r"
            )
        return
    if model.trainable is not None:
        raise ValueError(
            f"model.lora.rank={lora.rank} and model.trainable both say what is trained; leave one "
            "of the two out"
        )
    unknown = [name for name in lora.targets if name not in PROJECTIONS]
    if unknown or not lora.targets:
        raise ValueError(
            f"model.lora.targets={lora.targets} must be some of {', '.join(PROJECTIONS)}"
        )


def _check_quantize_aware(config: Any) -> None:
    if not config.algorithm.quantize_aware:
        return
    rollout = config.rollout
    if not rollout.own_engine:
        name = "rollout.server" if rollout.server else "rollout.sampler"
        raise ValueError(
            "algorithm.quantize_aware rounds as the library's own engine does, by "
            f"rollout.precision, which {name} does not read; leave one of the two out"
        )
    for name in ("activations", "cache", "experts_per_token"):
        value = getattr(rollout.precision, name)
        if value:
            raise ValueError(
                "algorithm.quantize_aware gives the trainer the engine's weights alone, and "
                f"rollout.precision.{name}={value} is not of weights; leave one of the two out"
            )


def scalar_fields(config: Any, prefix: str = "") -> dict[str, type]:
    """Returns the dotted names of the fields that the command line may set, with their types."""
    hints = typing.get_type_hints(type(config))
    types = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = prefix + item.name
        if dataclasses.is_dataclass(value):
            types |= scalar_fields(value, name + ".")
        if hints[item.name] in (int, float, bool, str):
            types[name] = hints[item.name]
        elif name == "constraint.tolerance":  # a number, or config.Calibrated
            types[name] = float
    return types
