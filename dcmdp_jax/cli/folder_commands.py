"""Commands on a model folder: generate, chat, eval, serve, doctor, push.

Each checks its options and returns a job that gives the exit status. Imports that need JAX stand in
the commands, so that bad options are refused at once.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

from dcmdp_jax import buckets, hub
from dcmdp_jax.cli import failures, fields
from dcmdp_jax.config import ModelSource, Precision
from dcmdp_jax.models.model_config import Compute
from dcmdp_jax.monitoring import phases
from dcmdp_jax.monitoring.screen import screen
from dcmdp_jax.records import Sampling
from dcmdp_jax.run import staging


def generate_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp generate`: prints completions of prompts, or writes them to --output."""
    fields.refuse(options)
    if args.max_tokens < 1 or args.samples < 1:
        raise ValueError("--max-tokens and --samples must be at least 1")
    if bool(args.prompts) == bool(args.file):
        raise ValueError("give prompt texts or --file FILE, one of the two")
    if args.server and args.weights != "float32":
        raise ValueError(
            f"--weights {args.weights} is a format of the library's own engine, and --server "
            "samples; leave one of the two out"
        )
    sampling = _sampling(args)
    from dcmdp_jax.tools import complete

    settings = dict(
        tokenizer_path=hub.settings_folder(args.tokenizer),
        precision=Precision(weights=args.weights),
        server=args.server,
        max_tokens=args.max_tokens,
        samples=args.samples,
        sampling=sampling,
        stop_strings=tuple(args.stop),
        seed=args.seed,
        chat=args.chat,
        devices=args.devices,
    )
    prompts = args.prompts or complete.read_prompts(args.file)
    model = hub.model_folder(args.model)
    if args.output:
        with buckets.local_file(args.output) as file:
            added = complete.to_file(file, model, prompts, **settings)
        print(f"added {added} completions to {args.output}")
        return _done
    for chunk in complete.texts(model, prompts, **settings):
        for completion in chunk:
            ending = "" if completion.stopped else " ..."
            print(f"{completion.prompt}\n  -> {completion.text}{ending}")
    return _done


def chat_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp chat`: answers the lines of standard input."""
    if args.max_tokens < 1 or args.max_length < 2:
        raise ValueError("--max-tokens must be at least 1 and --max-length at least 2")
    sampling = _sampling(args)
    is_run = args.model.endswith(".py")
    if is_run:
        if args.tokenizer:
            raise ValueError("--tokenizer is for a model folder; a run has its own, leave it out")
        args.experiment = args.model
        config, workdir = fields.load(args, options)
    else:
        fields.refuse(options)
        if args.workdir:
            raise ValueError("--workdir is for a run; give its experiment file as the model")
        if (pathlib.Path(args.model) / "checkpoints").is_dir():
            raise ValueError(
                f"{args.model} is the folder of a run; give its experiment file, with --workdir "
                f"{args.model}"
            )
    from dcmdp_jax.models import weights
    from dcmdp_jax.run import export, inputs
    from dcmdp_jax.tokens import tokenizer as tokenizers
    from dcmdp_jax.tools import chat

    if is_run:
        model, params, step = export.newest(config, workdir)
        tokenizer = inputs.read_tokenizer(config)
    else:
        folder = hub.model_folder(args.model)
        model = weights.read_config(folder)
        tokenizer = tokenizers.load(hub.settings_folder(args.tokenizer) or folder, folder)
        weights.check(folder)
    conversation = chat.Chat(
        model,
        tokenizer,
        precision=Precision(weights=args.weights),
        max_length=args.max_length,
        max_tokens=args.max_tokens,
        sampling=sampling,
        seed=args.seed,
        system=args.system,
        template=args.chat,
        enable_thinking=args.enable_thinking,
        devices=args.devices,
    )

    def job() -> int:
        if is_run:
            print(staging.shown(f"step {step} of {workdir}"), file=sys.stderr)
            conversation.load(params)
        else:
            conversation.load(weights.load(folder)[1])
        chat.converse(conversation)
        return 0

    return job


def push_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp push`: uploads a model folder to the Hub."""
    fields.refuse(options)
    from dcmdp_jax.models import weights

    weights.check(args.folder)
    print(f"pushed {args.folder}: {hub.push(args.folder, args.name, args.private)}")
    return _done


def evaluate_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp eval`: scores a model folder on sets of problems and prints the table."""
    fields.refuse(options)
    sampling = _sampling(args)
    k = args.k.split(",") if args.k else []
    if not all(number.isdecimal() for number in k):
        raise ValueError(f"--k {args.k} must be integers with commas between them")
    from dcmdp_jax.evaluation import math_benchmarks, scores
    from dcmdp_jax.report import tables
    from dcmdp_jax.stopping import Interrupted, requests

    instruction = math_benchmarks.INSTRUCTION if args.instruction is None else args.instruction
    evaluation = math_benchmarks.prepare(
        math_benchmarks.Options(
            model=ModelSource(
                hub.model_folder(args.model),
                hub.settings_folder(args.tokenizer),
                compute=Compute(bfloat16=args.bfloat16),
            ),
            data_dir=args.data_dir,
            sets=tuple(math_benchmarks.BENCHMARKS if args.sets is None else args.sets.split(",")),
            k=tuple(map(int, k)),
            limit=args.limit,
            max_tokens=args.max_tokens,
            sampling=sampling,
            precision=Precision(
                weights=args.weights, activations=args.activations, cache=args.cache
            ),
            tensor=args.tensor,
            slots=args.slots,
            seed=args.seed,
            chat=args.chat,
            enable_thinking=args.enable_thinking,
            instruction=instruction,
        ),
        staging.folder(args.workdir),
        args.devices,
    )

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def job() -> int:
        try:
            with requests(at_once=True) as should_stop:
                figures = math_benchmarks.run(evaluation, should_stop, log)
        except Interrupted:
            log("stopped, and every finished sample is saved; the same command continues")
            return 130
        except OSError as error:
            failures.tell(error, str(error), args.traceback)
            return 1
        print(tables.aligned_text(scores.table(figures)))
        print(staging.shown(f"wrote {evaluation.workdir / 'summary.json'}"))
        return 0

    return job


