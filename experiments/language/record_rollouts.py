"""What does `dcmdp doctor` find where an engine reports its log-probs before the temperature?

Records completions of SmolLM2-135M for colab/doctor.ipynb. The library's int8 engine draws them at
temperature 0.7, and the log-probs that are written are those of temperature 1: a mistake, made on
purpose. The trainer's log-probs are of temperature 0.7, as they should be.

Command:  bash experiments/language/get_smollm2.sh && python experiments/language/record_rollouts.py
Hardware: two CPU cores, 4 GiB of memory
Time:     1 minute of CPU time
Result:   colab/rollouts.jsonl, 64 completions; the doctor's verdict is "raw log-probs"
"""

import dataclasses
import json
import pathlib

import jax
from smollm2 import CONFIG as SMOLLM2

from dcmdp_jax.batches import make_sampler, sampling
from dcmdp_jax.rollout.replay import replay
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.tools import parity

FILE = pathlib.Path(__file__).parents[2] / "colab" / "rollouts.jsonl"

CONFIG = dataclasses.replace(
    SMOLLM2,
    name="record_rollouts",
    data=dataclasses.replace(SMOLLM2.data, prompts_per_step=16),
    rollout=dataclasses.replace(SMOLLM2.rollout, samples=4, temperature=0.7),
)


def record(config, file):
    """Writes a line for each completion of a batch, in the layout of docs/doctor.md."""
    inputs = read_inputs(config, jax.devices()[:1])
    policy = parity.starting(config, inputs)
    sampler = make_sampler(config, inputs)
    sampler.update_weights(policy.params, policy.version)
    rollout = parity.sample(sampler, config, inputs, seed=0)
    trainer_logp = parity.scorer(config, inputs)(policy.params, rollout, seed=0)
    at_one = rollout._replace(sampling=sampling(config.rollout)._replace(temperature=1.0))
    raw_logp = replay(sampler.engine, sampler.weights, at_one)  # the mistake
    lines = []
    for i, length in enumerate(rollout.lengths):
        prompt = i // config.rollout.samples
        prompt_length = rollout.prompts.lengths[prompt]
        row = {
            "prompt_ids": rollout.prompts.tokens[prompt, :prompt_length].tolist(),
            "token_ids": rollout.tokens[i, :length].tolist(),
            "logprobs": [round(x, 6) for x in raw_logp[i, :length].tolist()],
            "trainer_logprobs": [round(x, 6) for x in trainer_logp[i, :length].tolist()],
            "temperature": config.rollout.temperature,
        }
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    record(CONFIG, FILE)
