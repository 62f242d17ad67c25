"""Is the shorter of the two stages hidden? `taskset -c 0,1 python -m benchmarks.overlap [--staleness 1]`

Two simulated CPU devices of one thread each: one trains, one samples. Prints the wall seconds (medians) of an update alone, of
a rollout alone, and of a step of the real loop. With --staleness 0 the loop cannot overlap, and a step takes their sum.
"""

from __future__ import annotations

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"

import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from dcmdp_jax import config, metrics, step, sync, train

SHAPE = config.ModelConfig(vocab_size=18, hidden_size=96, intermediate_size=256, num_layers=2, num_heads=6, num_kv_heads=3,
                           head_dim=16)
QUICKSTART = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    written = config.load_experiment(str(QUICKSTART))
    run = dataclasses.replace(
        written, model=config.ModelSource(shape=SHAPE), steps=args.steps, warmup=config.WarmupConfig(),
        eval=config.EvalConfig(every=0), checkpoint=config.CheckpointConfig(every=0), rollout=dataclasses.replace(
            written.rollout, devices=1, staleness=args.staleness, precision=config.Precision()))
    inputs = train.read_inputs(run)
    update, sample = alone(run, inputs, args.steps)
    with tempfile.TemporaryDirectory() as workdir:
        train.train(run, pathlib.Path(workdir))
        loop = statistics.median(row["seconds"] for row in metrics.read(workdir)[2:])  # the first two hold compilation
    print(f"update alone {update:.3f} s, rollout alone {sample:.3f} s, a step of the loop {loop:.3f} s: "
          f"{loop / (update + sample):.2f} of the sum, {loop / max(update, sample):.2f} of the longer")


def alone(run: config.Config, inputs: train.Inputs, repeats: int) -> tuple[float, float]:
    """Median seconds of one update and of one rollout with its rewards and packing."""
    state = train._start(run, inputs, pathlib.Path(), lambda: False)
    update, engine = step.compile(run, inputs.model, inputs.mesh), train.make_engine(run, inputs)
    policy = sync.make(inputs.model, run.rollout.precision, inputs.decode_mesh)(*step.sampled_from(state))

    def sample(number):
        return train._collect(run, inputs, engine, lambda: False, policy, number)

    batches = [sample(number) for number in range(min(repeats, 8))]
    for collected in batches:  # every shape is compiled
        state, _ = update(state, collected.batch)

    def train_once(number):
        nonlocal state
        state, values = update(state, batches[number % len(batches)].batch)
        return values

    return median(train_once, repeats), median(sample, repeats)


def median(work: Callable[[int], Any], repeats: int) -> float:
    seconds = []
    for number in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(work(number))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
