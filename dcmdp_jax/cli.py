"""`dcmdp`: train, generate, convert, report."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from functools import partial


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; bad input ends it with one sentence and status 2."""
    parser = argparse.ArgumentParser(prog="dcmdp", allow_abbrev=False,
                                     description="Discrepancy-constrained RL of language models in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", allow_abbrev=False, help="run or resume an experiment", description=(
        "Runs CONFIG of an experiment file, or resumes it where --workdir holds an unfinished run. Any scalar field can be "
        "set by its dotted name, e.g. --constraint.tolerance 0.01 --steps 50."))
    train.add_argument("experiment", help="a Python file with CONFIG = Config(...)")
    train.add_argument("--workdir", help="folder of the run (default: runs/NAME)")
    train.add_argument("--fields", action="store_true", help="list the fields that can be set, with their values, and stop")
    train.set_defaults(run=_train)

    generate = commands.add_parser("generate", help="sample completions of prompts from a model folder")
    generate.add_argument("model", help="a Hugging Face folder with its tokenizer")
    generate.add_argument("prompts", nargs="+", help="prompt texts")
    generate.add_argument("--tokenizer", default="", help="folder or file (default: the model's folder)")
    generate.add_argument("--weights", default="float32", help="dtype of the engine's projections")
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--samples", type=int, default=1)
    generate.add_argument("--temperature", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--chat", action="store_true", help="wrap prompts in the chat template")
    generate.set_defaults(run=_generate)

    convert = commands.add_parser("convert", allow_abbrev=False,
                                  help="write a run's newest checkpoint as a Hugging Face folder")
    convert.add_argument("experiment", help="the run's experiment file")
    convert.add_argument("output", help="folder to write")
    convert.add_argument("--workdir", help="folder of the run (default: runs/NAME)")
    convert.set_defaults(run=_convert)

    report = commands.add_parser("report", help="write report.html of a run folder")
    report.add_argument("workdir")
    report.set_defaults(run=_report)

    known, rest = parser.parse_known_args(arguments)
    try:
        job = known.run(known, rest)
    except ModuleNotFoundError as error:
        print(f"dcmdp: {error}; the core alone does not train or sample, install requirements.txt or dcmdp-jax[jetstream]",
              file=sys.stderr)
        return 2
    except (ValueError, ImportError, OSError) as error:
        print(f"dcmdp: {error}", file=sys.stderr)
        return 2
    return job()


def _train(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    config, workdir = _experiment(args, rest)
    if args.fields:
        return partial(_print_fields, config)
    from dcmdp_jax import train
    from dcmdp_jax.stopping import Interrupted

    inputs = train.prepare(config, workdir)

    def job() -> int:  # what goes wrong from here on is no bad input and shows its traceback
        try:
            train.run(config, workdir, inputs)
        except Interrupted as stop:
            print(f"{stop}; go on with: dcmdp train {args.experiment} --workdir {workdir}")
            return 130
        print(f"finished; see {workdir / 'report.html'}")
        return 0

    return job


def _print_fields(config) -> int:
    from dcmdp_jax.config import scalar_fields

    for name, kind in scalar_fields(config).items():
        print(f"--{name} {functools.reduce(getattr, name.split('.'), config)!r}  ({kind.__name__})")
    return 0


def _experiment(args: argparse.Namespace, rest: list[str]):
    """The experiment's configuration, as recorded where its folder holds a run already, with the options on top."""
    from dcmdp_jax.config import differences, load_experiment, override, recorded, to_json

    config, options = load_experiment(args.experiment), _overrides(rest)
    workdir = pathlib.Path(args.workdir or f"runs/{config.name}")
    if any((workdir / "checkpoints").glob("[0-9]*")):
        written = to_json(config)
        config = recorded(config, json.loads((workdir / "config.json").read_text()))
        kept = [f"{name}={old}" for name, (_, old) in differences(written, to_json(config)).items() if name not in options]
        if kept:
            print(f"{workdir} goes on with its own {', '.join(kept)}", file=sys.stderr)
    return override(config, options), workdir


def _overrides(rest: list[str]) -> dict[str, str]:
    """`--a.b 1 --c=2` as {"a.b": "1", "c": "2"}."""
    found, words = {}, iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not an option; fields are set as --name value")
        name, equals, value = word[2:].partition("=")
        value = value if equals else next(words, None)
        if value is None:
            raise ValueError(f"--{name} needs a value")
        found[name.replace("-", "_")] = value
    return found


def _generate(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    _none(rest)
    if args.max_tokens < 1 or args.samples < 1 or args.temperature < 0:
        raise ValueError("--max-tokens and --samples must be at least 1, and --temperature at least 0")
    from dcmdp_jax.rollout import complete

    for prompt, text, stopped in complete.texts(
            args.model, args.prompts, tokenizer_path=args.tokenizer, weights_dtype=args.weights, max_tokens=args.max_tokens,
            samples=args.samples, temperature=args.temperature, seed=args.seed, chat=args.chat):
        print(f"{prompt}\n  -> {text}{'' if stopped else ' ...'}")
    return _done


def _convert(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    config, workdir = _experiment(args, rest)
    from dcmdp_jax.train import export

    print(f"wrote step {export(config, workdir, args.output)} to {args.output}")
    return _done


def _report(args: argparse.Namespace, rest: list[str]) -> Callable[[], int]:
    _none(rest)
    from dcmdp_jax import report

    print(report.write(pathlib.Path(args.workdir)))
    return _done


def _done() -> int:
    return 0


def _none(rest: list[str]) -> None:
    if rest:
        raise ValueError(f"unknown option {rest[0]}")
