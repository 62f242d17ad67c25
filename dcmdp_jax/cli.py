"""`dcmdp`: train, study, plan, parity, calibrate, diagnose, generate, eval, serve, convert, report."""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable
from functools import partial

from dcmdp_jax import errors, terminal
from dcmdp_jax.experiment import load_experiment, override
from dcmdp_jax.run_record import apply_record, differences, read_record, to_json


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; bad input ends it with one sentence and status 2."""
    parser = argparse.ArgumentParser(
        prog="dcmdp",
        allow_abbrev=False,
        description="Discrepancy-constrained RL of language models in JAX.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="run or resume an experiment",
        description=(
            "Runs CONFIG of an experiment file, or resumes it where --workdir holds an unfinished run. Any scalar field can be "
            "set by its dotted name, e.g. --constraint.tolerance 0.01 --steps 50."
        ),
    )
    train.add_argument("experiment", help="a Python file with CONFIG = Config(...)")
    train.add_argument("--workdir", help="folder of the run (default: runs/NAME)")
    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, as a TPU pod, Slurm, Open MPI or Kubernetes numbers them",
    )
    train.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        default="",
        help="one of several processes: a free port on the host of process 0",
    )
    train.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="with --coordinator: how many there are",
    )
    train.add_argument(
        "--process",
        type=int,
        default=-1,
        metavar="I",
        help="with --coordinator: which of them, from 0",
    )
    train.add_argument(
        "--wait", type=float, default=120, metavar="SECONDS", help="for the other processes to call"
    )
    train.add_argument(
        "--fields",
        action="store_true",
        help="list the fields that can be set, with their values, and stop",
    )
    train.set_defaults(run=_train)

    parity = commands.add_parser(
        "parity",
        allow_abbrev=False,
        help="compare the engine's log-probs with the trainer's",
        description=(
            "Samples with an experiment's engine, scores with its trainer, and prints the gap by position and the tolerance it "
            "calls for. Fields are set as for train."
        ),
    )
    _experiment_options(parity)
    parity.add_argument("--batches", type=int, default=4, help="rollout batches to sample")
    parity.add_argument(
        "--max-error",
        type=float,
        help="end with status 1 where a |log-prob difference| is larger, in "
        "nats (default: 1e-5 for an exact float32 engine, else no limit)",
    )
    parity.set_defaults(run=_parity)

    calibrate = commands.add_parser(
        "calibrate",
        allow_abbrev=False,
        help="measure the tolerance that an experiment needs",
        description=(
            "Samples at fixed weights, those of the run's newest checkpoint or else those that it starts from, warm-up "
            "included, and prints the floor of delta and the tolerance to use. Fields are set as for train."
        ),
    )
    _experiment_options(calibrate)
    calibrate.add_argument(
        "--batches",
        type=int,
        help="rollout batches to sample (default: the experiment's or the run's, or 4)",
    )
    calibrate.add_argument(
        "--slack",
        type=float,
        help="of the tolerance over the floor (default: the experiment's or the run's, or 0.2)",
    )
    calibrate.set_defaults(run=_calibrate)

    diagnose = commands.add_parser(
        "diagnose",
        allow_abbrev=False,
        help="tell which property of the engine makes the gap",
        description=(
            "Switches one property of an experiment's engine at a time and prints what each does to the log-probs of the same "
            "tokens. Fields are set as for train."
        ),
    )
    _experiment_options(diagnose)
    diagnose.add_argument(
        "--all", action="store_true", help="try properties that the engine has exact, too"
    )
    diagnose.set_defaults(run=_diagnose)

    study = commands.add_parser(
        "study",
        allow_abbrev=False,
        help="run the arms of a study, several seeds each",
        description=(
            "Runs every arm of a study with every seed, as many at a time as there are cores, and writes one table. The same "
            "command goes on where it was stopped."
        ),
    )
    study.add_argument("study", help="a Python file with STUDY = Study(...)")
    study.add_argument(
        "--workdir", help="folder of the runs (default: runs/FOLDER/NAME, as the file is named)"
    )
    study.add_argument(
        "--workers", type=int, default=0, help="runs at a time (default: one for each core)"
    )
    study.set_defaults(run=_study)

    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="compile an experiment for a TPU slice that is not there",
        description=(
            "Compiles every program of an experiment for a TPU topology with libtpu, no TPU needed, and prints memory per chip, "
            "FLOPs, bytes over the links and the least time a step can take. Fields are set as for train."
        ),
    )
    plan.add_argument("experiment", help="a Python file with CONFIG = Config(...)")
    plan.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="a slice, such as v5p:4x4x4, v5e:8x8 or v6e:4x4",
    )
    plan.add_argument(
        "--slices", type=int, default=1, help="slices of that topology, joined along mesh.data"
    )
    plan.add_argument("--json", metavar="FILE", help="write the figures there, too")
    plan.set_defaults(run=_plan, workdir=None)

    generate = commands.add_parser(
        "generate", allow_abbrev=False, help="sample completions of prompts from a model folder"
    )
    generate.add_argument("model", help="a Hugging Face folder with its tokenizer")
    generate.add_argument("prompts", nargs="*", help="prompt texts")
    generate.add_argument(
        "--file",
        help="prompts: a text file, one a line, or JSONL or Parquet as training reads them",
    )
    generate.add_argument(
        "--output", help="JSONL file to write; where it exists already, the rest is added"
    )
    generate.add_argument(
        "--tokenizer", default="", help="folder or file (default: the model's folder)"
    )
    generate.add_argument("--weights", default="float32", help="dtype of the engine's projections")
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--samples", type=int, default=1)
    _sampling_options(generate)
    generate.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a completion; may be repeated",
    )
    generate.add_argument("--chat", action="store_true", help="wrap prompts in the chat template")
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="a model folder on the mathematical evaluation sets",
        description=(
            "Samples k answers to each problem of the sets, compares them with the right ones and prints avg@k, pass@k, "
            "majority@k and lengths, with 95 % intervals over problems. Where --workdir holds samples already, it goes on."
        ),
    )
    _eval_options(evaluate)
    evaluate.set_defaults(run=_eval)

    serve = commands.add_parser(
        "serve", allow_abbrev=False, help="answer JetStream's gRPC clients from a model folder"
    )
    serve.add_argument("model", help="a Hugging Face folder with its tokenizer")
    serve.add_argument(
        "--tokenizer", default="", help="folder or file (default: the model's folder)"
    )
    serve.add_argument(
        "--tokens-only",
        action="store_true",
        help="use no tokenizer; only max_tokens ends a completion",
    )
    serve.add_argument("--weights", default="float32", help="dtype of the engine's projections")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="another address opens the server to the network, unprotected",
    )
    serve.add_argument("--port", type=int, default=9000, help="0 takes a free one")
    serve.add_argument("--slots", type=int, default=8, help="sequences decoded together")
    serve.add_argument("--queue", type=int, default=64, help="requests that may wait for a slot")
    serve.add_argument("--max-prompt", type=int, help="tokens (default: half of --max-length)")
    serve.add_argument(
        "--max-length",
        type=int,
        help="tokens of a prompt and its completion (default: 2048, or as many as "
        "the model has positions)",
    )
    serve.add_argument(
        "--steps", type=int, default=8, help="tokens decoded, and streamed, at a time"
    )
    serve.add_argument(
        "--grace",
        type=float,
        default=10,
        metavar="SECONDS",
        help=(
            "after SIGTERM, for accepted requests to end, whether or not their clients read; what is "
            "left is then cut off (default: %(default)s)"
        ),
    )
    _sampling_options(serve)
    serve.set_defaults(run=_serve)

    convert = commands.add_parser(
        "convert",
        allow_abbrev=False,
        help="write a run's newest checkpoint as a Hugging Face folder",
    )
    convert.add_argument("experiment", help="the run's experiment file")
    convert.add_argument("output", help="folder to write")
    convert.add_argument("--workdir", help="folder of the run (default: runs/NAME)")
    convert.set_defaults(run=_convert)

    report = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="write one page about one run or several",
        description=(
            "Of one run, writes report.html into its folder; of several, one page that compares them. Runs that differ in the seed "
            "alone are shown as one configuration; the first run given is what the others are held against."
        ),
    )
    report.add_argument("workdirs", nargs="+", metavar="RUN", help="a run's folder")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="of several runs (default: report.html in the folder that holds them)",
    )
    report.set_defaults(run=_report)

    known, rest = parser.parse_known_args(arguments)
    try:
        if "://" in (getattr(known, "workdir", None) or ""):
            raise ValueError(
                f"--workdir {known.workdir} is no folder; mount the bucket (gcsfuse) and name where it is mounted"
            )
        job = known.run(known, rest)
    except ModuleNotFoundError as error:
        print(
            f"dcmdp: {error}; the core alone does not train or sample, install requirements.txt or dcmdp-jax[jetstream]",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("dcmdp: stopped before the start", file=sys.stderr)
        return 130
    except Exception as error:
        said = errors.user_message(error)
        if said is None and not isinstance(error, ValueError):
            raise
        print(f"dcmdp: {said or error}", file=sys.stderr)
        return 2
    return job()


def _train(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    terminal.ignore_broken_streams()
    config, workdir = _experiment(args, rest)
    if args.fields:
        return partial(_print_fields, config)
    given = [bool(args.coordinator), args.processes > 0, args.process >= 0]
    if any(given) and (args.distributed or not all(given)):
        raise ValueError(
            "one of several processes is given --coordinator HOST:PORT, --processes N and --process I, or "
            "--distributed alone"
        )
    from dcmdp_jax import train
    from dcmdp_jax.checkpoint import NoReadableCheckpoint
    from dcmdp_jax.distributed import processes
    from dcmdp_jax.stopping import Failed, Interrupted

    if args.coordinator or args.distributed:
        processes.start(workdir, args.coordinator, args.processes, args.process, args.wait)
    with processes.end_all_on_error():
        inputs = train.prepare(config, workdir)

    def job() -> int:  # a fault of the project's own shows its traceback
        again = f"go on with: dcmdp train {args.experiment} --workdir {workdir}"
        try:
            with processes.end_all_on_error():
                train.run(config, workdir, inputs, at_once=True)
        except Interrupted as stop:
            processes.log0(f"{stop}; {again}")
            return 130
        except NoReadableCheckpoint as error:
            print(f"dcmdp: {error}", file=sys.stderr)
            return 2
        except Failed as error:
            print(f"dcmdp: {error}", file=sys.stderr)
            return 1
        except Exception as error:
            said = errors.user_message(error)
            if said is None:
                raise
            print(f"dcmdp: {said}; {again}", file=sys.stderr)
            return 1
        processes.log0(f"finished; see {workdir / 'report.html'}")
        return 0

    return job


def _print_fields(config) -> int:
    from dcmdp_jax.config import scalar_fields

    for name, kind in scalar_fields(config).items():
        print(f"--{name} {functools.reduce(getattr, name.split('.'), config)!r}  ({kind.__name__})")
    return 0


def _experiment(args: argparse.Namespace, rest: list[str]):
    """The experiment's configuration, as recorded where its folder holds a run already, with the
    options on top.
    """

    config = load_experiment(args.experiment)
    options = _overrides(rest)
    workdir = pathlib.Path(args.workdir or f"runs/{config.name}")
    if any((workdir / "checkpoints").glob("[0-9]*")):
        written = to_json(config)
        config = apply_record(config, read_record(workdir))
        kept = [
            f"{name}={old}"
            for name, (_, old) in differences(written, to_json(config)).items()
            if name not in options
        ]
        if kept:
            print(f"{workdir} goes on with its own {', '.join(kept)}", file=sys.stderr)
    return override(config, options), workdir


def _experiment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="a Python file with CONFIG = Config(...)")
    parser.add_argument("--workdir", help="folder of the run (default: runs/NAME)")


def _parity(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    if args.batches < 2:
        raise ValueError(f"--batches {args.batches} gives no standard error; take 2 or more")
    config, workdir = _experiment(args, rest)
    from dcmdp_jax import train
    from dcmdp_jax.tools import parity

    inputs = train.read_inputs(config)
    policy = parity.load(config, inputs, workdir)

    def job() -> int:
        found = parity.measure(config, inputs, policy, args.batches)
        limit = (
            args.max_error if args.max_error is not None else parity.default_limit(config, inputs)
        )
        print(
            f"{found.origin}\n{parity.table(found)}\n{parity.verdict(found, config.constraint.tolerance)}"
        )
        print(f"wrote {parity.write(found, config, limit, workdir)}")
        if reason := parity.failure(found, limit):
            print(f"dcmdp parity: {reason}", file=sys.stderr)
            return 1
        return 0

    return job


def _calibrate(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    config, workdir = _experiment(args, rest)
    from dcmdp_jax import calibrate, checkpoint, train
    from dcmdp_jax.tools import parity

    wanted = calibrate.settings(config, workdir)
    batches = wanted.batches if args.batches is None else args.batches
    slack = wanted.slack if args.slack is None else args.slack
    if batches < 2 or not slack >= 0:
        raise ValueError(f"--batches {batches} and --slack {slack:g} must be at least 2 and 0")
    inputs = train.read_inputs(config)
    trained = parity.load(config, inputs, workdir) if checkpoint.steps(workdir) else None

    def job() -> int:
        policy = trained or parity.starting(config, inputs)
        found = parity.measure(
            config, inputs, policy, batches, first=calibrate.FIRST, slack=slack
        ).calibration
        print(f"{policy.origin}\n{calibrate.describe(found, slack)}")
        print(
            f"in the experiment: tolerance={calibrate.rounded_tolerance(found):g}, or tolerance=Calibrated(slack={slack:g}), with "
            "which a run measures it at its start"
        )
        return 0

    return job


def _diagnose(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    config, workdir = _experiment(args, rest)
    from dcmdp_jax import train
    from dcmdp_jax.report import tables
    from dcmdp_jax.tools import diagnose, parity

    diagnose.check(config)
    inputs = train.read_inputs(config)
    policy = parity.load(config, inputs, workdir)
    other = diagnose.other_version(config, inputs, workdir, policy)

    def job() -> int:
        found = diagnose.diagnose(config, inputs, policy, other, probe=args.all)
        print(
            f"{found.origin}\n{tables.aligned_text(diagnose.table(found), left=2)}\n{diagnose.verdict(found)}"
        )
        print(
            "\n".join([*diagnose.notes(found), f"wrote {diagnose.write(found, config, workdir)}"])
        )
        return 0

    return job


def _study(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    _none(rest)
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers} must not be negative")
    from dcmdp_jax.tools import study

    study.load(args.study)
    file = pathlib.Path(args.study)
    root = pathlib.Path(
        args.workdir or pathlib.Path("runs") / file.absolute().parent.name / file.stem
    )
    return partial(study.command, args.study, root, args.workers)


def _plan(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; a TPU that is here stays free

    config = override(load_experiment(args.experiment), _overrides(rest))
    from dcmdp_jax import train
    from dcmdp_jax.report import tables
    from dcmdp_jax.tools import plan

    if args.json and not pathlib.Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = plan.plan_run(config, train.read_model(config), args.topology, args.slices, say)
    print("\n".join([tables.aligned_text(plan.table(found), left=1), *plan.verdict(found)]))
    if args.json:
        plan.write(found, args.json)
    return lambda: int(any(item.excess for item in found.programs))


def _overrides(rest: list[str]) -> dict[str, str]:
    """`--a.b 1 --c=2` as {"a.b": "1", "c": "2"}."""
    found = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not an option; fields are set as --name value")
        name, equals, value = word[2:].partition("=")
        value = value if equals else next(words, None)
        if value is None:
            raise ValueError(f"--{name} needs a value")
        found[name.replace("-", "_")] = value
    return found


def _sampling_options(parser: argparse.ArgumentParser, temperature: float = 1.0) -> None:
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=0, help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)


def _sampling(args: argparse.Namespace):
    if not (args.temperature == 0 or 1e-6 <= args.temperature <= 1e6):
        raise ValueError(f"--temperature {args.temperature:g} must be 0 or lie in 1e-6..1e6")
    if not 0 <= args.top_k < 2**31 or not 0 < args.top_p <= 1 or not 0 <= args.min_p < 1:
        raise ValueError(
            "--top-k must not be negative (nor past 31 bits), --top-p lies in (0, 1] "
            "and --min-p in [0, 1)"
        )
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must lie in 0..4294967295")
    from dcmdp_jax.records import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p)


def _generate(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    _none(rest)
    if args.max_tokens < 1 or args.samples < 1:
        raise ValueError("--max-tokens and --samples must be at least 1")
    if bool(args.prompts) == bool(args.file):
        raise ValueError("give prompt texts or --file FILE, one of the two")
    how = _sampling(args)
    from dcmdp_jax.config import Precision
    from dcmdp_jax.tools import complete

    options = dict(
        tokenizer_path=args.tokenizer,
        precision=Precision(weights=args.weights),
        max_tokens=args.max_tokens,
        samples=args.samples,
        sampling=how,
        stop_strings=tuple(args.stop),
        seed=args.seed,
        chat=args.chat,
    )
    prompts = args.prompts or complete.read_prompts(args.file)
    if args.output:
        added = complete.to_file(pathlib.Path(args.output), args.model, prompts, **options)
        print(f"added {added} completions to {args.output}")
        return _done
    for chunk in complete.texts(args.model, prompts, **options):
        for completion in chunk:
            print(
                f"{completion.prompt}\n  -> {completion.text}{'' if completion.stopped else ' ...'}"
            )
    return _done


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a Hugging Face folder with its tokenizer"
    )
    parser.add_argument(
        "--data-dir",
        required=True,
        metavar="DIR",
        help="holds SET.jsonl; minerva_math and olympiadbench are known, too",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="OUT",
        help="for samples and summary.json; made where missing",
    )
    parser.add_argument(
        "--sets",
        default="aime24,aime25,amc23,math500,minerva,olympiad",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--k",
        default="",
        help="samples a problem, for all sets or one number a set, as 32,32,4 "
        "(default: 32 for AIME and AMC, 4 for the others)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="the first N problems of each set alone"
    )
    parser.add_argument("--max-tokens", type=int, default=32_768)
    parser.add_argument(
        "--tokenizer", default="", help="folder or file (default: the model's folder)"
    )
    parser.add_argument(
        "--no-chat", dest="chat", action="store_false", help="leave out the chat template"
    )
    parser.add_argument(
        "--enable-thinking", action="store_true", help="passed to the chat template"
    )
    parser.add_argument(
        "--instruction",
        help="follows each problem on a line of its own (default: asks for \\boxed{})",
    )
    parser.add_argument("--weights", default="float32", help="dtype of the engine's projections")
    parser.add_argument("--activations", default="", help="dtype of what enters them")
    parser.add_argument("--cache", default="", help="dtype of keys and values")
    parser.add_argument("--bfloat16", action="store_true", help="load and compute in bfloat16")
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices to split the model over"
    )
    parser.add_argument("--slots", type=int, default=32, help="sequences decoded together")
    _sampling_options(parser, temperature=0.7)


def _eval(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    _none(rest)
    sampling = _sampling(args)
    k = args.k.split(",") if args.k else []
    if not all(number.isdecimal() for number in k):
        raise ValueError(f"--k {args.k} must be whole numbers with commas between them")
    from dcmdp_jax.config import Precision
    from dcmdp_jax.evaluation import math_benchmarks, scores
    from dcmdp_jax.report import tables
    from dcmdp_jax.stopping import Interrupted, requests

    precision = Precision(weights=args.weights, activations=args.activations, cache=args.cache)
    instruction = math_benchmarks.INSTRUCTION if args.instruction is None else args.instruction
    evaluation = math_benchmarks.prepare(
        math_benchmarks.Options(
            folder=args.model,
            data_dir=args.data_dir,
            tokenizer=args.tokenizer,
            sets=tuple(args.sets.split(",")),
            k=tuple(map(int, k)),
            limit=args.limit,
            max_tokens=args.max_tokens,
            sampling=sampling,
            precision=precision,
            bfloat16=args.bfloat16,
            tensor=args.tensor,
            slots=args.slots,
            seed=args.seed,
            chat=args.chat,
            enable_thinking=args.enable_thinking,
            instruction=instruction,
        ),
        pathlib.Path(args.workdir),
    )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def job() -> int:
        try:
            with requests(at_once=True) as asked:
                figures = math_benchmarks.run(evaluation, asked, say)
        except Interrupted:
            say("stopped, and every ended sample is kept; the same command goes on")
            return 130
        print(
            f"{tables.aligned_text(scores.table(figures))}\nwrote {evaluation.workdir / 'summary.json'}"
        )
        return 0

    return job


def _serve(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    _none(rest)
    how = _sampling(args)
    from dcmdp_jax.config import Precision
    from dcmdp_jax.serving import server

    status = server.serve(
        args.model,
        server.Options(
            host=args.host,
            port=args.port,
            slots=args.slots,
            waiting=args.queue,
            max_prompt=args.max_prompt,
            max_length=args.max_length,
            steps=args.steps,
            grace=args.grace,
        ),
        tokenizer_path=args.tokenizer,
        tokens_only=args.tokens_only,
        precision=Precision(weights=args.weights),
        sampling=how,
        seed=args.seed,
    )
    return lambda: status


def _convert(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed; the host has most memory
    config, workdir = _experiment(args, rest)
    from dcmdp_jax.train import export

    print(f"wrote step {export(config, workdir, args.output)} to {args.output}")
    return _done


def _report(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    _none(rest)
    from dcmdp_jax.report import comparison, run_page

    if len(args.workdirs) == 1 and not args.output:
        print(run_page.write(args.workdirs[0]))
    else:
        print(comparison.write(args.workdirs, args.output))
    return _done


def _done() -> int:
    return 0


def _none(rest: list[str]) -> None:
    if rest:
        raise ValueError(f"unknown option {rest[0]}")