def serve_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp serve`: serves a model folder until a signal."""
    fields.refuse(options)
    sampling = _sampling(args)
    from dcmdp_jax.serving import server

    status = server.serve(
        hub.model_folder(args.model),
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
        tokenizer_path=hub.settings_folder(args.tokenizer),
        tokens_only=args.tokens_only,
        precision=Precision(weights=args.weights),
        sampling=sampling,
        seed=args.seed,
        devices=args.devices,
    )
    return lambda: status


def doctor_command(args: argparse.Namespace, options: list[str]) -> Callable[[], int]:
    """`dcmdp doctor`: tells what is wrong between an engine and the model of a folder."""
    fields.refuse(options)
    if bool(args.file) == bool(args.server):
        raise ValueError("give a file of recorded completions or --server URL, one of the two")
    if args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1")
    output = pathlib.Path(args.output)
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output {output} names no file in a folder that exists; give another")
    from dcmdp_jax.tools import doctor, doctor_page, rollout_records

    folder = hub.model_folder(args.model)
    own_tokenizer = hub.settings_folder(args.tokenizer)
    vocab_size, max_position = doctor.check(folder, own_tokenizer)
    if args.server:
        from dcmdp_jax.tokens import tokenizer as tokenizers
        from dcmdp_jax.tools import server_records

        if args.temperature is None:
            args.temperature = server_records.TEMPERATURE
        sampling = _stated_sampling(args, {})
        tokenizer = tokenizers.load(own_tokenizer or folder, folder)
        found = server_records.sample(
            args.server, tokenizer, sampling, vocab_size, max_position, args.limit, screen.line
        )
    else:
        found = rollout_records.read(pathlib.Path(args.file), args.limit, vocab_size, max_position)
        sampling = _stated_sampling(args, found.sampling)
    settings = {
        "model": args.model,
        "completions": args.server or args.file,
        "sampling": ", ".join(f"{name} {value:g}" for name, value in sampling._asdict().items()),
        "stated log-probs": "raw log-probs" if args.raw else "log-probs of that distribution",
        "trainer": "scored in bfloat16" if args.bfloat16 else "scored in float32",
    }

    def job() -> int:
        if found.more:
            more = f"{args.file} goes on; the first {args.limit} completions are read (--limit)"
            screen.line(more)
        reported = Sampling() if args.raw else sampling
        with phases.told("scoring"):
            model = doctor.load(folder, own_tokenizer, bfloat16=args.bfloat16)
            diagnosis = doctor.examine(model, found.records, sampling, reported, screen.line)
        page = doctor_page.write(diagnosis, settings, output)  # before a reader may be gone
        print(doctor_page.text(diagnosis))
        print(f"\nwrote {page}")
        return 0 if diagnosis.verdict.name == "as stated" else 1

    return job


def _stated_sampling(args: argparse.Namespace, in_file: dict[str, float]) -> Sampling:
    """Returns the settings of a file and of the options, which must not contradict each other."""
    for name, value in in_file.items():
        given = getattr(args, name)
        if given not in (None, value):
            raise ValueError(
                f"--{name.replace('_', '-')} {given:g} differs from the {name} of {value:g} that "
                f"{args.file} states; leave the option out"
            )
    given = {name: getattr(args, name) for name in Sampling._fields}
    given = {name: value for name, value in given.items() if value is not None}
    return _in_range(Sampling()._replace(**(in_file | given)))


def _sampling(args: argparse.Namespace) -> Sampling:
    """Returns the sampling options. Raises ValueError on one that is out of its range."""
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must lie in 0..4294967295")
    return _in_range(Sampling(args.temperature, args.top_k, args.top_p, args.min_p))


def _in_range(sampling: Sampling) -> Sampling:
    temperature, top_k, top_p, min_p = sampling
    if not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise ValueError(f"--temperature {temperature:g} must be 0 or lie in 1e-6..1e6")
    if not 0 <= top_k < 2**31 or not 0 < top_p <= 1 or not 0 <= min_p < 1:
        raise ValueError(
            "--top-k must not be negative (nor past 31 bits), --top-p lies in (0, 1] "
            "and --min-p in [0, 1)"
        )
    return sampling


def _done() -> int:
    return 0
