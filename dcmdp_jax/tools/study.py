"""Arms x seeds of one question on the cores of one machine, and the tidy table they leave.

A study is a Python file with one `STUDY = Study(...)`. A run is one arm with one seed, in
`WORKDIR/ARM/sSEED`: an ordinary run folder. Runs with the same seed, task, shape and warm-up start
from the same parameters, so that arms are compared in pairs.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from dcmdp_jax.config import Config, WarmupConfig
from dcmdp_jax.experiment import run_file
from dcmdp_jax.run_record import differences, read_record, to_json, upgrade_record
from dcmdp_jax.stopping import Interrupted

COLUMNS = (
    "study",
    "arm",
    "seed",
    "step",
    "prompts",
    "engine",
    "trainer",
    "reward",
    "delta",
    "staleness",
    "multiplier",
    "entropy",
    "k3",
    "response_length",
    "grad_norm",
    "seconds",
)
MEANS = {
    "reward": "reward",
    "delta": "delta_mean",
    "staleness": "gap_staleness",
    "multiplier": "multiplier",
    "entropy": "entropy",
    "k3": "k3",
    "response_length": "response_length",
    "grad_norm": "grad_norm",
}

_stop: Any = None  # in a process of the pool: the event of its parent


def as_they_are(params: Any) -> Any:
    """Leaves the warmed-up parameters alone."""
    return params


@dataclass(frozen=True)
class Study:
    """What is compared. `Config.seed` and `Config.name` of an arm are the study's to set."""

    arms: dict[str, Config]
    seeds: int = 5
    first_seed: int = 0
    # of the warmed-up parameters that all arms start from
    alter: Callable[[Any], Any] = as_they_are

    @property
    def numbers(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def __post_init__(self):
        if not self.arms or self.seeds < 1:
            raise ValueError("a study needs at least one arm and one seed")
        for name, config in self.arms.items():
            if not name or set(name) & set("/\\, "):
                raise ValueError(
                    f"arm {name!r} names a folder and a table's cell; leave out blanks, commas and slashes"
                )
            if config.eval.every < 1 or config.model.folder or not config.warmup.steps:
                raise ValueError(
                    f"arm {name!r} needs evaluations (eval.every), a model.architecture and a warm-up to start from"
                )


@dataclass(frozen=True)
class Run:
    """One arm with one seed; `file` and names, not objects, travel to the process that runs it."""

    file: str
    arm: str
    seed: int
    root: str  # of the study

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.root) / self.arm / f"s{self.seed}"


def load(file: str) -> Study:
    """The `STUDY` of a Python file. Raises ValueError where there is none."""
    study = run_file(file, "study").get("STUDY")
    if not isinstance(study, Study):
        raise ValueError(f"{file} defines no STUDY = Study(...)")
    return study


def command(file: str, root: pathlib.Path, workers: int) -> int:
    """`run`, and what it came to, printed; the status of the process. SIGTERM and Ctrl-C save the
    runs that have begun.
    """

    def ask(number, frame):
        raise Interrupted

    before = signal.signal(signal.SIGTERM, ask)
    try:
        failed = run(file, root, workers, functools.partial(print, flush=True))
    except (Interrupted, KeyboardInterrupt):
        print(f"stopped; go on with: dcmdp study {file} --workdir {root}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n".join([f"wrote {root / 'table.csv'}", *(f"failed: {one}" for one in failed)]))
    return int(bool(failed))


