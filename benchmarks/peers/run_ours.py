"""This package in the peer harness: the weights, tokens and work of Tunix, TRL and llama.cpp, in
one interleaved run.

The harness (`ab.py`, `harness.py`, `common.py`, `workloads.json`, the peers' runners and
environments) lies in the folder that the environment variable PEERS names; default
`../shared/peers` beside the repository. Alone, or beside the peers (from that folder, with the full
paths of the interpreter and of this file):

    python benchmarks/peers/run_ours.py --workload W1 --task T3
    python3 ab.py --workload W1 --task T3 --rounds 5 --cpu 1 tunix torch llama
    ours=/PATH/python:/PATH/run_ours.py

T1 scores completions with the trainer's packed forward pass. T2 is one update, as in `step`:
forward, backward, gradient norm, AdamW. T3 and T4 are rollouts as training makes them, through the
JetStream engine. T4's lengths are each request's `max_tokens`, which the engine compares with the
number of tokens it has made. T5 is a whole step (`rl_step.py`), constrained, on workload W4, which
`w4.py` adds to the harness.

Variants: int8 (T3, T4) gives the engine int8 projections; step (T2) runs the full constrained step,
with its advantages, shaping, metrics and dual.
"""
# ruff: noqa: E402, I001 (rl_step puts the harness's folder on the path, for the modules in it)

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PEERS = pathlib.Path(os.environ.get("PEERS", REPOSITORY.parent / "shared" / "peers")).resolve()
if not (PEERS / "harness.py").is_file():
    raise SystemExit(f"{PEERS} holds no harness.py; set PEERS to the folder of the peer harness")
os.environ["PEERS"] = str(PEERS)

import rl_step
import common
import jax
import jaxlib
import numpy as np
from safetensors.numpy import save_file

from dcmdp_jax import compiled_step, constraint, objective, sharding, step, sync, train_state
from dcmdp_jax.config import (
    AlgorithmConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    ModelSource,
    Precision,
    RolloutConfig,
)
from dcmdp_jax.losses import advantages, corrections, policy, reduce
from dcmdp_jax.models import scoring, weights
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Batch, Example, Prompts, Rollout, Sampling, Scored
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.rollout.jetstream import Engine
from dcmdp_jax.tokens import packing


class Score:
    """T1: log-probs of the completions, the prompt left out."""

    def __init__(self, ctx: Any):
        config, self.params = model(ctx)
        scored, options = given(ctx)
        self.order = packing.packing_order(scored.rollout, **options)
        self.batch = jax.device_put(packing.pack(scored, **options))
        self.logp = jax.jit(
            lambda params, batch: scoring.packed_logp(
                params,
                batch.tokens,
                batch.positions,
                batch.segment_ids,
                batch.index,
                config,
                temperature=1.0,
                prefix_ids=batch.prefix_ids,
            )[0]
        )

    def step(self) -> dict[str, Any]:
        """Scores once; returns the log-probs."""
        one = jax.tree.map(lambda x: x[0, 0], self.batch)
        logp = np.asarray(self.logp(self.params, one))
        return {"logps": logp[np.argsort(self.order)]}


class Update:
    """T2: one clipped policy-gradient update of the parameters."""

    def __init__(self, ctx: Any):
        model_config, params = model(ctx)
        scored, options = given(ctx)
        self.batch = jax.device_put(packing.pack(scored, **options))
        config = experiment(ctx)
        self.state = jax.jit(partial(train_state.init, config), donate_argnums=0)(params)
        if ctx.variant == "step":
            self.update = compiled_step.compile_step(
                config, model_config, sharding.single_device_mesh()
            )
        else:
            self.update = jax.jit(
                partial(update, config=config, model_config=model_config), donate_argnums=0
            )

    def step(self) -> dict[str, float]:
        """Makes one update; returns loss and gradient norm."""
        self.state, metrics = jax.block_until_ready(self.update(self.state, self.batch))
        return {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}


