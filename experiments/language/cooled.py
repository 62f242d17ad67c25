"""Does the gap change with the policy's entropy alone?

The engine of nf4.py samples from the published weights, which nothing has trained here, at lower
and lower temperatures. If delta at an entropy is that of the runs of nf4.py at the same entropy,
the gap grows and falls in training because the policy gets surer, and not because of what it
learns. Fixed before the first run: the comparison is mean delta between the same edges of entropy,
which nf4_summary.py tabulates.

Command:  bash experiments/language/get_smollm2.sh && python experiments/language/cooled.py
Hardware: two CPU cores, 4 GiB of memory
Time:     11 minutes; 25 beside two other jobs
Result:   entropy 2.6, 1.5, 1.1, 0.5, 0.3, 0.2 nats: delta 0.07, 0.10, 0.11, 0.14, 0.18, 0.17. Down
          to one nat as in training; below it GRPO's delta falls
"""

import csv
import dataclasses
import pathlib
from functools import partial

import jax
import numpy as np
from nf4 import arm

from dcmdp_jax import trainer_scores
from dcmdp_jax.batches import make_sampler
from dcmdp_jax.records import Scored
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.tokens import packing
from dcmdp_jax.tools import parity

CSV = pathlib.Path(__file__).parent / "results" / "cooled.csv"
TEMPERATURES = (1.0, 0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25)
BATCHES = 4  # a temperature, 64 completions each


def measure(config, inputs, weights, sampler, score, seed: int) -> tuple[float, float]:
    """Returns mean entropy of the trainer's policy and mean delta over the tokens of a batch."""
    rollout = parity.sample(sampler, config, inputs, seed)
    batch = packing.pack(
        Scored(rollout, np.zeros(len(rollout.tokens), np.float32)),
        minibatches=config.algorithm.minibatches,
        microbatches=config.algorithm.microbatches,
        row_length=config.row_length,
        row_divisor=1,
        pad_id=inputs.tokenizer.pad_id,
        seed=seed,
    )
    logp, entropy = score(weights.params, batch)
    delta = np.abs(np.exp(logp) - np.exp(batch.rollout_logp))
    return float(entropy[batch.mask].mean()), float(delta[batch.mask].mean())


def read() -> list[dict[str, float]]:
    """Returns the batches that were measured."""
    with CSV.open() as lines:
        return [
            {name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)
        ]


if __name__ == "__main__":
    config = arm()
    inputs = read_inputs(config, jax.devices()[:1])
    weights = parity.starting(config, inputs)
    sampler = make_sampler(config, inputs)
    sampler.update_weights(weights.params, weights.version)
    rows = [("temperature", "batch", "entropy", "delta_mean")]
    for temperature in TEMPERATURES:
        rollout = dataclasses.replace(config.rollout, temperature=temperature)
        at = dataclasses.replace(config, rollout=rollout)
        score = jax.jit(partial(trainer_scores.score, config=at, model=inputs.model_config))
        for batch in range(BATCHES):
            entropy, delta = measure(at, inputs, weights, sampler, score, seed=batch)
            rows.append((temperature, batch, f"{entropy:.6g}", f"{delta:.6g}"))
            print(*rows[-1], flush=True)
    with CSV.open("w") as out:
        csv.writer(out, lineterminator="\n").writerows(rows)
