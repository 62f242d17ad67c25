"""Task T5 of the peer harness, a whole step of reinforcement learning, for all its runners.

Sample 8 completions of each prompt of workload W4, of given lengths; reward a completion by its
share of even token ids; standardise the rewards of a group; make one update, with a scoring pass of
its own only where the program makes one when a batch has one update; give the weights back to the
sampler. Nothing is compared with float64: tokens and weights differ between programs from the first
step on. T1 and T2 compare the log-probs and the loss. The peers take no limit for each request:
they sample to the longest length, and what is longer than given is dropped.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

PEERS = pathlib.Path(os.environ["PEERS"]).resolve()
sys.path.insert(0, str(PEERS))

import common  # noqa: E402 (lies in the harness's folder)
import harness  # noqa: E402


def reward(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the share of even ids in each completion, [N]."""
    return ((tokens % 2 == 0) * mask).sum(axis=1) / mask.sum(axis=1)


def advantage(rewards: np.ndarray, samples: int) -> np.ndarray:
    """Returns the rewards [N], standardised over each group."""
    group = rewards.reshape(-1, samples)
    centered = group - group.mean(axis=1, keepdims=True)
    return (centered / (group.std(axis=1, keepdims=True) + 1e-4)).reshape(-1).astype(np.float32)


def main(peer: str, make_task: Callable[[Any], Any], versions: Callable[[], dict]) -> None:
    """`harness.main`, with the sizes of T5 and without a comparison with float64."""
    work = common.work
    common.work = lambda w, task: work(w, "T2" if task == "T5" else task)
    digest = harness.digest
    harness.digest = lambda ctx, *rest: {} if ctx.task == "T5" else digest(ctx, *rest)
    harness.main(peer, make_task, versions, variants=("default", "int8", "step"))
