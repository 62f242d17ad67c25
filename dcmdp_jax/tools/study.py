"""Runs the arms of a study with several seeds on the cores of one machine, and tabulates them.

A study is a Python file with one `STUDY = Study(...)`. A run is one arm with one seed; it has an
ordinary run folder, `WORKDIR/ARM/sSEED`. Runs of a `model.folder` start from its weights; others
with the same seed, task, model shape and warm-up start from the same warmed-up parameters, so that
arms can be compared in pairs.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from dcmdp_jax import files
from dcmdp_jax.config import Config, WarmupConfig
from dcmdp_jax.experiment import run_file
from dcmdp_jax.monitoring import quantities
from dcmdp_jax.run.record import differences, read_record, to_json
from dcmdp_jax.stopping import Interrupted

_stop: Any = None  # in a worker: the event with which its parent stops it


def unchanged(params: Any) -> Any:
    """Returns `params`."""
    return params


@dataclass(frozen=True)
class Study:
    """The arms to compare. The study sets `Config.seed` and `Config.name` of each run."""

    arms: dict[str, Config]
    seeds: int = 5  # number of seeds
    first_seed: int = 0
    # Applied to the warmed-up parameters that all arms start from.
    alter: Callable[[Any], Any] = unchanged

    @property
    def seed_numbers(self) -> range:
        """The seeds that every arm runs with."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def __post_init__(self):
        if not self.arms or self.seeds < 1:
            raise ValueError("a study needs at least one arm and one seed")
        for name, config in self.arms.items():
            if not name or set(name) & set("/\\, "):
                raise ValueError(
                    f"arm {name!r} names a folder and a table's cell; leave out blanks, commas and "
                    "slashes"
                )
            if config.eval.every < 1:
                raise ValueError(f"arm {name!r} needs evaluations; set eval.every")
            if bool(config.model.folder) == bool(config.warmup.steps):
                raise ValueError(
                    f"arm {name!r} needs weights to start from: either a model.folder, or a "
                    "model.architecture with a warm-up"
                )
            if config.model.folder and self.alter is not unchanged:
                raise ValueError(
                    f"the study alters warmed-up parameters, and arm {name!r} starts from a "
                    "model.folder; leave one of the two out"
                )


@dataclass(frozen=True)
class Run:
    """One arm with one seed, by names alone, which can be sent to the process that runs it."""

    file: str  # of the study
    arm: str
    seed: int
    root: str  # folder of the study's runs

    @property
    def folder(self) -> pathlib.Path:
        """The run's folder."""
        return pathlib.Path(self.root) / self.arm / f"s{self.seed}"


def load(file: str) -> Study:
    """Returns the `STUDY` of a Python file. Raises ValueError if it has none."""
    study = run_file(file, "study").get("STUDY")
    if not isinstance(study, Study):
        raise ValueError(f"{file} defines no STUDY = Study(...)")
    return study