def update(
    state: Any, batch: Batch, *, config: Config, model_config: ModelConfig
) -> tuple[Any, dict[str, jax.Array]]:
    """`step.constrained_step` with old log-probs and advantages that are given."""
    only = jax.tree.map(lambda x: x[0], batch)
    minibatch = objective.Minibatch(
        batch=only,
        old_logp=only.rollout_logp,
        ref_logp=None,
        advantage=only.mask * only.reward[..., None],
    )
    loss, grads, _ = step.gradients(
        state.params, state.frozen, minibatch, state.dual.multiplier, config, model_config
    )
    before = step.Learner(state.params, state.opt_state, state.skipped)
    after, norm = step.apply_update(before, loss, grads, config)
    return state._replace(**after._asdict()), {"loss": loss, "grad_norm": norm}


class Generate:
    """T3 and T4: a rollout with one completion a prompt, ended by its length alone."""

    def __init__(self, ctx: Any):
        config, params = model(ctx)
        precision = Precision(weights="int8" if ctx.variant == "int8" else "float32")
        mesh = sharding.single_device_mesh()
        task, tokens = ctx.w[ctx.task], common.make_prompts(ctx.w, ctx.task)
        self.prompts = as_prompts(tokens)
        self.lengths = np.broadcast_to(np.asarray(task["new_tokens"], np.int32), len(tokens))
        self.engine = CountingEngine(
            config,
            slots=task.get("slots", len(tokens)),
            stop_ids=(),
            mesh=mesh,
            precision=precision,
            max_length=tokens.shape[1] + int(self.lengths.max()),
        )
        self.weights = sync.converter(config, precision, mesh)(params, 0)
        self.runs = 0

    def step(self) -> dict[str, Any]:
        """Rolls out once; returns tokens, log-probs and decode steps."""
        self.runs = self.runs + 1
        self.engine.decode_steps = 0
        out = rollout(
            self.engine,
            self.weights,
            self.prompts,
            samples=1,
            key=jax.random.key(self.runs),
            max_tokens=self.lengths,
            sampling=Sampling(),
        )
        return {
            "tokens": [row[:n].tolist() for row, n in zip(out.tokens, out.lengths)],
            "logps": [row[:n] for row, n in zip(out.rollout_logp, out.lengths)],
            "steps": self.engine.decode_steps,
        }


class Step:
    """T5: a step of reinforcement learning: rollout, rewards, the constrained update, weights."""

    def __init__(self, ctx: Any):
        model_config, params = model(ctx)
        scored, self.options = given(ctx)
        self.prompts = scored.rollout.prompts
        self.lengths = scored.rollout.lengths
        config = experiment(ctx)
        mesh = sharding.single_device_mesh()
        precision = Precision()
        self.engine = Engine(
            model_config,
            slots=len(self.lengths),
            stop_ids=(),
            mesh=mesh,
            precision=precision,
            max_length=self.prompts.tokens.shape[1] + int(self.lengths.max()),
        )
        self.to_engine = sync.converter(model_config, precision, mesh)
        self.weights = self.to_engine(params, 0)
        self.state = jax.jit(partial(train_state.init, config), donate_argnums=0)(params)
        self.update = compiled_step.compile_step(config, model_config, mesh)
        self.runs = 0

    def step(self) -> dict[str, float]:
        """Makes one step; returns loss and gradient norm."""
        self.runs = self.runs + 1
        out = rollout(
            self.engine,
            self.weights,
            self.prompts,
            samples=len(self.lengths) // len(self.prompts.lengths),
            key=jax.random.key(self.runs),
            max_tokens=self.lengths,
            sampling=Sampling(),
        )
        mask = np.arange(out.tokens.shape[1]) < out.lengths[:, None]
        reward = rl_step.reward(out.tokens, mask).astype(np.float32)
        batch = packing.pack(Scored(out, reward), **self.options)
        self.state, metrics = self.update(self.state, jax.device_put(batch))
        self.weights = jax.block_until_ready(self.to_engine(self.state.params, self.runs))
        return {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}


class CountingEngine(Engine):
    """Counts the decode steps that its results report."""

    decode_steps = 0

    def read(self, result: Any) -> Any:
        """Reads a result and counts its decode steps."""
        out = super().read(result)
        self.decode_steps += int(out.valid.any(axis=0).sum())
        return out


