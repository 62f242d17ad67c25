"""What the host knows of a batch, as metrics: lengths, cut-off completions, rewards by source."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from dcmdp_jax.distributed import processes
from dcmdp_jax.records import Batch, Scored


def measure(scored: Scored, sources: Sequence[str]) -> dict[str, float]:
    """Returns the host-side metrics of a scored rollout of N completions.

    - `tokens`: tokens sampled, stop tokens included.
    - `truncated`: share of completions that the length limit cut off.
    - `completed_rewarded`: share of completions that ended by themselves and earned a positive
      reward.
    - `reward_spread`: standard deviation of the reward among the completions of one prompt, mean
      over prompts; 0 where no prompt has both better and worse completions, and group-relative
      advantages are 0.
    - `verifier_failed`: share of completions that the verifier gave no reward, if it has a time
      limit.
    - `reward/SOURCE`: mean reward of the prompts of each source that has a name.

    Args:
        sources: [B], where each prompt comes from (`Example.source`); completion i answers prompt i
            // (N / B).
    """
    rollout = scored.rollout
    reward = scored.reward.reshape(len(sources), -1)
    metrics = {
        "tokens": int(rollout.lengths.sum()),
        "truncated": float(np.mean(~rollout.stopped)),
        "completed_rewarded": float(np.mean(rollout.stopped & (scored.reward > 0))),
        "reward_spread": float(np.mean(np.std(reward, axis=1))),
    }
    if scored.failed is not None:
        metrics["verifier_failed"] = float(np.mean(scored.failed))
    for source in sorted(set(sources) - {""}):
        rows = [i for i, name in enumerate(sources) if name == source]
        metrics[f"reward/{source}"] = float(np.mean(reward[rows]))
    return metrics


def measure_rows(scored: Scored, batch: Batch) -> dict[str, float]:
    """Returns the host-side metrics of the packed rows of a scored rollout.

    - `row_fill`: share of the rows' places that hold a token; the rest is computed for nothing.
    - `prompt_saving`: share of the tokens of all prompts and completions, with a prompt for each,
      that is not computed because completions share their prompt.
    - `rows`: R, of a microbatch. The step is compiled once for each number.
    """
    rollout = scored.rollout
    samples = len(rollout.lengths) // len(rollout.prompts.lengths)
    separate = int(samples * rollout.prompts.lengths.sum() + rollout.lengths.sum())
    packed = np.count_nonzero(batch.segment_ids)
    return {
        "row_fill": packed / batch.segment_ids.size,
        "prompt_saving": 1 - packed / separate,
        "rows": batch.segment_ids.shape[-2],
    }


def gather_sources(sources: Sequence[str]) -> list[str]:
    """Returns the sources of all processes' prompts, in the order of processes; all must call."""
    encoded = encode(sources)
    longest = int(processes.gather(np.array([len(encoded)])).max())
    padded = np.frombuffer(encoded.ljust(longest), np.uint8)
    rows = processes.gather(padded[None])
    return [source for row in rows for source in json.loads(bytes(row))]


def encode(sources: Sequence[str]) -> bytes:
    """Returns the bytes in which a process sends its sources; spaces may follow them."""
    return json.dumps(list(sources)).encode()
