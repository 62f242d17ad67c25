"""A run's weights as a Hugging Face folder, with its tokenizer."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from dcmdp_jax import hub, sharding, train_state
from dcmdp_jax.config import Config
from dcmdp_jax.models import decoder, derived, peft, weights
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import TrainState
from dcmdp_jax.run import checkpoint, starting
from dcmdp_jax.run.inputs import read_inputs, read_model, read_tokenizer
from dcmdp_jax.tokens import tokenizer as tokenizers

# fields of a state of which the newest policy is not made
NOT_POLICY = ("opt_state", "stale", "reference", "before")


def export(config: Config, workdir: pathlib.Path, folder: str) -> int:
    """Writes the newest readable checkpoint of `workdir` to `folder`; returns its step.

    Raises ValueError where there is no checkpoint.
    """
    model, params, step = newest(config, workdir)
    tokenizer = read_tokenizer(config)
    weights.save(folder, model, params, token_ids=tokenizers.special_token_ids(tokenizer))
    tokenizers.save(tokenizer, folder)
    return step


def newest(config: Config, workdir: pathlib.Path) -> tuple[ModelConfig, Any, int]:
    """Returns the model, the policy's parameters and the step of the newest readable checkpoint.

    The host's memory takes the parameters, whatever devices and meshes the run has. Raises
    ValueError where there is no checkpoint.
    """
    model = read_model(config)
    state = _read_to_host(config, model, workdir, NOT_POLICY)
    return model, derived.arrays(train_state.policy_params(state, config)), int(state.step)


def export_adapters(config: Config, workdir: pathlib.Path, folder: str) -> int:
    """Writes the adapters of the newest readable checkpoint of `workdir` to `folder`, in PEFT's
    format; returns its step.

    Raises ValueError where there is no checkpoint, and where no adapters are trained or they belong
    to weights that are in no folder.
    """
    source = config.model
    if not source.lora.rank:
        raise ValueError(
            f"the run in {workdir} trains all parameters, so that there is no adapter to write; "
            "leave --adapter out"
        )
    if not source.folder or config.warmup.steps:
        raise ValueError(
            f"the adapters of the run in {workdir} belong to weights that are in no folder, since "
            "they began random or were warmed up; leave --adapter out, to write the sum of both"
        )
    model = read_model(config)
    state = _read_to_host(config, model, workdir, (*NOT_POLICY, "frozen"))
    base, revision = hub.repository(source.folder)
    peft.save(folder, state.params, source.lora, model, base, revision)
    return int(state.step)


def _read_to_host(
    config: Config, model: ModelConfig, workdir: pathlib.Path, unread: Sequence[str]
) -> TrainState:
    """Returns the state of the newest readable checkpoint, without the fields `unread`."""
    params = jax.eval_shape(partial(decoder.init, config=model), jax.random.key(0))
    shapes = jax.eval_shape(partial(train_state.init, config), params)
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    like = sharding.abstract_arrays(shapes, jax.tree.map(lambda _: host, shapes))
    state, _ = checkpoint.read(workdir, like, unread=unread)
    return state


def warm_start(config: Config, folder: pathlib.Path, alter: Callable[[Any], Any]) -> None:
    """Writes a run's starting weights, changed by `alter`, to `folder/model`."""
    inputs = read_inputs(config)
    params = alter(starting.starting_weights(config, inputs, folder, lambda: False))
    model = folder / "model"
    weights.save(
        model, inputs.model_config, params, token_ids=tokenizers.special_token_ids(inputs.tokenizer)
    )
    tokenizers.save(inputs.tokenizer, model)
