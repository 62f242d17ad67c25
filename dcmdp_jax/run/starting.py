"""Where a run starts: its newest checkpoint; else a model folder or random weights, warmed up."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from dcmdp_jax import hub, seeds, train_state
from dcmdp_jax.config import Config, Lora
from dcmdp_jax.distributed import processes
from dcmdp_jax.models import decoder, lora, peft, weights
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.records import TrainState
from dcmdp_jax.run import checkpoint, supervised, warmup
from dcmdp_jax.run.inputs import Inputs
from dcmdp_jax.seeds import Stream


def restore(saved: checkpoint.Checkpoints, config: Config, inputs: Inputs) -> TrainState | None:
    """Returns the state of the newest readable checkpoint, or None where there is no checkpoint.

    `inputs.prompts` go on from where that checkpoint left them.
    """
    restored = saved.restore(train_state.abstract(config, inputs.model_config, inputs.mesh))
    if restored is None:
        return None
    state, prompt_state = restored
    inputs.prompts.set_state(prompt_state)
    return state


def first_state(
    config: Config, inputs: Inputs, workdir: pathlib.Path, should_stop: Callable[[], bool]
) -> TrainState:
    """Returns the state before the first step: starting weights, a new optimizer and a new dual."""
    # in the formats of `model.lora.base` at once: the devices may hold no more
    params = starting_weights(config, inputs, workdir, should_stop, freeze=True)
    shardings = train_state.shardings(config, inputs.model_config, inputs.mesh)
    init = partial(train_state.init, config)
    reference = reference_weights(config, inputs)
    adapters = _adapters(config, inputs)
    return jax.jit(init, out_shardings=shardings, donate_argnums=(0, 1))(
        params, reference, adapters
    )


@phase("reading the weights of the reference")
def reference_weights(config: Config, inputs: Inputs) -> Any | None:
    """Returns the parameters of the reference policy's folder; None where there is no folder."""
    if not config.algorithm.reference_folder:
        return None
    shardings = train_state.params_shardings(inputs.model_config, inputs.mesh)
    folder = hub.model_folder(config.algorithm.reference_folder)
    _, params = weights.load(folder, shardings=shardings)
    return params


def starting_policy(params: Any, config: Config, inputs: Inputs) -> Any:
    """Returns the decoder's parameters of a state that starts from `params`: other ones where
    adapters are added or frozen weights rounded. `params` are donated.
    """
    if not (config.model.lora.rank or config.model.trainable):
        return params
    state = train_state.shardings(config, inputs.model_config, inputs.mesh)
    divide = jax.jit(
        partial(train_state.divide, config),
        out_shardings=(state.params, state.frozen),
        donate_argnums=0,
    )
    trained, frozen = divide(params, _adapters(config, inputs))
    return train_state.decoder_params(trained, frozen, config)


def _adapters(config: Config, inputs: Inputs) -> Any:
    """Returns the adapters of `model.lora.folder` on the training mesh; None if it is not set."""
    source = config.model.lora
    if not source.folder:
        return None
    shardings = train_state.shardings(config, inputs.model_config, inputs.mesh)
    adapters = peft.load(hub.model_folder(source.folder), source, inputs.model_config)
    return processes.make_global(adapters, shardings.params)


def starting_weights(
    config: Config,
    inputs: Inputs,
    workdir: pathlib.Path,
    should_stop: Callable[[], bool],
    *,
    freeze: bool = False,
) -> Any:
    """Returns loaded or random parameters, warmed up; the warm-up's losses go to `workdir`, and
    where it learns a file its checkpoints.

    With `freeze` those that are loaded and not warmed up have the formats of `model.lora.base`.
    Raises `stopping.Interrupted` where `should_stop()`, the same on all processes, is true during
    the warm-up.
    """
    load = partial(unwarmed_weights, config, inputs)
    model = inputs.model_config
    if not config.warmup.steps:
        return load(freeze=freeze)
    if inputs.pairs is not None:
        pad_id = inputs.tokenizer.pad_id
        return supervised.run(
            load, inputs.pairs, config, model, pad_id, inputs.mesh, workdir, should_stop
        )
    return warmup.run(load(), config, model, inputs.tokenizer, inputs.mesh, workdir, should_stop)


@phase("reading the weights")
def unwarmed_weights(config: Config, inputs: Inputs, *, freeze: bool = False) -> Any:
    """Returns the parameters of the model folder, or random ones, on the training mesh.

    With `freeze` those of a folder have the formats of `model.lora.base`, as they are read.
    """
    shardings = train_state.params_shardings(inputs.model_config, inputs.mesh)
    if config.model.folder:
        frozen = config.model.lora if freeze and config.model.lora.rank else Lora()
        _, params = weights.load(
            hub.model_folder(config.model.folder),
            shardings=shardings,
            convert=partial(lora.freeze_weight, lora=frozen),
        )
        return params
    init = jax.jit(partial(decoder.init, config=inputs.model_config), out_shardings=shardings)
    return init(jax.random.key(seeds.seed(config.seed, Stream.PARAMETERS)))
