"""Is the shorter of the two stages hidden? `taskset -c 0,1 python -m benchmarks.overlap`

Two simulated CPU devices: one trains, one samples with weights that are a step old. Prints the wall
seconds (medians of alternating runs) of an update alone, of a rollout with its rewards and packing
alone, and of both in the order of the training loop. The devices share the cores, and XLA lets a
stage that is alone use more than one. So both together are also compared with what the CPU seconds
of the two stages take on all cores, which is the least that they can take.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
)

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dcmdp_jax import compiled_step, config
from dcmdp_jax.batches import Batches
from dcmdp_jax.experiment import load_experiment
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.run import starting
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.seeds import Stream

ARCHITECTURE = ModelConfig(
    vocab_size=18,
    hidden_size=96,
    intermediate_size=256,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
)
QUICKSTART = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--slots", type=int, default=2, help="fewer make a rollout longer")
    args = parser.parse_args()
    written = load_experiment(str(QUICKSTART))
    run = dataclasses.replace(
        written,
        model=config.ModelSource(architecture=ARCHITECTURE),
        steps=2 * args.repeats,
        warmup=config.WarmupConfig(),
        eval=config.EvalConfig(every=0),
        algorithm=dataclasses.replace(written.algorithm, minibatches=1),
        rollout=dataclasses.replace(
            written.rollout, slots=args.slots, devices=1, staleness=1, precision=config.Precision()
        ),
    )
    (update, sample, both), cpu = np.median(seconds(run, args.repeats), axis=0).T
    cores = len(os.sched_getaffinity(0))
    least = max(sum(cpu[:2]) / cores, update, sample)
    print(
        f"update alone {update:.3f} s ({cpu[0]:.3f} CPU s), "
        f"rollout alone {sample:.3f} s ({cpu[1]:.3f}), both {both:.3f} s ({cpu[2]:.3f}): "
        f"{both / (update + sample):.2f} of the sum, {both / least:.2f} of the {least:.3f} s that "
        f"{cores} cores need for it"
    )


def seconds(run: config.Config, repeats: int) -> list[list[tuple[float, float]]]:
    """[repeats, 3, 2]: update, rollout, both; wall and CPU seconds."""
    inputs = read_inputs(run)
    state = starting.first_state(run, inputs, pathlib.Path(), lambda: False)
    update = compiled_step.compile_step(run, inputs.model_config, inputs.mesh)
    batches = Batches(run, inputs, state, lambda: False)
    packed = batches.collect(Stream.ROLLOUT, 0).packed

    def train_once():
        nonlocal state
        state, values = update(state, packed)
        return values

    def sample():
        return batches.collect(Stream.ROLLOUT, 0).packed

    def sample_while_training():
        batches.before_update(state)
        return train_once(), sample()

    found = []
    for _ in range(3):  # compiles
        sample_while_training()
    for _ in range(repeats):
        found.append([timed(train_once), timed(sample), timed(sample_while_training)])
    return found


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    started = time.perf_counter()
    spent = time.process_time()
    jax.block_until_ready(work())
    return time.perf_counter() - started, time.process_time() - spent


if __name__ == "__main__":
    main()
