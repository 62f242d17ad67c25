"""A run's weights as a Hugging Face folder, with its tokenizer."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from dcmdp_jax import sharding, train_state
from dcmdp_jax.config import Config, MeshConfig
from dcmdp_jax.models import weights
from dcmdp_jax.run import checkpoint, starting
from dcmdp_jax.run.inputs import read_inputs, read_model, read_tokenizer
from dcmdp_jax.tokens import tokenizer as tokenizers


def export(config: Config, workdir: pathlib.Path, folder: str) -> int:
    """Writes the newest readable checkpoint of `workdir` to `folder`; returns its step.

    Raises ValueError where there is no checkpoint.
    """
    model = read_model(config)
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    state, _ = checkpoint.read(workdir, train_state.abstract(config, model, mesh))
    tokenizer = read_tokenizer(config)
    params = train_state.policy_params(state, config)
    weights.save(folder, model, params, token_ids=tokenizers.special_token_ids(tokenizer))
    tokenizers.save(tokenizer, folder)
    return int(state.step)


def warm_start(config: Config, folder: pathlib.Path, alter: Callable[[Any], Any]) -> None:
    """Writes a run's starting weights, changed by `alter`, to `folder/model`."""
    inputs = read_inputs(config)
    params = alter(starting.starting_weights(config, inputs, folder, lambda: False))
    model = folder / "model"
    weights.save(
        model, inputs.model_config, params, token_ids=tokenizers.special_token_ids(inputs.tokenizer)
    )
    tokenizers.save(inputs.tokenizer, model)
