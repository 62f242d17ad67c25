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

from dcmdp_jax import rewards, sync, train
from dcmdp_jax.config import ModelSource, Precision
from dcmdp_jax.losses import advantages
from dcmdp_jax.models import decoder
from dcmdp_jax.models.quantized import quantize
from dcmdp_jax.tools import parity, study

# weights alone: then the trainer's pass is the engine's
ENGINES = {"int4": INT4, "fp8": Precision("float8_e4m3fn", group=-1)}
SIZES = (1e-4, 1e-3, 5e-3)
DRAWN = 10
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
    """Rows of one start: relative changes of total variation and entropy after each step."""
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
    """Configuration, inputs and parameters of a start of `floors.py`, with batches of `prompts`
    prompts.
    """
    config = dataclasses.replace(with_engine(GRPO, precision), seed=seed)
    folder = study.start_folder(config, study.unchanged, root)
    config = dataclasses.replace(
        config,
        model=ModelSource(str(folder / "model")),
        data=dataclasses.replace(config.data, prompts_per_step=prompts),
    )
    inputs = train.read_inputs(config)
    return config, inputs, parity.load(config, inputs, folder).params


def draw(config, inputs, params, number):
    """Batch `number` from the configuration's engine: whole sequences [N, S], which of their last T
    places were sampled [N, T], and advantages [N, 1].
    """
    engine = train.make_engine(config, inputs)
    policy = sync.converter(inputs.model_config, config.rollout.precision, inputs.decode_mesh)
    sampled_ = parity.sample(engine, policy(params, 0), config, inputs, number)
    scored = rewards.score(sampled_, inputs.tokenizer.decode, config.data.reward_function())
    count = len(scored.reward)
    # every prompt of the task has one length
    asked = np.repeat(sampled_.prompts.tokens, config.rollout.samples, axis=0)
    tokens = np.concatenate([asked, sampled_.tokens], axis=1)
    mask = np.arange(sampled_.tokens.shape[1]) < sampled_.lengths[:, None]
    group = np.arange(count, dtype=np.int32) // config.rollout.samples
    advantage = advantages.grpo(scored.reward, group, num_groups=config.data.prompts_per_step)
    return {
        "tokens": jnp.asarray(tokens),
        "mask": jnp.asarray(mask),
        "advantage": advantage[:, None],
    }


def log_probs(params, batch, model):
    """Of every symbol at every sampled place, [N, T, V]."""
    return jax.nn.log_softmax(
        decoder.logits(params, batch["tokens"], model)[:, -batch["mask"].shape[1] - 1 : -1]
    )


def of_sampled(logp, batch):
    return jnp.take_along_axis(logp, batch["tokens"][:, -batch["mask"].shape[1] :, None], axis=-1)[
        ..., 0
    ]


def mean(values, batch):
    return jnp.sum(jnp.where(batch["mask"], values, 0.0)) / jnp.sum(batch["mask"])


def total_variation(logp, other, batch):
    return mean(0.5 * jnp.sum(jnp.abs(jnp.exp(logp) - jnp.exp(other)), axis=-1), batch)


def compare(params, other, batch, *, model):
    """Total variation between the trainer's policy and another's, and the trainer's entropy, means
    over sampled places.
    """
    logp = log_probs(params, batch, model)
    return total_variation(logp, other, batch), mean(-jnp.sum(jnp.exp(logp) * logp, axis=-1), batch)


def quantized(params, *, precision, model):
    """The engine's weights as the trainer would hold them."""
    return jax.tree.map(
        lambda w, axes: (
            quantize(w, precision.weights, axes, precision.group).dequantize() if axes else w
        ),
        params,
        decoder.contracting_axes(model),
    )


def directions(params, frozen, batch, model, round_off, seed):
    """Names, kinds and unit directions (in units of the parameters' norm) whose descent the terms
    ask for.
    """

    def sampled_logp(p, b):
        return of_sampled(log_probs(p, b, model), b)

    def score_function(weight):
        """REINFORCE with an advantage that is a function of the two log-probs."""

        def loss(p, b, frozen):
            logp = sampled_logp(p, b)
            return mean(
                -weight(jax.lax.stop_gradient(jnp.exp(logp)) - jnp.exp(of_sampled(frozen, b)), b)
                * logp,
                b,
            )

        return loss

    def penalty(p, b, frozen):
        return mean(jnp.abs(jnp.exp(sampled_logp(p, b)) - jnp.exp(of_sampled(frozen, b))), b)

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
    # Rounding is taken for the identity: the gradient through the engine's weights is passed on to
    # the trainer's.
    grads["straight-through"] = jax.tree.map(
        jnp.add, *jax.jit(jax.grad(both, argnums=(0, 1)))(params, round_off(params), batch)
    )
    own = jnp.sqrt(inner(grads["straight-through"], grads["straight-through"]))
    for name, grad in grads.items():
        cosine = float(inner(grad, grads["straight-through"]) / jnp.sqrt(inner(grad, grad)) / own)
        yield name, "gradient", sized(grad, params), cosine
        yield name, "signs", sized(jax.tree.map(jnp.sign, grad), params), cosine
    leaves, tree = jax.tree.flatten(grads["abs"])
    for number in range(DRAWN):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), len(leaves))
        drawn = [
            jax.random.normal(key, leaf.shape) * jnp.linalg.norm(leaf.ravel()) / leaf.size**0.5
            for key, leaf in zip(keys, leaves)
        ]
        yield f"random-{number}", "gradient", sized(tree.unflatten(drawn), params), 0.0
        yield (
            f"random-{number}",
            "signs",
            sized(tree.unflatten([jnp.sign(d) for d in drawn]), params),
            0.0,
        )


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def sized(direction, params):
    factor = jnp.sqrt(inner(params, params) / inner(direction, direction))
    return jax.tree.map(lambda d: factor * d, direction)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/laptop"))