def run(
    file: str, root: pathlib.Path, workers: int, say: Callable[[str], None] = print
) -> list[str]:
    """Runs what is not finished, `workers` at a time (0: as many as there are cores), each on a
    core; returns what failed.

    Writes `ROOT/table.csv`. A run that fails leaves its traceback in `run.log` and does not keep
    the others from going on.
    """
    study = load(file)
    failed = []
    runs = [Run(file, arm, seed, str(root)) for seed in study.numbers for arm in study.arms]
    waiting = [one for one in runs if not finished(study, one)]
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished already")
    for one in runs:
        if one not in waiting and (names := edited(study, one)):
            say(
                f"{one.arm} s{one.seed} was run with another {', '.join(names)}; delete {one.folder} to run it anew"
            )
    root.mkdir(parents=True, exist_ok=True)
    with _processes(workers or len(_cores()), root.parent / "compiled") as submit:
        starts = {_start_folder(study, one): one for one in waiting}
        for future, one in submit(
            _make_start, [one for folder, one in starts.items() if not folder.is_dir()]
        ):
            if error := future.exception():
                failed.append(f"the warm-up of {one.arm} s{one.seed}: {error}")
        waiting = [one for one in waiting if _start_folder(study, one).is_dir()]
        began = time.perf_counter()
        for done, (future, one) in enumerate(submit(_train, waiting), start=1):
            if error := future.exception():
                failed.append(f"{one.arm} s{one.seed}: {error}")
            outcome = f"failed; see {one.folder / 'run.log'}" if error else _outcome(study, one)
            left = (time.perf_counter() - began) / done * (len(waiting) - done)
            say(
                f"{done}/{len(waiting)}  {one.arm} s{one.seed}  {outcome}  {left / 60:.0f} min left"
            )
    write_table(file, root)
    return failed


def finished(study: Study, one: Run) -> bool:
    """Whether a run has taken its last step."""
    rows = _rows(one)
    return bool(rows) and rows[-1]["step"] >= study.arms[one.arm].steps


def edited(study: Study, one: Run) -> list[str]:
    """The settings in which a run's record differs from its arm as the study's file has it now."""
    from dcmdp_jax import calibrate

    started = _started(study, one)
    record = upgrade_record(read_record(one.folder), started)
    own = {"model.folder"} | (
        {"constraint.tolerance"} if (one.folder / calibrate.FILE).is_file() else set()
    )
    names = set(differences(record, to_json(started)))
    return sorted({".".join(name.split(".")[:2]) for name in names - own})


def write_table(file: str, root: pathlib.Path) -> pathlib.Path:
    """`ROOT/table.csv`: a row for each evaluation of each finished run, training measures as means
    since the evaluation before.

    `engine` and `trainer` are the two policies' held-out pass rates over `prompts` problems;
    `seconds` since the run's start.
    """
    study = load(file)
    runs = [
        one
        for arm in study.arms
        for seed in study.numbers
        if finished(study, one := Run(file, arm, seed, str(root)))
    ]
    rows = [
        {"study": pathlib.Path(file).stem, "arm": one.arm, "seed": one.seed, **row}
        for one in runs
        for row in evaluations(_rows(one), study.arms[one.arm].eval.prompts)
    ]
    path = root / "table.csv"
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in row.items()
            }
            for row in rows
        )
    return path


def evaluations(rows: list[dict[str, Any]], prompts: int) -> Iterator[dict[str, Any]]:
    """The table's rows of one run's metrics; a measure that was not finite in the whole span is
    empty.
    """
    span = []
    seconds = 0.0
    for row in rows:
        span = [*span, row]
        seconds = seconds + (row.get("seconds") or 0.0)
        if "reward_eval_infer" not in row:
            continue
        values = {
            name: [r[key] for r in span if r.get(key) is not None] for name, key in MEANS.items()
        }
        yield {
            "step": row["step"],
            "prompts": prompts,
            "engine": row["reward_eval_infer"],
            "trainer": row.get("reward_eval_train"),
            "seconds": seconds,
            **{name: statistics.fmean(found) if found else "" for name, found in values.items()},
        }
        span = []


def _rows(one: Run) -> list[dict[str, Any]]:
    from dcmdp_jax import metrics

    return metrics.read(one.folder) if (one.folder / metrics.FILE).is_file() else []


