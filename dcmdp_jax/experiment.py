"""Experiment files, and the command line's changes to their fields."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import pathlib
import runpy
import sys
from typing import Any

from dcmdp_jax import errors, hub
from dcmdp_jax.config import Config
from dcmdp_jax.config_checks import scalar_fields

# fields that may hold names of the Hub
MODELS = (
    ("model", "folder"),
    ("model", "tokenizer"),
    ("model", "lora", "folder"),
    ("algorithm", "reference_folder"),
)
PROBLEMS = (("data", "path"), ("data", "eval_path"), ("warmup", "path"))
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def load_experiment(path: str) -> Config:
    """Returns the `CONFIG` of an experiment file.

    Raises ValueError if the file defines none, and where `run_file` does.
    """
    config = run_file(path, "experiment").get("CONFIG")
    if not isinstance(config, Config):
        raise ValueError(f"{path} defines no CONFIG = Config(...)")
    return config


def run_file(path: str, kind: str) -> dict[str, Any]:
    """Runs a Python file, which may import its neighbours as a script may, and returns its globals.

    Raises ValueError, with `kind` and the path, if the file does not exist, imports a module that
    is not installed, or fails; the message then names the failing line.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"{kind} {path} does not exist; give the path of a Python file")
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return runpy.run_path(str(file))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{kind} {path} imports {error.name!r}, which is neither in its folder nor installed "
            "(requirements.txt lists what dcmdp_jax itself needs)"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind} {path} fails at {errors.describe(error)}") from error


def override(config: Config, changes: dict[str, str]) -> Config:
    """Returns `config` with scalar fields replaced by dotted name.

    `changes` maps names to texts, e.g. `{"constraint.tolerance": "0.01"}`; a text is converted to
    the field's type. Raises ValueError on a name that does not exist (with the nearest one that
    does), on a text that does not fit the type, and on values that no run can have.
    """
    types = scalar_fields(config)
    for name in changes:
        if name not in types:
            raise ValueError(_no_option(config, name, list(types)))
        part = next((other for other in changes if other.startswith(f"{name}.")), None)
        if part:
            raise ValueError(f"--{name} and --{part} exclude each other; set one")
    values = {name: _convert(name, text, types[name]) for name, text in changes.items()}
    return replace_fields(config, {tuple(name.split(".")): value for name, value in values.items()})


def pin(config: Config, record: dict[str, Any] | None = None) -> Config:
    """Returns `config` with the names of the Hub at commits, so that a resumed run reads what it
    began with.

    Args:
        record: of the run, whose commits then stand for the same names; None: those of now do.
    """
    pinned = {}
    for paths, named in ((MODELS, hub.pinned_model), (PROBLEMS, hub.pinned_data)):
        for path in paths:
            text = functools.reduce(getattr, path, config)
            pinned[path] = named(hub.at_commit_of(_recorded(record or {}, path), text))
    return replace_fields(config, pinned)


def _recorded(record: Any, path: tuple[str, ...]) -> str:
    for name in path:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, str) else ""


def replace_fields(config: Any, changes: dict[tuple[str, ...], Any]) -> Any:
    """Returns `config` with fields replaced, each given by the parts of its dotted name."""
    values = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in {path[0] for path in changes if len(path) > 1}:
        nested = {
            path[1:]: value for path, value in changes.items() if path[0] == name and len(path) > 1
        }
        values[name] = replace_fields(getattr(config, name), nested)
    return dataclasses.replace(config, **values)


def _convert(name: str, text: str, kind: type) -> Any:
    """Returns the value that an option's text stands for. Raises ValueError if it is of another
    type, or not finite.
    """
    if kind is str:
        return text
    try:
        value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = math.nan
    if not abs(value) < math.inf:
        raise ValueError(f"--{name} takes a value of type {kind.__name__}, not {text!r}")
    return value


def _no_option(config: Config, name: str, names: list[str]) -> str:
    """Returns why a name is none of the scalar fields `names`."""
    value: Any = config
    for part in name.split("."):
        if part not in getattr(value, "__dataclass_fields__", {}):
            return _unknown_option(name, names)
        value = getattr(value, part)
    if callable(value):
        return f"{name} is a function; set it in the experiment file"
    return f"--{name} is no scalar field; set it in the experiment file"


def _unknown_option(name: str, names: list[str]) -> str:
    (nearest,) = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return (
        f"--{name} is no option; did you mean --{nearest}? Functions are set in the experiment file"
    )
