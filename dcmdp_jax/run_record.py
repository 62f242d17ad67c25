"""The record of a run's configuration: `config.json` in its work folder."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.config import Config, scalar_fields
from dcmdp_jax.experiment import override

RECORD_FILE = "config.json"  # in the run's work folder


def read_record(workdir: pathlib.Path) -> dict:
    """A run's `config.json`. Raises ValueError, with the remedy, where it is gone or damaged."""
    file = workdir / RECORD_FILE
    remedy = (
        "put a copy back; one is written where the command that began the run, with its "
        "options, is started in another --workdir"
    )
    try:
        return files.read_json_object(file)
    except FileNotFoundError:
        raise ValueError(
            f"{file} is gone, so that what the run was made with is not known; {remedy}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def apply_record(config: Config, record: dict) -> Config:
    """`config` with the scalar fields of a run's `config.json`, so that a resumption need not
    repeat its options.
    """

    def lookup(name: str) -> Any:
        value = record
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    found = {name: lookup(name) for name in scalar_fields(config)}
    return override(
        config, {name: str(value) for name, value in found.items() if value is not None}
    )


def upgrade_record(record: dict, config: Any) -> dict:
    """A record of `to_json` as this version writes it.

    Fields that it lacks have their defaults, and fields that are unknown today are left out where
    they are not set to anything.
    """
    fields = {item.name: item for item in dataclasses.fields(config)}
    found = {}
    for name, item in fields.items():
        value = getattr(config, name)
        if name not in record:
            found[name] = to_json(_default(item, value))
        elif dataclasses.is_dataclass(value) and isinstance(record[name], dict):
            found[name] = upgrade_record(record[name], value)
        else:
            found[name] = record[name]
    unknown_ones = {name: value for name, value in record.items() if name not in fields}
    return found | {name: value for name, value in unknown_ones.items() if _is_set(value)}


def _default(item: dataclasses.Field, value: Any) -> Any:
    """A field's default; `value` where it has none."""
    if item.default is not dataclasses.MISSING:
        return item.default
    return value if item.default_factory is dataclasses.MISSING else item.default_factory()


def _is_set(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_set(item) for item in value.values())
    return bool(value)


def lacks_field(name: str, record: Any) -> bool:
    """Whether a record of `to_json` has no field of that dotted name."""
    for part in name.split("."):
        if not isinstance(record, dict) or part not in record:
            return True
        record = record[part]
    return False


def to_json(config: Any) -> Any:
    """The resolved configuration as plain JSON values; functions appear by their qualified names."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = (
            {}
            if type(config).__module__ == Config.__module__
            else {"type": type(config).__qualname__}
        )
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
        return f"{config.__module__}.{config.__qualname__}"
    return config if isinstance(config, (int, float, bool, str, type(None))) else repr(config)


def differences(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names at which two records of `to_json` differ, with both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix: (before, now)}
    found = {}
    for name in sorted(before.keys() | now.keys()):
        found |= differences(
            before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name
        )
    return found