def _outcome(study: Study, one: Run) -> str:
    """The last evaluation in a line; a measure that was not finite is nan."""
    last = [*evaluations(_rows(one), study.arms[one.arm].eval.prompts)][-1]
    engine, trainer, delta = (
        math.nan if last[name] in ("", None) else last[name]
        for name in ("engine", "trainer", "delta")
    )
    return f"engine {engine:.3f}  trainer {trainer:.3f}  delta {delta:.4f}  {last['seconds']:.0f} s"


def _configure(study: Study, one: Run) -> Config:
    return dataclasses.replace(study.arms[one.arm], seed=one.seed, name=f"{one.arm}-s{one.seed}")


def _started(study: Study, one: Run) -> Config:
    """The run as it goes on from its start."""
    config = _configure(study, one)
    source = dataclasses.replace(
        config.model, folder=str(_start_folder(study, one) / "model"), architecture=None
    )
    return dataclasses.replace(config, model=source, warmup=WarmupConfig())


def start_folder(config: Config, alter: Callable[[Any], Any], root: pathlib.Path) -> pathlib.Path:
    """Where the warmed-up model lies that a run starts from, in ROOT/starts, for all studies of
    ROOT that share it.
    """
    same = json.dumps(
        to_json((config.model, config.data.task, config.warmup, alter, config.seed)), sort_keys=True
    )
    return root / "starts" / hashlib.sha256(same.encode()).hexdigest()[:16]


def _start_folder(study: Study, one: Run) -> pathlib.Path:
    return start_folder(_configure(study, one), study.alter, pathlib.Path(one.root).parent)


def _make_start(one: Run) -> None:
    """Warms up and writes the folder, whole or not at all."""
    study = load(one.file)
    folder = _start_folder(study, one)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    from dcmdp_jax import train

    with _log(new / "run.log"):
        train.warm_start(_configure(study, one), new, study.alter)
    new.replace(folder)


def _train(one: Run) -> None:
    if _stop is not None and _stop.is_set():
        raise Interrupted("not begun")
    study = load(one.file)
    one.folder.mkdir(parents=True, exist_ok=True)
    from dcmdp_jax import train

    with _log(one.folder / "run.log"):
        train.train(_started(study, one), one.folder)


@contextlib.contextmanager
def _log(path: pathlib.Path) -> Iterator[None]:
    """What a run says, and what ends it, in a file."""
    import jax

    with path.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            # a run's programs are its own; the next one's come from the cache on disk
            jax.clear_caches()


@contextlib.contextmanager
def _processes(
    workers: int, compiled: pathlib.Path
) -> Iterator[Callable[[Callable[[Run], None], list[Run]], Iterator[tuple[Future, Run]]]]:
    """A pool of fresh processes, one to a core; yields a function that runs a job on each run and
    gives futures as they end.
    """
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    stop = spawn.Event()
    for i in range(workers):
        cores.put(i)
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_settle, initargs=(cores, stop, str(compiled))
    ) as pool:

        def submit(job: Callable[[Run], None], runs: list[Run]) -> Iterator[tuple[Future, Run]]:
            futures = {pool.submit(job, one): one for one in runs}
            yield from ((future, futures[future]) for future in as_completed(futures))

        try:
            yield submit
        except BaseException:
            stop.set()  # what the pool has handed out already cannot be cancelled
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _settle(cores: Any, stop: Any, compiled: str) -> None:
    """Takes a core and the event that asks to stop, before JAX counts them: one thread each is
    quicker than many runs on all cores.
    """
    global _stop
    number = cores.get()
    _stop = stop
    threading.Thread(
        target=_heed, args=(stop, multiprocessing.parent_process()), daemon=True
    ).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {_cores()[number % len(_cores())]})
    import jax

    # seeds of one arm share their programs
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _heed(stop: Any, parent: Any) -> None:
    """Stops what this process runs when its parent says so, or is gone: a run saves itself on
    SIGTERM, an idle process ends.
    """
    while not stop.wait(1) and parent.is_alive():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        parent.join()
        time.sleep(10)
        os.kill(os.getpid(), signal.SIGTERM)


def _cores() -> list[int]:
    """The cores that this process may use."""
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
