"""The gap of engines against the float32 trainer, on one model and the same prompts:

    python -m benchmarks.engines.gaps [FILE] [--model FOLDER] [--batches 8]

prints a table and writes FILE, by default benchmarks/engines/gaps.csv. The model is that of FOLDER,
by default that of experiments/laptop/real_engine.py after its warm-up. The library's own engine
comes in several formats, then vLLM and llama.cpp on the CPU (install_vllm.sh,
install_llama_cpp.sh), a server for each of their formats. Every token that an engine samples is
scored again by the trainer, as `dcmdp parity` does. A format that is not served has no figures. The
README's table is printed last.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator

from benchmarks.engines import llama_cpp_server, vllm_server
from benchmarks.engines.process import ServerProcess
from dcmdp_jax.config import Config, ModelSource, Precision, WarmupConfig
from dcmdp_jax.models import weights as model_files
from dcmdp_jax.run.inputs import Inputs, read_inputs
from dcmdp_jax.tokens import tokenizer as tokenizers
from dcmdp_jax.tools import parity

HERE = pathlib.Path(__file__).parent
EXPERIMENT = HERE.parents[1] / "experiments" / "laptop" / "real_engine.py"

OURS = {
    "float32": Precision(),
    "bfloat16 weights": Precision(weights="bfloat16"),
    "bfloat16 weights, embedding, head, norms, cache": Precision(
        **dict.fromkeys(("weights", "embed", "head", "norms", "cache"), "bfloat16")
    ),
    "int8 weights": Precision(weights="int8"),
    "fp8 weights": Precision(weights="float8_e4m3fn"),
    "fp8 weights, activations, cache": Precision(
        **dict.fromkeys(("weights", "activations", "cache"), "float8_e4m3fn")
    ),
    "int4 weights": Precision(weights="int4"),
}
VLLM = {  # words of its command line
    "float32": ("--dtype", "float32"),
    "float16": ("--dtype", "float16"),
    "bfloat16": ("--dtype", "bfloat16"),
    "bfloat16, fp8 cache": ("--dtype", "bfloat16", "--kv-cache-dtype", "fp8_e4m3"),
    # Online int8 touches experts alone, and online fp8 weights make 64 tokens a second here.
}
LLAMA_CPP = {  # words of serve_gguf.py's command line; llama.cpp's own cache is f16
    "float32": ("--cache", "f32"),
    "float32, f16 cache": ("--cache", "f16"),
    "Q8_0 weights, f16 cache": ("--weights", "Q8_0", "--cache", "f16"),
    "Q4_0 weights, f16 cache": ("--weights", "Q4_0", "--cache", "f16"),
}
HEAD = (
    "engine",
    "format",
    "tokens",
    "mean delta",
    "standard error",
    "max delta",
    "mean |dlogp|",
    "max |dlogp|",
    "outside a clip of 0.2",
)

COLUMNS = ("float32", "bfloat16", "int8", "fp8", "int4")  # of the README's table
SUMMARY: dict[str, tuple[str, ...]] = {  # its rows: the engine, and the format in each column
    "this library, weights only": (
        *("this library", "float32", "bfloat16 weights"),
        *("int8 weights", "fp8 weights", "int4 weights"),
    ),
    "this library, weights, cache and more": (
        *("this library", "", "bfloat16 weights, embedding, head, norms, cache"),
        *("", "fp8 weights, activations, cache", ""),
    ),
    "vLLM (fp8: cache alone)": ("vLLM", "float32", "bfloat16", "", "bfloat16, fp8 cache", ""),
}


def main() -> None:
    vllm_server.stop_servers_on_sigterm()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=pathlib.Path, nargs="?", default=HERE / "gaps.csv")
    parser.add_argument("--model", default="", help="a Hugging Face folder with a tokenizer")
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    config = vllm_server.config_of(EXPERIMENT)
    if args.model:
        source = ModelSource(folder=args.model)
        config = dataclasses.replace(config, model=source, warmup=WarmupConfig())
    inputs = read_inputs(config)
    weights = parity.starting(config, inputs)
    weights = weights._replace(prompt_state=inputs.prompts.get_state())
    with args.file.open("w") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(HEAD)
        print(*HEAD, sep=" | ")
        deltas = {}
        for row in rows(config, inputs, weights, args.batches):
            table.writerow(row)
            out.flush()
            print(*row, sep=" | ", flush=True)
            deltas[row[:2]] = row[HEAD.index("mean delta")]
    print(summary(deltas))


def summary(deltas: dict[tuple[str, ...], str]) -> str:
    """Returns the README's table, from the mean delta of each engine and format."""
    lines = [("mean delta", *COLUMNS)]
    for name, (engine, *formats) in SUMMARY.items():
        lines.append((name, *(_cell(deltas.get((engine, form), "")) for form in formats)))
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def _cell(delta: str) -> str:
    return f"{float(delta):.1e}".replace("e-0", "e-") if delta else ""


def rows(
    config: Config, inputs: Inputs, weights: parity.TrainerWeights, batches: int
) -> Iterator[tuple[str, ...]]:
    """Yields the table's rows."""
    for name, precision in OURS.items():
        sampled = with_rollout(config, precision=precision)
        found = parity.measure(sampled, inputs, weights, batches)
        yield "this library", name, *figures(found)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "model")
        token_ids = tokenizers.special_token_ids(inputs.tokenizer)
        model_files.save(folder, inputs.model_config, weights.params, token_ids=token_ids)
        for name, words in VLLM.items():
            start = functools.partial(vllm_server.Server, folder, words)
            yield "vLLM", name, *served(config, inputs, weights, batches, start)
        for name, words in LLAMA_CPP.items():
            start = functools.partial(llama_cpp_server.Server, folder, words)
            yield "llama.cpp", name, *served(config, inputs, weights, batches, start)


def with_rollout(config: Config, **changes) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **changes))


def served(
    config: Config,
    inputs: Inputs,
    weights: parity.TrainerWeights,
    batches: int,
    start: Callable[..., ServerProcess],
) -> tuple[str, ...]:
    """Returns the figures of the server that `start(log=FILE)` starts; empty ones if it does not
    start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            server = start(log=pathlib.Path(scratch, "server.log"))
        except RuntimeError as error:
            print(error, flush=True)
            return ("",) * (len(HEAD) - 2)
        with server:
            sampled = with_rollout(config, server=server.url)
            return figures(parity.measure(sampled, inputs, weights, batches))


def figures(found: parity.Parity) -> tuple[str, ...]:
    gap = found.gaps["all"]
    return (
        str(gap.tokens),
        f"{gap.delta:.2e}",
        f"{float(found.calibration.std_error):.0e}",
        f"{gap.prob_diff_max:.2g}",
        f"{gap.logp_diff_mean:.2e}",
        f"{gap.logp_diff_max:.2g}",
        f"{gap.clipped:.2%}",
    )


if __name__ == "__main__":
    main()
