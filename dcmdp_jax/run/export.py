"""A run's weights as a Hugging Face folder, with its tokenizer."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from dcmdp_jax import sharding, train_state
from dcmdp_jax.config import Config
from dcmdp_jax.models import decoder, weights
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.run import checkpoint, starting
from dcmdp_jax.run.inputs import read_inputs, read_model, read_tokenizer
from dcmdp_jax.tokens import tokenizer as tokenizers


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
    params = jax.eval_shape(partial(decoder.init, config=model), jax.random.key(0))
    shapes = jax.eval_shape(partial(train_state.init, config), params)
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    like = sharding.abstract_arrays(shapes, jax.tree.map(lambda _: host, shapes))
    state, _ = checkpoint.read(workdir, like, unread=("opt_state", "stale", "reference"))
    return model, train_state.policy_params(state, config), int(state.step)


def warm_start(config: Config, folder: pathlib.Path, alter: Callable[[Any], Any]) -> None:
    """Writes a run's starting weights, changed by `alter`, to `folder/model`."""
    inputs = read_inputs(config)
    params = alter(starting.starting_weights(config, inputs, folder, lambda: False))
    model = folder / "model"
    weights.save(
        model, inputs.model_config, params, token_ids=tokenizers.special_token_ids(inputs.tokenizer)
    )
    tokenizers.save(inputs.tokenizer, model)
