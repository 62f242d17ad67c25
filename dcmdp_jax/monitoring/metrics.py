"""The metrics of a run: a JSON object for each step in its folder, and progress on stderr.

`metrics.jsonl` holds one row per constrained step, in order. Its keys are the step's metrics and
those of `measurements`; the ones that people look at are in `quantities`. Others that are read
back: `step` (1..N), `seconds` (wall time of the step), `tokens` (sampled), `multiplier_next`
(lambda after the step), `skipped` (updates of the run so far that were left out) and `saturated`
(steps in a row with lambda at its bound and delta above the tolerance).

JSON has no NaN: a value that is not finite is `null`, and `non_finite` in the same row says what it
was (`{"loss": null, "non_finite": {"loss": "nan"}}`). `gaps.jsonl` holds one row per step with an
evaluation: `step`, and `positions` and `worst` as `gaps.record` makes them; `samples.jsonl` holds
the first held-out problems then with the engine's completions. Process 0 alone writes.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import pathlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dcmdp_jax import errors, files
from dcmdp_jax.config import Calibrated, Config
from dcmdp_jax.monitoring import phases, quantities, terminal
from dcmdp_jax.run import staging

FILE = "metrics.jsonl"
GAPS = "gaps.jsonl"
SAMPLES = "samples.jsonl"
FILES = (FILE, GAPS, SAMPLES)
# the fields of a row of `gaps.jsonl`
POSITION = {
    "from": files.INTEGER,
    "to": files.INTEGER,
    "tokens": files.INTEGER,
    "delta": files.NUMBER,
}
WORST = {
    "position": files.INTEGER,
    "token": files.INTEGER,
    "text": files.STRING,
    "before": files.STRING,
    "after": files.STRING,
    "delta": files.NUMBER,
    "pi_train": files.NUMBER,
    "pi_infer": files.NUMBER,
    "reward": files.NUMBER,
}
# of a sample in a row of `samples.jsonl`
SAMPLE = {"prompt": files.STRING, "completion": files.STRING, "reward": files.NUMBER_OR_NULL}


class Log:
    """Writes a run's rows to `workdir/metrics.jsonl`, its progress to stderr, and the values to
    TensorBoard or Weights & Biases if the configuration says so.

    Opening drops the rows from `first_step` on (`truncate`), so that a resumed run's file equals an
    uninterrupted one's. If a logger fails, a warning is printed and the run goes on without it.
    """

    def __init__(self, workdir: str | os.PathLike, config: Config, *, first_step: int = 1):
        self._writes = jax.process_index() == 0
        self.step = first_step - 1  # of the last row
        if not self._writes:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._loggers: dict[str, Any] = {}
        if config.tensorboard:
            self._begin("TensorBoard", lambda: _TensorBoard(workdir, first_step))
        if config.wandb:
            self._begin("Weights & Biases", lambda: _WeightsAndBiases(workdir, config.name))
        truncate(workdir, first_step - 1)
        self._file = open(workdir / FILE, "a", encoding="utf-8")  # noqa: SIM115 (until `close`)
        self._workdir = workdir
        self._latest: dict[str, Any] = {}  # keeps the last evaluation on show between evaluations
        self._evaluated = 0  # its step
        tolerance = config.constraint.tolerance
        self._view = terminal.View(
            config.name,
            first_step,
            config.steps,
            None if isinstance(tolerance, Calibrated) else tolerance,
            config.constraint.multiplier_max,
        )
        if first_step > 1:
            rows = [row for _, row in _lines(workdir / FILE)]
            self._view.floor = floor_lower_bound(rows[0]) if rows else None

    def set_tolerance(self, tolerance: float) -> None:
        """Shows delta beside this tolerance, once a run has measured it."""
        if self._writes:
            self._view.tolerance = tolerance

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the row of `step`.

        Raises ValueError on a value that is neither a Python number nor an array of one number.
        """
        if not self._writes:
            return
        values = {key: _number(key, value) for key, value in values.items()}
        self._file.write(json.dumps(_row(step, values), allow_nan=False) + "\n")
        self._file.flush()
        self.step = step
        phases.note_step()
        self._each(lambda logger: logger.write(step, values))
        self._latest |= values
        if step == 1:
            self._view.floor = floor_lower_bound({"step": step, **values})
        if quantities.HELD_OUT_ENGINE in values:
            self._evaluated = step
        self._view.show(step, self._latest, self._evaluated)

    def write_gaps(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds the row of `step` to `gaps.jsonl`.

        Call it before `write`, so that a step with a row in `metrics.jsonl` has its row here.
        """
        if self._writes:
            self._append(GAPS, {"step": int(step), **record})

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Adds the row of `step` to `samples.jsonl`, if there are samples, each with `prompt`,
        `completion` and `reward`. Call it before `write`.
        """
        if self._writes and samples:
            kept = [
                {**sample, "reward": sample["reward"] if math.isfinite(sample["reward"]) else None}
                for sample in samples
            ]
            self._append(SAMPLES, {"step": int(step), "samples": kept})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with open(self._workdir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None:
        """Closes the files and the loggers."""
        if not self._writes:
            return
        self._file.close()
        self._each(lambda logger: logger.close())

    def _begin(self, name: str, start: Callable[[], Any]) -> None:
        try:
            self._loggers[name] = start()
        except Exception as error:
            _warn(name, error)

    def _each(self, call: Callable[[Any], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:
                del self._loggers[name]
                _warn(name, error)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def floor_lower_bound(row: Mapping[str, Any]) -> float | None:
    """Returns a lower bound of the floor, mean delta at a run's starting weights, from the row of
    its first step: the mean less three standard errors. None if the row lacks it.

    In the first step the trainer scores at the weights that sampled, so that the gap is the
    engine's alone.
    """
    mean = row.get("delta_mean")
    deviation = row.get("prob_diff_std")
    tokens = row.get("tokens")
    if row.get("step") != 1 or mean is None or deviation is None or not tokens:
        return None
    in_batch = tokens / (1 + row.get("refills", 0))  # of rounds that are alike in size
    return mean - 3 * deviation / math.sqrt(in_batch) if math.isfinite(mean) else None


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a run, oldest first; a value that was not finite is None. A torn last
    line is left out.

    Raises ValueError if there is no file, a line before the last is not a row, or a value is not a
    number.
    """
    path = pathlib.Path(workdir) / FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run that has taken a step")
    rows = [row for _, row in _lines(path)]
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if not (name == "non_finite" or isinstance(value, (bool, float))):
                files.check_fields(
                    {name: value}, {name: files.NUMBER_OR_NULL}, f"{path}: line {number}"
                )
    return rows


def read_gaps(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of `gaps.jsonl`; none if there is no file. A torn last line is left out.

    Raises ValueError if a line before the last is not a row, or a row is not as `gaps.record` makes
    it.
    """
    path = pathlib.Path(workdir) / GAPS
    rows = [row for _, row in _lines(path)] if path.is_file() else []
    for number, row in enumerate(rows, start=1):
        place = f"{path}: line {number}"
        files.check_fields(row, {"positions": files.LIST, "worst": files.LIST}, place)
        for bucket in row["positions"]:
            files.check_fields(bucket, POSITION, f"{place}: a position")
            if bucket["tokens"] < 1:
                raise ValueError(f"{place}: a position has no tokens; remove it")
        for token in row["worst"]:
            files.check_fields(token, WORST, f"{place}: a worst token")
    return rows


def read_samples(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of `samples.jsonl`; none if there is no file. A torn last line is left out.

    Raises ValueError if a line before the last is not a row, or a row has no samples.
    """
    path = pathlib.Path(workdir) / SAMPLES
    rows = [row for _, row in _lines(path)] if path.is_file() else []
    for number, row in enumerate(rows, start=1):
        place = f"{path}: line {number}"
        files.check_fields(row, {"samples": files.LIST}, place)
        for sample in row["samples"]:
            files.check_fields(sample, SAMPLE, f"{place}: a sample")
    return rows


def truncate(workdir: str | os.PathLike, step: int) -> None:
    """Drops the rows after `step`, and a torn last line, from the run's files of rows; the other
    rows keep their bytes.

    A file is replaced in one piece: a crash leaves the old one or the new one.
    """
    if jax.process_index() != 0:
        return
    for path in (pathlib.Path(workdir) / name for name in FILES):
        if path.exists():
            truncate_file(path, step)


def truncate_file(path: pathlib.Path, step: int) -> None:
    """Drops the rows after `step`, and a torn last line, from one file."""
    lines = [line for line, row in _lines(path) if row["step"] <= step]
    files.write_atomic(path, "".join(line + "\n" for line in lines))


def _lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns each line with its row. The last line is left out if a killed process has torn it."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and files.matches(row.get("step"), files.INTEGER):
            rows.append((line, row))
        elif number < len(lines):
            raise ValueError(f"{path}: line {number} is not a row with a step; remove the line")
    return rows


def _number(key: str, value: Any) -> bool | int | float:
    if getattr(value, "size", 1) == 1 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (bool, int, float)):
        raise ValueError(
            f"metric {key!r} must be one number, not {type(value).__name__}; "
            "write one name per number"
        )
    return value


def _row(step: int, values: Mapping[str, bool | int | float]) -> dict[str, Any]:
    if "step" in values or "non_finite" in values:
        raise ValueError("metrics 'step' and 'non_finite' are the log's own; use other names")
    non_finite = {key: str(value) for key, value in values.items() if not math.isfinite(value)}
    row = {"step": int(step), **values, **dict.fromkeys(non_finite)}
    return row | {"non_finite": non_finite} if non_finite else row


def check_loggers(config: Config) -> None:
    """Raises ImportError if a logger of the configuration cannot be imported."""
    loggers = {
        "tensorboardX": (config.tensorboard, "tensorboard=True", "pip install 'dcmdp-jax[report]'"),
        "wandb": (config.wandb, "wandb=True", "pip install wandb"),
    }
    for module, (enabled, option, remedy) in loggers.items():
        if not enabled:
            continue
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ImportError(f"{option} needs {module}; {remedy}") from error
        except Exception as error:  # a broken installation fails in ways of its own
            raise ImportError(
                f"{option} needs {module}, which fails to import "
                f"({errors.type_and_message(error)}); {remedy}"
            ) from error


def set_aside(workdir: pathlib.Path) -> None:
    """Renames the files of a run that has lost its checkpoints and starts anew, and prints their
    new names.
    """
    if jax.process_index() != 0:
        return
    for path in (workdir / name for name in FILES):
        if path.is_file() and path.stat().st_size:
            names = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
            new_path = next(name for name in names if not name.exists())
            path.rename(new_path)
            anew = f"{workdir} holds no checkpoint and starts anew; its old rows are now {new_path}"
            print(staging.shown(anew), file=sys.stderr)


def _warn(name: str, error: Exception) -> None:
    print(
        f"{name} failed ({errors.type_and_message(error)}); the run goes on without it, and {FILE} "
        "holds every row",
        file=sys.stderr,
        flush=True,
    )


class _TensorBoard:
    def __init__(self, workdir: pathlib.Path, first_step: int):
        from tensorboardX import SummaryWriter

        # purge_step hides the events of steps that a resumed run takes again.
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, workdir: pathlib.Path, name: str):
        import wandb

        identity = workdir / "wandb_id"  # a resumed run continues the same W&B run
        if not identity.exists():
            files.write_atomic(identity, uuid.uuid4().hex)
        self._run = wandb.init(
            project="dcmdp_jax",
            name=name,
            dir=str(workdir),
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
        )
        # W&B's own counter refuses to go back to a checkpoint's step
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()
