"""What scoring and the constrained step cost: `python -m benchmarks.step`.

16 completions of 64 + 192 tokens, in rows of 256 to 4,096 tokens and in 1 to 8 accumulated
microbatches, of a small dense and a small Mixture-of-Experts model. All cells of a table run in
turn, one of each a round. Printed are, for scoring and for the whole step, process CPU seconds
where the device is a CPU (wall seconds elsewhere), useful GFLOP/s (real tokens, causal attention
within segments, a head where a log-prob is needed; a step is three passes), the time of a token
beside the first line's, and what the compiled step holds at its peak. A third table has the step
in one pass beside the plain form, which scores the batch first, with FLOPs and bytes accessed by
XLA's count (loops counted once). The last has eight prompts of 256 tokens with eight completions of
16 to 64 each, in rows of 640 tokens: with a prompt for each completion, and with shared prompts.

    taskset -c 0 python -m benchmarks.step
    python -m benchmarks.step --shape 0.6B --bfloat16 --repeats 3
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial

import jax
import numpy as np

from benchmarks.measure import SHAPES, SMALL, make_prompts, measure
from dcmdp_jax import compiled_step, constraint, sharding, train_state
from dcmdp_jax.config import (
    AlgorithmConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    ModelSource,
    RolloutConfig,
)
from dcmdp_jax.losses import corrections, policy, reduce
from dcmdp_jax.models import decoder, scoring
from dcmdp_jax.models.model_config import Compute, ModelConfig
from dcmdp_jax.records import Rollout, Sampling, Scored, TrainState
from dcmdp_jax.tokens import packing

COUNT = 16
PROMPT = 64
NEW = 192
MOE = dataclasses.replace(SMALL, num_experts=16, experts_per_token=4, expert_size=192)
ROWS = (256, 512, 1024, 2048, 4096)
MICROBATCHES = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "moe"], nargs="+", default=["small", "moe"])
    parser.add_argument(
        "--bfloat16", action="store_true", help="operands of products; parameters stay float32"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for name in args.shape:
        model = dataclasses.replace(
            (SHAPES | {"moe": MOE})[name], compute=Compute(bfloat16=args.bfloat16)
        )
        table(name, model, [(length, 1) for length in ROWS], args.repeats)
        table(name, model, [(512, count) for count in MICROBATCHES], args.repeats)
        compare_forms(name, model, args.repeats)
        compare_prompts(name, model, args.repeats)


def table(name: str, model: ModelConfig, cells: list[tuple[int, int]], repeats: int) -> None:
    """A line for each (row length, microbatches)."""
    tasks = [Task(model, *cell) for cell in cells]
    seconds = measure(
        [program for task in tasks for program in (task.score, task.update)], repeats
    ).reshape(-1, 2)
    useful = flops(model) / 1e9
    for (length, microbatches), task, (score, update) in zip(cells, tasks, seconds, strict=True):
        print(
            f"{name:6} rows of {length:4}, {microbatches} microbatches: "
            f"score {score:6.3f} s {useful / score:6.1f} GF/s {score / seconds[0, 0]:.2f}x   "
            f"step {update:6.3f} s {3 * useful / update:6.1f} GF/s {update / seconds[0, 1]:.2f}x   "
            f"state {task.held[0] / 1e6:.0f} MB + {task.held[1] / 1e6:.0f} MB",
            flush=True,
        )


def compare_forms(name: str, model: ModelConfig, repeats: int) -> None:
    """A line for the step in one pass and one for the plain form, in 1 and 4 microbatches."""
    cells = [(count, plain) for count in (1, 4) for plain in (False, True)]
    tasks = [Task(model, 512, count, plain) for count, plain in cells]
    seconds = measure([task.update for task in tasks], repeats)
    for (count, plain), task, update in zip(cells, tasks, seconds, strict=True):
        cost = task.compiled.cost_analysis()
        form = "plain" if plain else "one pass"
        print(
            f"{name:6} {count} microbatches, {form:8}: step {update:6.3f} s "
            f"{update / seconds[0]:.2f}x   {cost['flops'] / 1e9:.2f} GFLOP "
            f"{cost['bytes accessed'] / 1e9:.3f} GB   "
            f"state {task.held[0] / 1e6:.0f} MB + {task.held[1] / 1e6:.0f} MB",
            flush=True,
        )


def compare_prompts(name: str, model: ModelConfig, repeats: int) -> None:
    """A line for a prompt for each completion, and one for shared prompts."""
    tasks = [Task(model, 640, 1, scored=groups(), share_prompts=share) for share in (False, True)]
    seconds = measure(
        [program for task in tasks for program in (task.score, task.update)], repeats
    ).reshape(-1, 2)
    for form, task, (score, update) in zip(("own", "shared"), tasks, seconds, strict=True):
        print(
            f"{name:6} {form:6} prompts: {task.batch.tokens.size:6,} places in rows   "
            f"score {score:6.3f} s {score / seconds[0, 0]:.2f}x   "
            f"step {update:6.3f} s {update / seconds[0, 1]:.2f}x   "
            f"state {task.held[0] / 1e6:.0f} MB + {task.held[1] / 1e6:.0f} MB",
            flush=True,
        )


class Task:
    """The completions packed, with a state of their own."""

    def __init__(
        self,
        model: ModelConfig,
        row_length: int,
        microbatches: int,
        plain: bool = False,
        scored: Scored | None = None,
        share_prompts: bool = False,
    ):
        """Compiles the step; `scored` is by default `completions()`."""
        scored = completions() if scored is None else scored
        config = experiment(
            model,
            scored.rollout,
            microbatches=microbatches,
            row_length=row_length,
            share_prompts=share_prompts,
        )
        mesh = sharding.single_device_mesh()
        self.batch = jax.device_put(
            packing.pack(
                scored,
                minibatches=1,
                microbatches=microbatches,
                row_length=row_length,
                share_prompts=config.shares_prompts,
            )
        )
        params = jax.jit(partial(decoder.init, config=model))(jax.random.key(0))
        start = jax.jit(
            partial(train_state.init, config),
            out_shardings=train_state.shardings(config, model, mesh),
            donate_argnums=0,
        )
        self.state: TrainState = start(params)
        update = compiled_step.compile_step(config, model, mesh, plain=plain)
        self.compiled = update.lower(self.state, self.batch).compile()
        memory = self.compiled.memory_analysis()
        self.held = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.peak = sum(self.held) + results  # as `dcmdp plan` has it
        self.logp = jax.jit(
            lambda params, batch: jax.lax.map(
                lambda micro: scoring.packed_logp(
                    params,
                    micro.tokens,
                    micro.positions,
                    micro.segment_ids,
                    micro.index,
                    model,
                    1.0,
                    prefix_ids=micro.prefix_ids,
                )[0],
                batch,
            )
        )

    def score(self) -> None:
        """Scores the completions and waits."""
        jax.block_until_ready(
            self.logp(self.state.params, jax.tree.map(lambda x: x[0], self.batch))
        )

    def update(self) -> None:
        """Makes one constrained step and waits."""
        self.state, _ = jax.block_until_ready(self.compiled(self.state, self.batch))


def completions(count: int = COUNT, prompt: int = PROMPT, new: int = NEW) -> Scored:
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 4000, (count, new)).astype(np.int32)
    made = dict.fromkeys(Rollout._fields) | {
        "prompts": make_prompts(np.full(count, prompt)),
        "tokens": tokens,
        "lengths": np.full(count, new, np.int32),
        "stopped": np.ones(count, bool),
        "rollout_logp": np.full((count, new), -8.3, np.float32),
        "sampling": Sampling(),
    }
    return Scored(Rollout(**made), rng.normal(size=count).astype(np.float32))


def groups() -> Scored:
    """Returns eight completions of 16 to 64 tokens for each of eight prompts of 256."""
    scored = completions(64, 256, 64)
    lengths = np.random.default_rng(0).integers(16, 65, 64).astype(np.int32)
    prompts = make_prompts(np.full(8, 256))
    return scored._replace(rollout=scored.rollout._replace(prompts=prompts, lengths=lengths))


def experiment(model: ModelConfig, rollout: Rollout, **algorithm) -> Config:
    count, new = rollout.tokens.shape
    prompts, prompt = rollout.prompts.tokens.shape
    return Config(
        name="step",
        model=ModelSource(
            architecture=dataclasses.replace(model, compute=Compute()), compute=model.compute
        ),
        steps=1,
        data=DataConfig(
            path="-",
            verifier=lambda example, text: 0.0,
            prompts_per_step=prompts,
            max_prompt_tokens=prompt,
        ),
        rollout=RolloutConfig(samples=count // prompts, max_tokens=new),
        algorithm=AlgorithmConfig(
            advantage=lambda reward, group, num_groups: reward,
            reduce=reduce.token_mean,
            surrogate=corrections.decoupled(policy.clipped),
            **algorithm,
        ),
        constraint=ConstraintConfig(
            constraint.shape_advantage, constraint.projected_ascent, tolerance=0.01
        ),
    )


def flops(model: ModelConfig) -> float:
    """Of one useful forward pass: two for each multiplication of real tokens."""
    heads = model.num_heads * model.head_dim
    attention = 2 * model.hidden_size * (heads + model.num_kv_heads * model.head_dim)
    dense, sparse = (
        3 * model.hidden_size * size
        for size in (
            model.intermediate_size,
            (model.expert_size or 0) * (model.experts_per_token or 0),
        )
    )
    layers = sum(
        attention + (sparse if model.is_sparse(i) else dense) for i in range(model.num_layers)
    )
    length = PROMPT + NEW
    pairs = model.num_layers * 2 * heads * length * (length + 1) / 2
    return 2.0 * COUNT * (length * layers + pairs + NEW * model.hidden_size * model.vocab_size)


if __name__ == "__main__":
    main()
