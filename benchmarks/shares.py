"""What one queue of prompts for all hosts would save in sampling, over a fixed share of the prompts
for each: `python -m benchmarks.shares`, or `python -m benchmarks.shares MODEL RUN...`.

Counts decode steps on drawn lengths; no model is run. A batch has 64 prompts with 8 completions
each. An engine starts its completions in order, one whenever a slot is free, and the batch waits
for the last engine. Handing over costs nothing here, so that what is saved is the most there can
be.

Lengths are drawn evenly from 1 to 8,192, or from a heavy tail: log-normal with median 3,000, cut at
8,192 (a tenth), with half of the variance between prompts. With MODEL and RUN folders they are
drawn from what the runs sampled, as in `benchmarks.stragglers`.

  own     decode steps of a batch if each host samples an equal part of the prompts
  queue   the same if a host takes the next completion of all
  saved   1 - queue / own
  whole   decode steps that no order of starting can go below: the longest completion, or all tokens
          over all slots
"""

from __future__ import annotations

import argparse
import heapq
import pathlib
from collections.abc import Callable

import numpy as np

from benchmarks import stragglers

PROMPTS = 64
SAMPLES = 8
LONGEST = 8192
MEDIAN = 3000
SPREAD = 0.8  # standard deviation of the logarithm
BATCHES = 200
HOSTS = (8, 16)
SHARE_OF_SLOTS = (1, 2, 4)  # completions of a host for each of its slots

Draw = Callable[[np.random.Generator], np.ndarray]


def evenly(rng: np.random.Generator) -> np.ndarray:
    """Returns lengths [prompts, samples]."""
    return rng.integers(1, LONGEST + 1, (PROMPTS, SAMPLES))


def heavy_tail(rng: np.random.Generator) -> np.ndarray:
    """Returns lengths [prompts, samples]."""
    of_prompt = rng.normal(size=(PROMPTS, 1))
    spread = SPREAD * (of_prompt + rng.normal(size=(PROMPTS, SAMPLES))) / 2**0.5
    return np.clip(MEDIAN * np.exp(spread), 1, LONGEST).astype(int)


def steps(lengths: np.ndarray, slots: int) -> int:
    """Returns the decode steps of completions that are started in order, each in the slot that is
    free first.
    """
    free = [0] * slots  # the step at which each slot is free
    for length in lengths.flat:
        heapq.heapreplace(free, free[0] + int(length))
    return max(free)


def count(draw: Draw, hosts: int, slots: int) -> tuple[float, float, float]:
    """Returns the mean decode steps of a batch: of shares, of one queue, and the bound."""
    rng = np.random.default_rng(0)
    totals = np.zeros(3)
    for _ in range(BATCHES):
        lengths = draw(rng)
        own = max(steps(part, slots) for part in np.split(lengths, hosts))
        whole = max(lengths.max(), -(-lengths.sum() // (hosts * slots)))
        totals += own, steps(lengths, hosts * slots), whole
    return tuple(totals / BATCHES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder whose tokenizer counts")
    parser.add_argument("runs", nargs="*", type=pathlib.Path, help="run folders")
    args = parser.parse_args()
    draws: dict[str, Draw] = {"heavy tail": heavy_tail, "even": evenly}
    if args.runs:
        recorded, _ = stragglers.read(args.model, args.runs)
        draws = {"recorded": lambda rng: rng.choice(recorded, (PROMPTS, SAMPLES))}
    print("| lengths | hosts | slots of each | own | queue | saved | whole |")
    print("|---|---|---|---|---|---|---|")
    for name, draw in draws.items():
        for hosts in HOSTS:
            for share in SHARE_OF_SLOTS:
                slots = PROMPTS * SAMPLES // (hosts * share)
                own, queue, whole = count(draw, hosts, slots)
                print(
                    f"| {name} | {hosts} | {slots} | {own:,.0f} | {queue:,.0f} | "
                    f"{1 - queue / own:.0%} | {whole:,.0f} |"
                )


if __name__ == "__main__":
    main()
