"""The record of a run's configuration: `config.json` in its work folder."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.config import Config
from dcmdp_jax.config_checks import scalar_fields
from dcmdp_jax.experiment import override

RECORD_FILE = "config.json"  # in the run's work folder


def to_json(config: Any) -> Any:
    """Returns a configuration as plain JSON values.

    Functions become their qualified names, those made by a function (an optax schedule, say) with
    the values that they were made of.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        foreign = type(config).__module__ != Config.__module__  # a task, say: its type matters too
        kind = {"type": type(config).__qualname__} if foreign else {}
        return kind | {
            item.name: to_json(getattr(config, item.name)) for item in dataclasses.fields(config)
        }
    if isinstance(config, (list, tuple)):
        return [to_json(item) for item in config]
    if isinstance(config, functools.partial):
        return {
            "function": to_json(config.func),
            "args": to_json(config.args),
            **{key: to_json(value) for key, value in config.keywords.items()},
        }
    if hasattr(config, "__qualname__"):
        name = f"{config.__module__}.{config.__qualname__}"
        made_of = _closure(config)
        return {"function": name, **made_of} if made_of else name
    return config if isinstance(config, (int, float, bool, str, type(None))) else repr(config)


def _closure(function: Any) -> dict[str, Any]:
    """Returns the values of the enclosing call that a function reads, by name."""
    cells = getattr(function, "__closure__", None)
    if not cells:
        return {}
    values = {}
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # the enclosing call has not set it
            continue
        if value is not function:  # one that calls itself
            values[name] = _without_address(value)
    return values


def _without_address(value: Any) -> Any:
    """Returns the record of a value; its type's, if it has none but its address."""
    has_record = hasattr(value, "__qualname__") or dataclasses.is_dataclass(value)
    if has_record or type(value).__repr__ is not object.__repr__:
        return to_json(value)
    return to_json(type(value))


def read_record(workdir: pathlib.Path) -> dict:
    """Returns a run's record. Raises ValueError, with the remedy, if it is missing or damaged."""
    file = workdir / RECORD_FILE
    remedy = (
        "put a copy back, or write a new one by starting the command that began the run, with its "
        "options, in another --workdir"
    )
    try:
        return files.read_json_object(file)
    except FileNotFoundError:
        raise ValueError(
            f"{file} is missing, so the configuration of the run is unknown; {remedy}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def apply_record(config: Config, record: dict) -> Config:
    """Returns `config` with the scalar fields of a record, so that resuming a run does not need its
    options again.
    """
    recorded = {name: _lookup(record, name) for name in scalar_fields(config)}
    return override(
        config, {name: str(value) for name, value in recorded.items() if value is not None}
    )


def lacks_field(name: str, record: Any) -> bool:
    """True if a record has no field of that dotted name."""
    for part in name.split("."):
        if not isinstance(record, dict) or part not in record:
            return True
        record = record[part]
    return False


def differences(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the dotted names at which two records differ, with both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix: (before, now)}
    changed = {}
    for name in sorted(before.keys() | now.keys()):
        dotted = f"{prefix}.{name}" if prefix else name
        changed |= differences(before.get(name), now.get(name), dotted)
    return changed


def _lookup(record: Any, name: str) -> Any:
    """Returns the value at a dotted name, or None if there is none."""
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record
