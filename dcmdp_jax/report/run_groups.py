"""Runs by configuration: runs that differ in the seed alone are one group."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from dcmdp_jax.report import run_data
from dcmdp_jax.run import staging
from dcmdp_jax.run.record import differences

# Of the groups, in order; then from the first one on again. Each has a contrast of 3 or more to a
# white page and to a dark one, and the first five are distinct also to the colour-blind.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7c3aed", "#dd0044", "#bb66ff", "#885577")
# settings that may differ within a group
NOT_COMPARED = ("seed", "name", "checkpoint", "tensorboard", "wandb")
MAX_SETTINGS_IN_LABEL = 3


class Run(NamedTuple):
    """A run, as read from its folder."""

    folder: pathlib.Path
    name: str  # the folder, relative to the one that holds all the runs
    config: run_data.Config
    rows: run_data.Rows

    @property
    def place(self) -> pathlib.PurePath:
        """Where it lies, also in a bucket."""
        return pathlib.PurePath(staging.shown(str(self.folder.resolve())))


class Group(NamedTuple):
    """Runs of one configuration."""

    label: str
    color: str
    runs: list[Run]


def load(folders: Sequence[pathlib.Path]) -> tuple[str, list[Run]]:
    """Returns the folder or address that holds all the runs, ending in a slash, and the runs. It is
    empty if there is none.

    Raises ValueError if a folder is not a run's, is given twice, or has no step.
    """
    absolute = [folder.resolve() for folder in folders]
    for folder in folders:
        if absolute.count(folder.resolve()) > 1:
            raise ValueError(f"{folder} is given twice; give each run once")
    shown = [staging.shown(str(folder)) for folder in absolute]
    base = os.path.commonprefix([path.rpartition("/")[0] + "/" for path in shown])
    base = base[: base.rfind("/") + 1]
    if base.endswith("//"):  # of runs in several buckets
        base = ""
    runs = []
    for folder, path in zip(folders, shown):
        config, rows = run_data.load(folder)
        if not rows:
            raise ValueError(f"{folder} has not finished a step; leave it out")
        runs.append(Run(folder, path.removeprefix(base), config, rows))
    return base, runs


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs by configuration, in the order given.

    A label is the name of a study's arm if all are such; else it gives the settings in which the
    groups differ if they are few, or else names folders.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if _differ_in_seed_alone(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])
    labels = _labels(groups)
    return [
        Group(label, COLORS[i % len(COLORS)], group)
        for i, (label, group) in enumerate(zip(labels, groups))
    ]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    arms = [_arm(group) for group in groups]
    if all(arms) and len(set(arms)) == len(arms):
        return arms
    names = differing_settings([group[0] for group in groups])
    values = [[setting_of(group[0], name) for name in names] for group in groups]
    simple = not any(isinstance(value, (dict, list)) for row in values for value in row)
    if names and len(names) <= MAX_SETTINGS_IN_LABEL and simple:
        return [
            ", ".join(f"{name.split('.')[-1]} {short(value)}" for name, value in zip(names, row))
            for row in values
        ]
    return [_folders(group) for group in groups]


def _arm(runs: Sequence[Run]) -> str:
    """Returns the arm of a study that all runs belong to, by their folders ARM/sSEED; "" if there
    is none.
    """
    folders = [run.place for run in runs]
    seeds = [f"s{run.config.get('seed')}" for run in runs]
    is_study = [folder.name for folder in folders] == seeds
    arms = {folder.parent.name for folder in folders}
    return arms.pop() if is_study and len(arms) == 1 else ""


def _differ_in_seed_alone(left: Run, right: Run) -> bool:
    """True if the seed alone differs; of runs in one folder also a starting model of their own, and
    a tolerance that each has measured.
    """
    different = differences(_compared(left.config), _compared(right.config)).keys()
    if not different:
        return True
    siblings = left.place.parent == right.place.parent
    if not siblings or left.config.get("seed") == right.config.get("seed"):
        return False
    own = {"model.folder"}
    if all((run.folder / "calibration.json").is_file() for run in (left, right)):
        own.add("constraint.tolerance")
    return different <= own


def _folders(runs: Sequence[Run]) -> str:
    """Returns the runs' common folder if they have one, else the folder of each."""
    parents = {str(pathlib.PurePath(run.name).parent) for run in runs}
    if len(runs) > 1 and len(parents) == 1 and parents != {"."}:
        return parents.pop()
    return ", ".join(run.name for run in runs)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Returns the dotted names of the settings in which a run differs from the first one."""
    first = _compared(runs[0].config)
    return sorted({name for run in runs[1:] for name in differences(first, _compared(run.config))})


def _compared(config: run_data.Config) -> run_data.Config:
    return {name: value for name, value in config.items() if name not in NOT_COMPARED}


def setting_of(run: Run, name: str) -> Any:
    """Returns a setting by its dotted name; None if the configuration lacks it."""
    return run_data.setting(run.config, *name.split("."))


def short(value: Any) -> str:
    """Returns a function's own name; anything else as JSON."""
    if isinstance(value, str):
        is_function = value.startswith(("dcmdp_jax.", "<run_path>."))  # the latter: of a file
        return value.rsplit(".", 1)[-1] if is_function else value
    return "–" if value is None else json.dumps(value, ensure_ascii=False)
