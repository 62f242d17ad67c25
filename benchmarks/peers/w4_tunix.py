"""Workload W4 with Tunix, eight completions at a time: its scoring (T1), its GRPO loss in its
trainer's compiled step with accumulated gradients (T2), and that behind its sampler (T5,
`rl_step.py`). All 64 at once take more than 24 GB.
"""
# ruff: noqa: I001 (rl_step puts the harness's folder on the path, before its modules are imported)

from __future__ import annotations

import importlib.metadata
from functools import partial
from typing import Any

import rl_step
import jax
import jax.numpy as jnp
import numpy as np
import run_tunix
from flax import nnx
from tunix.generate import sampler
from tunix.rl import common

MICROBATCH = 8


class Score(run_tunix.Score):
    """T1."""

    def step(self) -> dict[str, np.ndarray]:
        """Scores all; returns the log-probs."""
        parts = [
            common.compute_per_token_logps(
                self.gd,
                self.state,
                prompt_tokens=self.p[start : start + MICROBATCH],
                completion_tokens=self.c[start : start + MICROBATCH],
                pad_id=0,
                eos_id=1,
                stop_gradient=True,
            )
            for start in range(0, len(self.p), MICROBATCH)
        ]
        return {"logps": np.concatenate([np.asarray(part) for part in parts])}


class Update(run_tunix.Train):
    """T2."""

    def __init__(self, ctx: Any):
        run_tunix.TrainingConfig = partial(
            run_tunix.TrainingConfig, gradient_accumulation_steps=ctx.w["batch"] // MICROBATCH
        )
        super().__init__(ctx)

    def step(self) -> dict[str, Any]:
        """Makes one update; returns the loss. The trainer has gradient norms of parts alone."""
        losses = []
        for start in range(0, len(self.ex.prompt_ids), MICROBATCH):
            part = jax.tree.map(lambda x: x[start : start + MICROBATCH], self.ex)  # noqa: B023
            loss, _, _ = self.fn(part)
            losses.append(loss)
        jax.block_until_ready((nnx.state(self.model), nnx.state(self.tr.optimizer)))
        return {"loss": float(np.mean(losses)), "grad_norm": None}


class Step(Update):
    """T5: the model that trains, and a sampler that is given its parameters after each update."""

    def __init__(self, ctx: Any):
        super().__init__(ctx)
        self.batch = ctx.batch
        self.samples = ctx.w["samples"]
        self.prompt_length = self.batch["prompt"].shape[1]
        self.longest = self.batch["mask"].shape[1]
        config = run_tunix.config(ctx.w, jnp.float32)
        self.sampler = sampler.Sampler(
            self.model,
            run_tunix.Tok(self.batch["prompt"]),
            sampler.CacheConfig(
                cache_size=self.prompt_length + self.longest,
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            ),
        )
        self.seed = 0

    def step(self) -> dict[str, Any]:
        """Makes one step; returns the loss."""
        self.seed += 1
        out = self.sampler(
            [str(number) for number in range(len(self.batch["prompt"]))],
            max_generation_steps=self.longest,
            max_prompt_length=self.prompt_length,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            seed=self.seed,
            eos_tokens=[-1],
            return_logprobs=True,
        )
        mask = self.batch["mask"]
        tokens = np.stack([np.asarray(row)[: self.longest] for row in out.tokens]) * mask
        advantage = rl_step.advantage(rl_step.reward(tokens, mask), self.samples)
        self.ex = self.ex.replace(
            completion_ids=jnp.asarray(tokens),
            advantages=jnp.asarray(advantage),
            old_per_token_logps=None,
        )
        result = super().step()
        self.sampler.transformer_state = nnx.variables(self.model)
        return result


TASKS = {"T1": Score, "T2": Update, "T5": Step}

if __name__ == "__main__":
    versions = {"google-tunix": importlib.metadata.version("google-tunix")}
    rl_step.main("tunix", lambda ctx: TASKS[ctx.task](ctx), lambda: versions)
