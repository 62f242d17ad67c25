"""Seeds: everything that is drawn at random has a stream of its own, named here."""

from __future__ import annotations

import enum

import numpy as np


class Stream(enum.IntEnum):
    """What a seed is for. The values are part of every seed: changing one changes the draws."""

    PARAMETERS = 0  # weights filled at random
    PROMPTS = 1  # the order of problems, or the problems themselves where a task generates them
    WARMUP_PROBLEMS = 2  # of warm-up step `number`
    WARMUP_SOLUTIONS = 3
    ROLLOUT = 4  # completions of constrained step `number`, and how they are packed
    CALIBRATION = 5  # the same for batch `number` that measures the tolerance
    HELD_OUT = 6  # completions of the held-out problems
    PARITY = 7  # batches that `dcmdp parity` and `dcmdp diagnose` sample
    TRAINABLE = 8  # what `ModelSource.trainable` draws
    PAIRS = 9  # the order of the pairs that a warm-up learns, in epoch `number`
    REFILL = 10  # completions of round r of constrained step n: `number` is n * REFILLS + r


REFILLS = 1 << 10  # more than the rounds of a step


def seed(config_seed: int, stream: Stream, number: int = 0) -> int:
    """Returns seed `number` of a stream, in 0..2^32-1; seeds of different streams are independent.

    Args:
        config_seed: `Config.seed`, in 0..2^32-1.
        number: which batch, step or set of the stream, from 0.
    """
    sequence = np.random.SeedSequence(config_seed, spawn_key=(stream, number))
    return int(sequence.generate_state(1, np.uint32)[0])
