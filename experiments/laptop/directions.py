"""Does a step along |delta| shaping close the gap, more than a step in a random direction does?

From three starts of floors.py, one step of relative size s = |change| / |parameters| along each
term's own gradient, and along its signs (Adam's first step), and what that does to the total
variation between trainer and engine on the sequences sampled before: with the engine's policy held
as it was, and with the weights quantized anew. The null: 10 directions a start drawn at random with
the size that the |delta| term's gradient has in each array.

Command:  python experiments/laptop/directions.py runs/laptop
Hardware: two CPU cores
Time:     not measured apart from other work
Result:   no constraint's term closes the int4 gap once the weights are quantized anew; the
          straight-through one does
"""

import csv
import dataclasses
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from chain import GRPO, INT4, with_engine

from dcmdp_jax import rewards, seeds
from dcmdp_jax.batches import make_sampler
from dcmdp_jax.config import ModelSource, Precision
from dcmdp_jax.losses import advantages
from dcmdp_jax.models import decoder
from dcmdp_jax.models.quantized import quantize
from dcmdp_jax.run.inputs import read_inputs
from dcmdp_jax.seeds import Stream
from dcmdp_jax.tools import parity, study

# Weights alone are rounded: the trainer's forward pass with them is then the engine's.
ENGINES = {"int4": INT4, "fp8": Precision("float8_e4m3fn", group=-1)}
SIZES = (1e-4, 1e-3, 5e-3)
NUM_RANDOM = 10
COLUMNS = (
    "engine",
    "seed",
    "direction",
    "kind",
    "size",
    "tv_frozen",
    "tv_requantized",
    "entropy",
    "cosine_to_ste",
)


