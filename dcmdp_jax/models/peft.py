"""Adapters in and out of the format of Hugging Face's peft: adapter_config.json and
adapter_model.safetensors.

    lora_A [r, inputs] is `down` transposed, lora_B [outputs, r] is `up` transposed

of each layer and expert, under the name of the projection that `weights.parameter_table` gives.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dcmdp_jax.config import Lora
from dcmdp_jax.files import atomic_folder, read_json_object, share_as_folder
from dcmdp_jax.models import lora as adapters_of
from dcmdp_jax.models import weights
from dcmdp_jax.models.model_config import ModelConfig

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# What this library's adapters do not have: settings, and the values that leave them out.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    # others (PiSSA, OLoRA, CorDA, LoftQ) change the base weights, which are not in the folder
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def check(folder: str | pathlib.Path, lora: Lora, config: ModelConfig) -> None:
    """Raises ValueError for what `load` refuses, but for numbers that are not finite."""
    _open(pathlib.Path(folder), lora, config)


def load(folder: str | pathlib.Path, lora: Lora, config: ModelConfig) -> dict:
    """Returns the adapters of a folder as a tree of `lora.init`, of float32 NumPy arrays.

    Raises ValueError for a missing or damaged file, for adapters of another rank, alpha or targets,
    or of another model, for settings that these adapters do not have, and for numbers that are not
    finite.
    """
    file = _open(pathlib.Path(folder), lora, config)

    def stacked(leaf: weights.Leaf, matrix: str, shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, np.float32)
        for index, tensor in leaf.tensors.items():
            name = _name(tensor, matrix)
            out[index] = file.get_slice(name)[:].T.reshape(out[index].shape)
            if not np.isfinite(out[index]).all():
                raise ValueError(f"{folder}: tensor {name} holds NaN or infinity")
        return out

    def adapter(leaf: weights.Leaf, shapes: dict) -> dict:
        return {
            "down": stacked(leaf, "A", shapes["down"].shape),
            "up": stacked(leaf, "B", shapes["up"].shape),
        }

    return _map(adapter, lora, config, adapters_of.abstract(lora, config))


def save(
    folder: str | pathlib.Path,
    adapters: dict,
    lora: Lora,
    config: ModelConfig,
    base: str,
    revision: str | None = None,
) -> None:
    """Writes adapters, a tree of `lora.init`, as a folder that `load` and peft read.

    `base` is the folder or name of the model that they belong to, and `revision` the commit of a
    name. The folder appears complete or not at all.

    Raises ValueError if it exists and is not empty.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give a new one")
    tensors = {}

    def add(leaf: weights.Leaf, adapter: dict) -> None:
        down, up = np.asarray(adapter["down"]), np.asarray(adapter["up"])
        for index, tensor in leaf.tensors.items():
            matrices = {"A": down[index].reshape(-1, lora.rank), "B": up[index]}
            matrices["B"] = matrices["B"].reshape(lora.rank, -1)
            for matrix, values in matrices.items():
                tensors[_name(tensor, matrix)] = np.ascontiguousarray(values.T)

    _map(add, lora, config, adapters)
    settings = {name: plain[0] for name, plain in PLAIN.items()} | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "inference_mode": True,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as building:
        safetensors.numpy.save_file(tensors, building / TENSORS, metadata={"format": "pt"})
        share_as_folder(building / TENSORS)
        (building / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _map(f: Callable, lora: Lora, config: ModelConfig, adapters: dict) -> dict:
    """Returns the tree of `f(leaf of the parameter table, {"down", "up"})` of each projection."""
    stacks = [
        adapters_of.map_targets(lambda leaf, _: leaf, stack, lora)
        for stack in weights.parameter_table(config)["stacks"]
    ]
    return jax.tree.map(f, {"stacks": stacks}, adapters, is_leaf=_is_leaf)


def _is_leaf(node: Any) -> bool:
    return isinstance(node, weights.Leaf)


def _name(tensor: weights.Tensor, matrix: str) -> str:
    return f"base_model.model.{tensor.name.removesuffix('.weight')}.lora_{matrix}.weight"


def _open(folder: pathlib.Path, lora: Lora, config: ModelConfig) -> Any:
    """Returns the open file of tensors, with settings, names and shapes checked."""
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise ValueError(f"model.lora.folder={folder} has no {name}; give an adapter's folder")
    _check_settings(folder / CONFIG, read_json_object(folder / CONFIG), lora)
    try:
        file = safetensors.safe_open(folder / TENSORS, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{folder / TENSORS} is damaged or cut short ({error}); copy it again"
        ) from None
    wanted = {}

    def add(leaf: weights.Leaf, shapes: dict) -> None:
        for tensor in leaf.tensors.values():
            outputs, inputs = tensor.shape
            wanted[_name(tensor, "A")] = (lora.rank, inputs)
            wanted[_name(tensor, "B")] = (outputs, lora.rank)

    _map(add, lora, config, adapters_of.abstract(lora, config))
    stored = set(file.keys())
    if stored != wanted.keys():
        name = min(stored ^ wanted.keys())
        has = "has" if name in stored else "lacks"
        raise ValueError(
            f"{folder} {has} a tensor {name}, unlike adapters of {', '.join(lora.targets)} of this "
            "model; give an adapter of the model in model.folder, and its model.lora.targets"
        )
    for name, shape in wanted.items():
        got = tuple(file.get_slice(name).get_shape())
        if got != shape:
            raise ValueError(f"{folder}: tensor {name} has shape {got}; this model's has {shape}")
    return file


def _check_settings(path: pathlib.Path, settings: dict, lora: Lora) -> None:
    """Raises ValueError for settings of other adapters than `lora` says."""
    for name, plain in PLAIN.items():
        value = settings.get(name, plain[0])
        if value not in plain:
            raise ValueError(
                f"{path} has {name}={value!r:.100}, which these adapters do not have; give one "
                f"with {plain[0]!r}"
            )
    for name, field, own in (("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha)):
        if settings.get(name) != own:
            raise ValueError(
                f"{path} has {name}={settings.get(name)!r:.100}, and model.lora.{field}={own}; "
                "set the two alike"
            )
    modules = settings.get("target_modules")
    names = modules if isinstance(modules, list) else [modules]
    if {str(name).split(".")[-1] for name in names} != set(lora.targets):
        raise ValueError(
            f"{path} has target_modules={modules!r:.200}, and "
            f"model.lora.targets={lora.targets}; set the two alike"
        )