def model(ctx: Any) -> tuple[ModelConfig, Any]:
    """The workload's weights by way of a Hugging Face folder, as any other model comes in."""
    if ctx.dtype != "float32":
        raise SystemExit(f"--dtype {ctx.dtype} is not measured here; take float32")
    tensors = common.make_weights(ctx.w)
    size = ctx.w["hf_config"].get("moe_intermediate_size")
    # the workload stacks experts, the files do not
    for name in [name for name in tensors if ".experts." in name]:
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensors.pop(name)):
            parts = (
                {"gate_proj": matrix[:size], "up_proj": matrix[size:]}
                if kind == "gate_up_proj"
                else {kind: matrix}
            )
            tensors |= {
                f"{prefix}.{expert}.{part}.weight": np.ascontiguousarray(x)
                for part, x in parts.items()
            }
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/model.safetensors")
        pathlib.Path(folder, "config.json").write_text(json.dumps(ctx.w["hf_config"]))
        del tensors
        return weights.load(folder)


def as_prompts(tokens: np.ndarray) -> Prompts:
    return Prompts(
        tokens, np.full(len(tokens), tokens.shape[1], np.int32), (Example("", ""),) * len(tokens)
    )


def given(ctx: Any) -> tuple[Scored, dict[str, Any]]:
    """Returns the given completions, whose advantage rides as the reward, and the options that pack
    them into one row. Completions of one prompt share it.
    """
    given = ctx.batch
    samples = ctx.w.get("samples", 1)
    prompts = as_prompts(given["prompt"][::samples])
    made = dict.fromkeys(Rollout._fields) | {
        "prompts": prompts,
        "tokens": given["completion"],
        "rollout_logp": given["old_logps"],
        "lengths": given["mask"].sum(axis=1).astype(np.int32),
        "stopped": np.ones(len(given["mask"]), bool),
    }
    rollout = Rollout(**made)
    # a prompt shared is a prefix without its last token, which each completion then has
    positions = int((rollout.lengths + 1).sum() + (prompts.lengths - 1).sum())
    options = {
        "minibatches": 1,
        "microbatches": 1,
        "row_length": -(-positions // 8) * 8,
        "share_prompts": samples > 1,
    }
    return Scored(rollout, given["advantages"]), options


def experiment(ctx: Any) -> Config:
    """The workload's loss and optimizer: clipped ratio to the given old log-probs; multiplier 0,
    gradient unclipped. In T5 old log-probs are the trainer's, and advantages standardised rewards.
    """
    task = ctx.w["train"]
    samples = ctx.w.get("samples", 1)
    clipped = partial(policy.clipped, clip_low=task["eps_low"], clip_high=task["eps_high"])
    whole = ctx.task == "T5"
    return Config(
        name=ctx.wname,
        model=ModelSource(),
        steps=1,
        data=DataConfig(
            path="-",
            verifier=lambda example, text: 0.0,
            prompts_per_step=ctx.w["batch"] // samples,
            max_prompt_tokens=ctx.w["prompt_len"],
        ),
        rollout=RolloutConfig(samples=samples, max_tokens=ctx.w["completion_len"]),
        algorithm=AlgorithmConfig(
            advantage=advantages.grpo if whole else lambda reward, group, num_groups: reward,
            reduce=reduce.sequence_mean_token_mean,
            surrogate=corrections.decoupled(clipped) if whole else corrections.bypass(clipped),
            row_length=given(ctx)[1]["row_length"],
            learning_rate=task["lr"],
            beta1=task["b1"],
            beta2=task["b2"],
            weight_decay=task["weight_decay"],
            grad_clip=1e9,
        ),
        constraint=ConstraintConfig(
            constraint.shape_advantage,
            constraint.projected_ascent,
            tolerance=1.0,
            multiplier_init=0.0,
        ),
    )


TASKS = {"T1": Score, "T2": Update, "T3": Generate, "T4": Generate, "T5": Step}

if __name__ == "__main__":
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    rl_step.main("ours", lambda ctx: TASKS[ctx.task](ctx), lambda: versions)
