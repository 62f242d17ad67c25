"""An experiment file and the options that override it.

An experiment is a Python file holding one `CONFIG = Config(...)`. The command line overrides scalar
fields by dotted name.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import runpy
import sys
from typing import Any

from dcmdp_jax import errors
from dcmdp_jax.config import Config, scalar_fields


def load_experiment(path: str) -> Config:
    """The `CONFIG` of an experiment file. Raises ValueError where there is none."""
    config = run_file(path, "experiment").get("CONFIG")
    if not isinstance(config, Config):
        raise ValueError(f"{path} defines no CONFIG = Config(...)")
    return config


def run_file(path: str, kind: str) -> dict[str, Any]:
    """What a Python file defines; it may import its neighbours, as a script may.

    Raises ValueError where there is no file, where it imports what is not there, and where it
    fails, with its own line.
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
            "(requirements.txt has what dcmdp_jax itself needs)"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{kind} {path} fails at {errors.describe(error)}") from error


def override(config: Config, changes: dict[str, str]) -> Config:
    """Replaces scalar fields by dotted name, e.g. `{"constraint.tolerance": "0.01"}`, converted to
    the field's type.

    Raises ValueError on a name that does not exist (with the nearest one) or a value that does not
    fit.
    """
    names = scalar_fields(config)
    for name in changes:
        if name not in names:
            raise ValueError(_unknown(name, list(names)))
    for name in changes:
        if other := next((other for other in changes if other.startswith(f"{name}.")), None):
            raise ValueError(
                f"--{name} gives a number, which leaves nothing to --{other}; set one of them"
            )
    values = {name: _convert(name, text, names[name]) for name, text in changes.items()}
    return replace_fields(config, {tuple(name.split(".")): value for name, value in values.items()})


def replace_fields(config: Any, changes: dict[tuple[str, ...], Any]) -> Any:
    own = {path[0]: value for path, value in changes.items() if len(path) == 1}
    for name in {path[0] for path in changes if len(path) > 1}:
        nested = {
            path[1:]: value for path, value in changes.items() if path[0] == name and len(path) > 1
        }
        own[name] = replace_fields(getattr(config, name), nested)
    return dataclasses.replace(config, **own)


def _convert(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() in words:
            return words[text.lower()]
    elif kind is str:
        return text
    else:
        try:
            value = kind(text)
        except ValueError:
            pass
        else:
            if value == value and value not in (float("inf"), float("-inf")):
                return value
    raise ValueError(f"--{name} takes a value of type {kind.__name__}, not {text!r}")


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"no option --{name} takes a number or a word; did you mean --{near[0]}? Functions are set in the experiment file"