def main(root):
    rows = []
    for name, precision in ENGINES.items():
        for seed in range(3):
            print(f"{name}, start {seed}", flush=True)
            rows += [{"engine": name, "seed": seed, **row} for row in probe(root, precision, seed)]
    with (root / "directions.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def probe(root, precision, seed):
    """Yields rows of one start: relative changes of total variation and entropy by each step."""
    config, inputs, params = read_start(root, precision, seed, prompts=128)
    batch = draw(config, inputs, params, number=0)
    round_off = jax.jit(partial(quantized, precision=precision, model=inputs.model_config))
    measure, score = (jax.jit(partial(f, model=inputs.model_config)) for f in (compare, log_probs))
    frozen = score(round_off(params), batch)

    tv, entropy = measure(params, frozen, batch)
    for name, kind, direction, cosine in directions(
        params, frozen, batch, inputs.model_config, round_off, seed
    ):
        for size in SIZES:
            moved = jax.tree.map(lambda w, d, size=size: w - size * d, params, direction)
            held, new_entropy = measure(moved, frozen, batch)
            anew, _ = measure(moved, score(round_off(moved), batch), batch)
            yield {
                "direction": name,
                "kind": kind,
                "size": size,
                "tv_frozen": float(held / tv - 1),
                "tv_requantized": float(anew / tv - 1),
                "entropy": float(new_entropy / entropy - 1),
                "cosine_to_ste": cosine,
            }


def read_start(root, precision, seed, prompts):
    """Returns the configuration, inputs and parameters of a start of `floors.py`; a batch has
    `prompts` prompts.
    """
    config = dataclasses.replace(with_engine(GRPO, precision), seed=seed)
    folder = study.start_folder(config, study.unchanged, root)
    config = dataclasses.replace(
        config,
        model=ModelSource(str(folder / "model")),
        data=dataclasses.replace(config.data, prompts_per_step=prompts),
    )
    inputs = read_inputs(config)
    return config, inputs, parity.load(config, inputs, folder).params


def draw(config, inputs, params, number):
    """Returns batch `number` of the configuration's engine: sequences [N, S], a mask of the sampled
    tokens among their last T [N, T], and advantages [N, 1].
    """
    sampler = make_sampler(config, inputs)
    sampler.update_weights(params, 0)
    seed = seeds.seed(config.seed, Stream.PARITY, number)
    rollout = parity.sample(sampler, config, inputs, seed)
    scored = rewards.score(rollout, inputs.tokenizer.decode, config.data.reward_function())
    count = len(scored.reward)
    # All prompts of the task have one length.
    prompt_tokens = np.repeat(rollout.prompts.tokens, config.rollout.samples, axis=0)
    tokens = np.concatenate([prompt_tokens, rollout.tokens], axis=1)
    mask = np.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    group = np.arange(count, dtype=np.int32) // config.rollout.samples
    advantage = advantages.grpo(scored.reward, group, num_groups=config.data.prompts_per_step)
    return {
        "tokens": jnp.asarray(tokens),
        "mask": jnp.asarray(mask),
        "advantage": advantage[:, None],
    }


def log_probs(params, batch, model):
    """Returns the log-probs of all tokens at every completion position, [N, T, V]."""
    return jax.nn.log_softmax(
        decoder.logits(params, batch["tokens"], model)[:, -batch["mask"].shape[1] - 1 : -1]
    )


def select_sampled(logp, batch):
    return jnp.take_along_axis(logp, batch["tokens"][:, -batch["mask"].shape[1] :, None], axis=-1)[
        ..., 0
    ]


def mean(values, batch):
    return jnp.sum(jnp.where(batch["mask"], values, 0.0)) / jnp.sum(batch["mask"])


def total_variation(logp, other, batch):
    return mean(0.5 * jnp.sum(jnp.abs(jnp.exp(logp) - jnp.exp(other)), axis=-1), batch)


def compare(params, other, batch, *, model):
    """Returns the total variation between two policies and the entropy of the first, both as means
    over sampled tokens.
    """
    logp = log_probs(params, batch, model)
    return total_variation(logp, other, batch), mean(-jnp.sum(jnp.exp(logp) * logp, axis=-1), batch)


def quantized(params, *, precision, model):
    """Returns the engine's weights, dequantized."""
    return jax.tree.map(
        lambda w, axes: (
            quantize(w, precision.weights, axes, precision.group).dequantize() if axes else w
        ),
        params,
        decoder.contracting_axes(model),
    )


def directions(params, frozen, batch, model, round_off, seed):
    """Yields (name, kind, direction, cosine with the straight-through gradient).

    Steps descend along the direction, which has the norm of the parameters.
    """

    def sampled_logp(p, b):
        return select_sampled(log_probs(p, b, model), b)

    def score_function(weight):
        """Returns REINFORCE with an advantage that is a function of the gap and the batch."""

        def loss(p, b, frozen):
            logp = sampled_logp(p, b)
            return mean(
                -weight(
                    jax.lax.stop_gradient(jnp.exp(logp)) - jnp.exp(select_sampled(frozen, b)), b
                )
                * logp,
                b,
            )

        return loss

    def penalty(p, b, frozen):
        return mean(jnp.abs(jnp.exp(sampled_logp(p, b)) - jnp.exp(select_sampled(frozen, b))), b)

    def kl(p, b, frozen):
        return mean(jnp.sum(jnp.exp(frozen) * (frozen - log_probs(p, b, model)), axis=-1), b)

    def both(p, q, b):
        return total_variation(log_probs(p, b, model), log_probs(q, b, model), b)

    terms = {
        "reward": score_function(lambda gap, b: b["advantage"]),
        "abs": score_function(lambda gap, b: -jnp.abs(gap)),
        "signed": score_function(lambda gap, b: -gap),
        "penalty": penalty,
        "kl": kl,
    }
    grads = {name: jax.jit(jax.grad(term))(params, batch, frozen) for name, term in terms.items()}
    # The gradient with respect to the rounded weights is passed on to the trainer's unchanged.
    grads["straight-through"] = jax.tree.map(
        jnp.add, *jax.jit(jax.grad(both, argnums=(0, 1)))(params, round_off(params), batch)
    )
    reference = jnp.sqrt(inner(grads["straight-through"], grads["straight-through"]))
    for name, grad in grads.items():
        cosine = float(
            inner(grad, grads["straight-through"]) / jnp.sqrt(inner(grad, grad)) / reference
        )
        yield name, "gradient", with_norm_of(grad, params), cosine
        yield name, "signs", with_norm_of(jax.tree.map(jnp.sign, grad), params), cosine
    leaves, tree = jax.tree.flatten(grads["abs"])
    for number in range(NUM_RANDOM):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), len(leaves))
        drawn = [
            jax.random.normal(key, leaf.shape) * jnp.linalg.norm(leaf.ravel()) / leaf.size**0.5
            for key, leaf in zip(keys, leaves)
        ]
        yield f"random-{number}", "gradient", with_norm_of(tree.unflatten(drawn), params), 0.0
        yield (
            f"random-{number}",
            "signs",
            with_norm_of(tree.unflatten([jnp.sign(d) for d in drawn]), params),
            0.0,
        )


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def with_norm_of(direction, params):
    factor = jnp.sqrt(inner(params, params) / inner(direction, direction))
    return jax.tree.map(lambda d: factor * d, direction)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/laptop"))
