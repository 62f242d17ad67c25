"""Files: written in one piece, and read so that whatever is wrong in them is one sentence."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of JSON value, with its name in messages."""

    name: str
    types: tuple[type, ...]


NULL = Kind("null", (type(None),))
BOOLEAN = Kind("true or false", (bool,))
STRING = Kind("a string", (str,))
LIST = Kind("a list", (list,))
OBJECT = Kind("an object", (dict,))
INTEGER = Kind("an integer", (int,))
NUMBER = Kind("a finite number", (int, float))
NUMBER_OR_NULL = Kind("a finite number or null", (int, float, type(None)))
MAX_INTEGER = 2**53  # integers up to here are exact as floats


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Writes a text file as UTF-8: after a crash `path` holds its old content or the new one.

    A character that UTF-8 cannot hold becomes "?".
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="replace") as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def share_as_folder(path: pathlib.Path) -> None:
    """Lets those read and write a file who may read and write its folder. The safetensors package
    writes for the owner alone, and a server may run as someone else.
    """
    path.chmod(path.parent.stat().st_mode & 0o666)


@contextlib.contextmanager
def atomic_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new folder that becomes `folder` when the block ends, and is removed if it raises.

    `folder` must not exist, or be empty.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        yield temporary


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what `atomic_folder(folder)` left in processes of this host that were killed."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        if left.suffix[1:].isdecimal() and not _is_running(int(left.suffix[1:])):
            shutil.rmtree(left)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


@contextlib.contextmanager
def atomic_path(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path beside `path`; what is written there becomes `path` when the block ends, and is
    removed if it raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, record: Any) -> pathlib.Path:
    """Writes a record as JSON and returns `path`; makes its folder if there is none.

    JSON has no NaN: a number that is not finite becomes null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(_finite_or_null(record), indent=2, allow_nan=False) + "\n")
    return path


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes, place: str) -> Any:
    """Returns the value of a JSON text. `place` names the file, and the line, in messages.

    Raises ValueError if the text is not JSON, not UTF-8, nested too deeply, or holds a number of
    too many digits.
    """
    try:
        return json.loads(text)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{place} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(
            f"{place} is not valid JSON for this reader: it is nested too deeply"
        ) from None


def rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of each row of a file: of a Parquet file, or of JSON lines.

    Raises ValueError, with the place, on a row that cannot be read.
    """
    return _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path} line {number}"
                try:
                    value = parse_json(line, place)
                except ValueError as error:
                    raise ValueError(f"{error}; write a JSON object on each line") from None
                yield place, value


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("pyarrow is not installed; pip install 'dcmdp-jax[train]'") from None
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from None


def read_json_object(path: pathlib.Path) -> dict:
    """Returns the JSON object in a file.

    Raises ValueError as `parse_json` does, and if the value is not an object.
    """
    value = parse_json(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {describe(value)}, not a JSON object")
    return value


def describe(value: Any) -> str:
    """Returns what a JSON value is, in words, such as "a string"."""
    for kind in (NULL, BOOLEAN, STRING, LIST, OBJECT):
        if isinstance(value, kind.types):
            return kind.name
    return (
        "a number" if isinstance(value, (int, float)) else f"a value of type {type(value).__name__}"
    )


def check_fields(record: Any, kinds: Mapping[str, Kind], place: str) -> None:
    """Raises ValueError unless `record` is an object that has each of the fields in `kinds`, with a
    value of that kind. The message begins with `place`.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place} is {record!r:.60}, not an object; correct or remove it")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"{place} lacks {name!r:.60}; correct or remove it")
        if not matches(record[name], kind):
            raise ValueError(
                f"{place} has {name!r:.60} = {record[name]!r:.60}, not {kind.name}; "
                "correct or remove it"
            )


def matches(value: Any, kind: Kind) -> bool:
    """True if a JSON value is of this kind. A boolean is not a number; a number must be finite and
    at most `MAX_INTEGER` if it is an integer.
    """
    if isinstance(value, bool) or not isinstance(value, kind.types):
        return isinstance(value, bool) and kind is BOOLEAN
    if isinstance(value, int):
        return abs(value) <= MAX_INTEGER
    return not isinstance(value, float) or math.isfinite(value)