def select(
    file: str, arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> list[tuple[str, int]]:
    """Returns the arm and the seed of the study's runs in their order, seed by seed: of all, or of
    the arms and seeds that are named, in the order in which they are.

    Raises ValueError if the study has no such arm or seed.
    """
    study = load(file)
    for kind, named, own in (("arm", arms, list(study.arms)), ("seed", seeds, study.seed_numbers)):
        for name in named or ():
            if name not in own:
                raise ValueError(f"{file} has no {kind} {name}; it has {', '.join(map(str, own))}")
    return [
        (arm, seed)
        for seed in dict.fromkeys(seeds or study.seed_numbers)
        for arm in dict.fromkeys(arms or study.arms)
    ]


def command(
    file: str,
    root: pathlib.Path,
    workers: int,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> int:
    """Runs a study, prints the result, and returns the exit status of `dcmdp study`.

    `arms` and `seeds` as in `select`. SIGTERM and Ctrl-C save the runs that have begun.
    """

    def interrupt(number, frame):
        raise Interrupted

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        report = functools.partial(print, flush=True)
        failures = run_all(file, root, workers, report, select(file, arms, seeds))
    except (Interrupted, KeyboardInterrupt):
        chosen = ["--arms", *arms] if arms else []
        chosen += ["--seeds", *map(str, seeds)] if seeds else []
        again = " ".join(["dcmdp study", file, "--workdir", str(root), *chosen])
        print(f"stopped; go on with: {again}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(f"wrote {root / 'table.csv'}")
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


def run_all(
    file: str,
    root: pathlib.Path,
    workers: int,
    report: Callable[[str], None] = print,
    selected: list[tuple[str, int]] | None = None,
) -> list[str]:
    """Runs the unfinished runs of a study and writes `ROOT/table.csv`.

    A run that fails leaves its traceback in its `run.log`; the others go on.

    Args:
        workers: runs at a time, each on a core of its own; 0: as many as there are cores.
        report: receives lines about the progress.
        selected: arms and seeds to run, as `select` returns them. The table has all that are
            finished in ROOT.

    Returns a message for each failure.
    """
    study = load(file)
    runs = [Run(file, arm, seed, str(root)) for arm, seed in selected or select(file)]
    unfinished = [run for run in runs if not finished(study, run)]
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    report(f"{count}, {len(runs) - len(unfinished)} of them finished already")
    for run in runs:
        if run not in unfinished and (names := changed_settings(study, run)):
            report(
                f"{run.arm} s{run.seed} was run with another {', '.join(names)}; delete "
                f"{run.folder} to run it anew"
            )
    root.mkdir(parents=True, exist_ok=True)
    failures = []
    with _worker_pool(workers or len(_cores()), root.parent / "compiled") as submit:
        warmed_up = [run for run in unfinished if study.arms[run.arm].warmup.steps]
        starts = {_start_folder(study, run): run for run in warmed_up}
        missing = [run for folder, run in starts.items() if not folder.is_dir()]
        for future, run in submit(_warm_up, missing):
            if error := future.exception():
                failures.append(f"the warm-up of {run.arm} s{run.seed}: {error}")
        ready = [
            run for run in unfinished if run not in warmed_up or _start_folder(study, run).is_dir()
        ]
        began = time.perf_counter()
        for done, (future, run) in enumerate(submit(_train, ready), start=1):
            if error := future.exception():
                failures.append(f"{run.arm} s{run.seed}: {error}")
                outcome = f"failed; see {run.folder / 'run.log'}"
            else:
                *_, last = evaluations(_rows(run), study.arms[run.arm].eval.prompts)
                outcome = describe(last)
            seconds_left = (time.perf_counter() - began) / done * (len(ready) - done)
            report(
                f"{done}/{len(ready)}  {run.arm} s{run.seed}  {outcome}  "
                f"{seconds_left / 60:.0f} min left"
            )
    write_table(file, root)
    return failures


def finished(study: Study, run: Run) -> bool:
    """Returns True if a run has taken its last step."""
    rows = _rows(run)
    return bool(rows) and rows[-1]["step"] >= study.arms[run.arm].steps


def changed_settings(study: Study, run: Run) -> list[str]:
    """Returns the settings in which a run's record differs from its arm in the study's file."""
    from dcmdp_jax import calibrate

    started = _config_from_start(study, run)
    record = read_record(run.folder)
    own = {"model.folder"} | (
        {"constraint.tolerance"} if (run.folder / calibrate.FILE).is_file() else set()
    )
    names = set(differences(record, to_json(started)))
    return sorted({".".join(name.split(".")[:2]) for name in names - own})


def write_table(file: str, root: pathlib.Path) -> pathlib.Path:
    """Writes `ROOT/table.csv`, a row for each evaluation of each finished run; returns its path.

    The columns are those of `quantities`: means over the steps since the evaluation before. The
    held-out pass rates are over `prompts` problems; `seconds` counts from the run's start.
    """
    study = load(file)
    runs = [Run(file, arm, seed, str(root)) for arm in study.arms for seed in study.seed_numbers]
    rows = [
        {"study": pathlib.Path(file).stem, "arm": run.arm, "seed": run.seed, **row}
        for run in runs
        if finished(study, run)
        for row in evaluations(_rows(run), study.arms[run.arm].eval.prompts)
    ]
    keys = [quantity.key for quantity in quantities.QUANTITIES]
    columns = ["study", "arm", "seed", "step", "prompts", *keys, "seconds"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    path = root / "table.csv"
    files.write_atomic(path, text.getvalue())
    return path


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def evaluations(rows: list[dict[str, Any]], prompts: int) -> Iterator[dict[str, Any]]:
    """Yields the table's rows for the metrics of one run.

    A measure that is finite in no step since the evaluation before is "".
    """
    steps = []  # since the evaluation before
    seconds = 0.0
    for row in rows:
        steps.append(row)
        seconds += row.get("seconds") or 0.0
        if quantities.HELD_OUT_ENGINE not in row:
            continue
        means = {}
        for key in (quantity.key for quantity in quantities.QUANTITIES):
            values = [step[key] for step in steps if step.get(key) is not None]
            means[key] = statistics.fmean(values) if values else ""
        yield {"step": row["step"], "prompts": prompts, "seconds": seconds, **means}
        steps = []


def _rows(run: Run) -> list[dict[str, Any]]:
    """Returns the metrics of a run's steps."""
    from dcmdp_jax.monitoring import metrics

    return metrics.read(run.folder) if (run.folder / metrics.FILE).is_file() else []


def describe(last: dict[str, Any]) -> str:
    """Returns a line about a run's last evaluation, without the measures that it does not have."""
    figures = []
    for key in (quantities.HELD_OUT_ENGINE, quantities.HELD_OUT_TRAINER, "delta_mean"):
        if last[key] != "":
            quantity = quantities.get(key)
            figures.append(f"{quantity.name} {quantity.format.format(last[key])}")
    return "  ".join([*figures, f"{last['seconds']:.0f} s"])


def _arm_config(study: Study, run: Run) -> Config:
    """Returns the arm's configuration with the run's seed and name."""
    return dataclasses.replace(study.arms[run.arm], seed=run.seed, name=f"{run.arm}-s{run.seed}")


def _config_from_start(study: Study, run: Run) -> Config:
    """Returns the run's configuration with the shared start in place of the warm-up."""
    config = _arm_config(study, run)
    if config.model.folder:
        return config
    source = dataclasses.replace(
        config.model, folder=str(_start_folder(study, run) / "model"), architecture=None
    )
    return dataclasses.replace(config, model=source, warmup=WarmupConfig())


def start_folder(config: Config, alter: Callable[[Any], Any], root: pathlib.Path) -> pathlib.Path:
    """Returns the folder, in ROOT/starts, of the warmed-up model that a run starts from.

    All studies of ROOT share it.
    """
    shared = json.dumps(
        to_json((config.model, config.data.task, config.warmup, alter, config.seed)), sort_keys=True
    )
    return root / "starts" / hashlib.sha256(shared.encode()).hexdigest()[:16]


def _start_folder(study: Study, run: Run) -> pathlib.Path:
    return start_folder(_arm_config(study, run), study.alter, pathlib.Path(run.root).parent)


def _warm_up(run: Run) -> None:
    """Makes a run's start folder, which appears when it is complete, and a log beside it."""
    study = load(run.file)
    folder = _start_folder(study, run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.remove_unfinished(folder)
    from dcmdp_jax.run import export

    with (
        _redirect_output(folder.with_name(f"{folder.name}.log")),
        files.atomic_folder(folder) as new,
    ):
        export.warm_start(_arm_config(study, run), new, study.alter)


def _train(run: Run) -> None:
    """Trains a run, or goes on with it."""
    if _stop is not None and _stop.is_set():
        raise Interrupted("not begun")
    study = load(run.file)
    run.folder.mkdir(parents=True, exist_ok=True)
    from dcmdp_jax import train
    from dcmdp_jax.report import run_page

    with _redirect_output(run.folder / "run.log"):
        train.train(_config_from_start(study, run), run.folder)
        run_page.write(run.folder)


@contextlib.contextmanager
def _redirect_output(path: pathlib.Path) -> Iterator[None]:
    """Appends what the body prints, and the traceback of its exception, to a file."""
    import jax

    with path.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            # The next run does not need these programs; its own come from the cache on disk.
            jax.clear_caches()


@contextlib.contextmanager
def _worker_pool(
    workers: int, compiled: pathlib.Path
) -> Iterator[Callable[[Callable[[Run], None], list[Run]], Iterator[tuple[Future, Run]]]]:
    """Starts `workers` processes, each on a core of its own.

    Yields a function that runs a job for each of some runs, and yields futures as they end.
    """
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    stop = spawn.Event()
    for i in range(workers):
        cores.put(i)
    with ProcessPoolExecutor(
        workers,
        mp_context=spawn,
        initializer=_initialize_worker,
        initargs=(cores, stop, str(compiled)),
    ) as pool:

        def submit(job: Callable[[Run], None], runs: list[Run]) -> Iterator[tuple[Future, Run]]:
            futures = {pool.submit(job, run): run for run in runs}
            yield from ((future, futures[future]) for future in as_completed(futures))

        try:
            yield submit
        except BaseException:
            stop.set()  # a job that a worker has received cannot be cancelled
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _initialize_worker(cores: Any, stop: Any, compiled: str) -> None:
    """Prepares a worker: pins it to a core and watches for a request to stop.

    It comes before JAX counts the cores: runs with one thread each are faster than runs that share
    all cores.
    """
    global _stop
    number = cores.get()
    _stop = stop
    threading.Thread(
        target=_watch_parent, args=(stop, multiprocessing.parent_process()), daemon=True
    ).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {_cores()[number % len(_cores())]})
    import jax

    # The seeds of an arm share their programs.
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _watch_parent(stop: Any, parent: Any) -> None:
    """Sends this worker SIGTERM when its parent stops it or has died.

    A run saves its state on SIGTERM; an idle worker ends.
    """
    while not stop.wait(1) and parent.is_alive():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        parent.join()
        time.sleep(10)
        os.kill(os.getpid(), signal.SIGTERM)


def _cores() -> list[int]:
    """Returns the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
