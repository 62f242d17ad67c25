"""An experiment's configuration, as its file, its run and the command line set it."""

from __future__ import annotations

import argparse
import pathlib
import re

from dcmdp_jax.config import Config
from dcmdp_jax.experiment import load_experiment, override, pin
from dcmdp_jax.monitoring.screen import screen
from dcmdp_jax.run import record as run_record
from dcmdp_jax.run import staging

# what may be set without its dotted name
SHORT = {"model": "model.folder", "data": "data.path"}


def load(args: argparse.Namespace, options: list[str]) -> tuple[Config, pathlib.Path]:
    """Returns an experiment's configuration and its work folder.

    If the work folder holds a run, the scalar fields are those of its record; `options` come last.
    Names of the Hub are at the commits that they stand for.
    """
    config = load_experiment(args.experiment)
    changes = overrides(options)
    workdir = staging.folder(args.workdir or f"runs/{config.name}")
    record = None
    if _has_checkpoint(workdir):
        in_file = run_record.to_json(config)
        record = run_record.read_record(workdir)
        config = run_record.apply_record(config, record)
        recorded = [
            f"{name}={value}"
            for name, (_, value) in run_record.differences(
                in_file, run_record.to_json(config)
            ).items()
            if name not in changes
        ]
        if recorded:
            began = f"{workdir} goes on with its own {', '.join(recorded)}"
            screen.line(staging.shown(began))
    return pin(override(config, changes), record), workdir


def local_folder(text: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a work folder of several runs. Raises ValueError on an address."""
    if "://" in str(text):
        raise ValueError(
            f"--workdir {text} is no folder here, and a study runs on one machine; give a path"
        )
    return pathlib.Path(text)


def _has_checkpoint(workdir: pathlib.Path) -> bool:
    if not workdir.is_dir():
        return False
    from dcmdp_jax.run import checkpoint  # imports JAX, which a new run's options need not wait for

    return checkpoint.begun(workdir)


def overrides(options: list[str]) -> dict[str, str]:
    """Returns `--a.b 1 --c=2` as {"a.b": "1", "c": "2"}, with the names of `SHORT` in full.

    Raises ValueError on other words.
    """
    changes = {}
    words = iter(options)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not an option; fields are set as --name value")
        name, equals, value = word[2:].partition("=")
        value = value if equals else next(words, None)
        if value is None:
            raise ValueError(f"--{name} needs a value")
        name = name.replace("-", "_")
        changes[SHORT.get(name, name)] = value
    return changes


def as_typed(message: str, args: argparse.Namespace, options: list[str]) -> str:
    """Returns `message` with each field that the command line set written as it was typed there.

    That is `--rollout.slots` for a field that is set by its dotted name, and `--weights` for one
    that has an option of the command. A name without a dot, which may be any word, is meant where
    a value follows it.
    """
    words = [word[2:].partition("=")[0] for word in options if word.startswith("--")]
    names = {word.replace("-", "_"): f"--{word}" for word in words}
    for option in ("weights", "activations", "cache"):
        if hasattr(args, option):
            names[f"rollout.precision.{option}"] = f"--{option}"
    for field, option in names.items():
        end = r"(?![\w.]*\w)" if "." in field else "(?==)"
        message = re.sub(rf"(?<![\w.-]){re.escape(field)}{end}", option, message)
    return message


def refuse(options: list[str]) -> None:
    """Raises ValueError if there are options; for commands that have no experiment."""
    if options:
        raise ValueError(f"unknown option {options[0]}")
