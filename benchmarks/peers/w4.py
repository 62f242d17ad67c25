"""Adds workload W4 to the peer harness: `PEERS=FOLDER python benchmarks/peers/w4.py`.

W4 is the shape of group-based reinforcement learning: Qwen3-0.6B's width with 4 layers and 32,768
tokens of vocabulary, 8 prompts of 256 tokens, and 8 completions of 16 to 64 tokens for each. It is
written to `workloads.json`, and its batch with the log-probs of float64 to `data/W4.npz`, as the
harness has its own. T1 and T2 are the harness's; of T5, `rl_step.py` tells.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
import sys
import zlib

import numpy as np

PEERS = pathlib.Path(os.environ["PEERS"]).resolve()
sys.path.insert(0, str(PEERS))

import common  # noqa: E402 (lies in the harness's folder)

NAME = "W4"
PROMPTS = 8
SAMPLES = 8
PROMPT_LENGTH = 256
SHORTEST = 16
LONGEST = 64
NOISE = 0.15  # of the old log-probs, as in the harness's workloads


def main() -> None:
    file = PEERS / "workloads.json"
    workloads = json.loads(file.read_text())
    workloads[NAME] = workload(workloads["W2"])
    file.write_text(json.dumps(workloads, indent=1))
    np.savez(PEERS / "data" / f"{NAME}.npz", **batch(workloads[NAME]))


def workload(like: dict) -> dict:
    """Returns W4, with the losses and the widths of workload `like`."""
    w = copy.deepcopy(like)
    lengths = np.random.default_rng(104).integers(SHORTEST, LONGEST + 1, PROMPTS * SAMPLES).tolist()
    w |= {
        "name": "groups",
        "seed": 104,
        "token_seed": 1104,
        "batch": PROMPTS * SAMPLES,
        "samples": SAMPLES,
        "prompt_len": PROMPT_LENGTH,
        "completion_len": LONGEST,
        "completion_lens": lengths,
    }
    w["hf_config"]["vocab_size"] = 32768
    del w["T3"], w["T4"]
    return w


def batch(w: dict) -> dict[str, np.ndarray]:
    """Returns what `common.load_batch` returns, with one prompt for each group."""
    prompt, completion, mask = common.make_tokens(w)
    prompt = np.repeat(prompt[::SAMPLES], SAMPLES, axis=0)
    tokens = np.concatenate([prompt, completion], axis=1)
    logp = common.ref_logps(w, common.make_weights(w), tokens, PROMPT_LENGTH)
    rng = np.random.default_rng(w["token_seed"])
    old_logp = (logp + NOISE * rng.standard_normal(logp.shape)).astype(np.float32)
    advantage = rng.standard_normal(len(logp))
    advantage = ((advantage - advantage.mean()) / advantage.std()).astype(np.float32)
    ratio = np.exp(logp - old_logp)
    clipped = np.clip(ratio, 1 - w["train"]["eps_low"], 1 + w["train"]["eps_high"])
    loss = -np.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    return {
        "sig": np.int64(zlib.crc32(json.dumps(w, sort_keys=True).encode())),
        "prompt": prompt,
        "completion": completion,
        "mask": mask,
        "ref_logps": logp,
        "old_logps": old_logp,
        "advantages": advantage,
        "ref_loss": np.float64(((loss * mask).sum(axis=1) / mask.sum(axis=1)).mean()),
    }


if __name__ == "__main__":
    main()
