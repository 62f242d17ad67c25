"""What carrying unfinished completions into the next step would save, and cost: `python -m
benchmarks.stragglers MODEL RUN...`.

Counts a schedule on lengths drawn from the `samples.jsonl` of runs, counted with the tokenizer of
the model folder: no model is run. A batch is 8 groups of 8 completions, and trains once 8 groups
are whole. With more than 8 groups open, the others go on after the update, and what the cache holds
of each completion under way is prefilled again, since the weights have changed.

  steps      decode steps a batch, of all slots, busy or idle
  idle       share of slot-steps without a sequence
  prefilled  tokens a batch: each prompt once a group, and what is computed again
  stale      share of the groups that hold tokens of older weights
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
from typing import NamedTuple

import numpy as np

from dcmdp_jax.tokens import tokenizer as tokenizers

GROUPS = 8  # of a batch
SAMPLES = 8  # of a group
BATCHES = 400


class Counts(NamedTuple):
    """Means over batches."""

    steps: float
    idle: float
    prefilled: float
    stale: float


class Group:
    """A prompt and its completions."""

    def __init__(self, lengths: np.ndarray, batch: int):
        self.lengths = lengths
        self.begun = batch  # the batch that was collected when it was opened
        self.unfinished = len(lengths)


class Sequence:
    """A completion in a slot."""

    def __init__(self, group: Group, length: int):
        self.group = group
        self.left = length
        self.sampled = 0


def count(lengths: np.ndarray, prompt: int, slots: int, open_groups: int) -> Counts:
    """Counts the schedule that fills each slot the moment it is idle.

    Args:
      lengths: completions are as long as these, drawn at random.
      prompt: tokens of a prompt.
      open_groups: prompts whose completions are under way together; `GROUPS`: nothing is carried.
    """
    rng = np.random.default_rng(0)
    groups: list[Group] = []
    waiting: collections.deque[Sequence] = collections.deque()
    running: list[Sequence] = []
    steps = 0
    busy = 0  # slot-steps that sampled a token
    prefilled = 0
    stale = 0
    for batch in range(BATCHES):
        prefilled += sum(prompt + sequence.sampled for sequence in running)
        while sum(group.unfinished == 0 for group in groups) < GROUPS:
            while len(groups) < open_groups:
                group = Group(rng.choice(lengths, SAMPLES), batch)
                groups.append(group)
                waiting += [Sequence(group, length) for length in group.lengths]
                prefilled += prompt
            while waiting and len(running) < slots:
                running.append(waiting.popleft())
            steps += 1
            busy += len(running)
            for sequence in running:
                sequence.sampled += 1
                sequence.left -= 1
                if not sequence.left:
                    sequence.group.unfinished -= 1
            running = [sequence for sequence in running if sequence.left]
        whole = [group for group in groups if group.unfinished == 0][:GROUPS]
        stale += sum(group.begun < batch for group in whole)
        groups = [group for group in groups if group not in whole]
    return Counts(
        steps / BATCHES,
        1 - busy / (steps * slots),
        prefilled / BATCHES,
        stale / (BATCHES * GROUPS),
    )


def read(model: str, runs: list[pathlib.Path]) -> tuple[np.ndarray, int]:
    """Returns the lengths of the runs' sampled completions, and the mean length of a prompt."""
    tokenizer = tokenizers.load(model, model)
    lines = [line for run in runs for line in (run / "samples.jsonl").read_text().splitlines()]
    samples = [sample for line in lines for sample in json.loads(line)["samples"]]
    lengths = [max(len(tokenizer.encode(sample["completion"])), 1) for sample in samples]
    prompts = [len(tokenizer.encode(sample["prompt"])) for sample in samples]
    return np.array(lengths), round(float(np.mean(prompts)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder whose tokenizer counts")
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="run folders")
    args = parser.parse_args()
    lengths, prompt = read(args.model, args.runs)
    print(
        f"{len(lengths)} completions, {lengths.mean():.1f} tokens in the mean, at most "
        f"{lengths.max()}; prompts of {prompt}"
    )
    print("slots  open groups  steps  idle  prefilled  stale")
    for slots in (64, 32, 16):
        for open_groups in (8, 10, 12, 16):
            found = count(lengths, prompt, slots, open_groups)
            print(
                f"{slots:5d}  {open_groups:11d}  {found.steps:5.1f}  {found.idle:4.0%}  "
                f"{found.prefilled:9.0f}  {found.stale:5.0%}"
            )


if __name__ == "__main__":
    main()
