"""The experiments of a folder, as their files say what they are. No file is run."""

from __future__ import annotations

import ast
import pathlib
from typing import NamedTuple

KINDS = {"CONFIG": "experiment", "STUDY": "study"}  # what a file must define, and what it then is


class Listed(NamedTuple):
    """An experiment's file."""

    path: pathlib.Path
    kind: str  # one of `KINDS`, or "broken" if it is no Python
    summary: str  # the first paragraph of its docstring, on one line, or where it is broken


def find(folder: pathlib.Path) -> list[Listed]:
    """Returns the experiments and studies in `folder` and its subfolders, and files that are no
    Python, by path.

    Raises ValueError where there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that holds experiments")
    files = [
        path
        for path in sorted(folder.rglob("*.py"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    found = [listed for path in files if (listed := _read(path))]
    if not found:
        raise ValueError(f"no file in {folder} defines CONFIG or STUDY; give another folder")
    return found


def _read(path: pathlib.Path) -> Listed | None:
    """Returns None for a file that is neither."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        return Listed(path, "broken", f"cannot be read: line {error.lineno}")
    except ValueError as error:  # of null bytes
        return Listed(path, "broken", f"cannot be read: {error}")
    names = {name for statement in tree.body for name in _assigned(statement)}
    kinds = [kind for name, kind in KINDS.items() if name in names]
    if not kinds:
        return None
    summary, _, _ = (ast.get_docstring(tree) or "").partition("\n\n")
    return Listed(path, kinds[-1], " ".join(summary.split()))


def _assigned(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module gives a value."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return []
    return [target.id for target in targets if isinstance(target, ast.Name)]
