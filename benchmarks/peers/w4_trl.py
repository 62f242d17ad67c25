"""Workload W4 with TRL, eight completions at a time: its scoring (T1), its GRPOTrainer's loss with
accumulated gradients (T2), and that behind `generate` of transformers (T5, `rl_step.py`). All 64 at
once take more than 12 GB.
"""
# ruff: noqa: I001 (rl_step puts the harness's folder on the path, before its modules are imported)

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import rl_step
import numpy as np
import run_torch
import torch
import transformers

MICROBATCH = 8


class Score(run_torch.Score):
    """T1."""

    @torch.no_grad()
    def step(self) -> dict[str, np.ndarray]:
        """Scores all; returns the log-probs."""
        parts = [
            self.tr._get_per_token_logps_and_entropies(self.model, ids, attends, self.C)[0]
            for ids, attends in zip(
                self.ids.split(MICROBATCH), self.am.split(MICROBATCH), strict=True
            )
        ]
        return {"logps": torch.cat(parts).float().numpy()}


class Update(run_torch.Train):
    """T2."""

    def __init__(self, ctx: Any):
        super().__init__(ctx)
        self.parts = ctx.w["batch"] // MICROBATCH
        self.tr.current_gradient_accumulation_steps = self.parts

    def step(self) -> dict[str, float]:
        """Makes one update; returns loss and gradient norm."""
        total = 0.0
        for part in range(self.parts):
            rows = slice(part * MICROBATCH, (part + 1) * MICROBATCH)
            micro = {
                name: value[rows] if value is not None and value.ndim else value
                for name, value in self.b.items()
            }
            loss = self.tr._compute_loss(self.model, micro)
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        for values in self.tr._metrics.values():
            values.clear()
        return {"loss": total, "grad_norm": float(norm)}


class Step(Update):
    """T5: the model that trains, which samples too."""

    def __init__(self, ctx: Any):
        super().__init__(ctx)
        self.batch = ctx.batch
        self.samples = ctx.w["samples"]
        self.config = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=self.batch["mask"].shape[1],
        )

    def step(self) -> dict[str, float]:
        """Makes one step; returns loss and gradient norm."""
        prompt = self.b["prompt_ids"]
        self.model.eval()
        with torch.no_grad():
            rows = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=self.config
            )
        self.model.train()
        mask = self.batch["mask"]
        tokens = rows[:, prompt.shape[1] :].numpy() * mask
        advantage = rl_step.advantage(rl_step.reward(tokens, mask), self.samples)
        self.b = self.b | {
            "completion_ids": torch.as_tensor(tokens, dtype=torch.long),
            "advantages": torch.as_tensor(advantage),
            "old_per_token_logps": None,
        }
        return super().step()


TASKS = {"T1": Score, "T2": Update, "T5": Step}


def make(ctx: Any) -> Any:
    ctx.variant = "eager"
    return TASKS[ctx.task](ctx)


if __name__ == "__main__":
    versions = {"trl": importlib.metadata.version("trl")}
    rl_step.main("trl", make, lambda: versions)
    os._exit(0)  # torch's threads outlive the run
