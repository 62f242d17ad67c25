"""Bias or noise: how far is each estimate of the policy gradient from the one on policy?

At each start of floors.py, the gradient from 4,096 sequences by each estimator, beside that of
4,096 which the exact engine sampled for the same prompts with the same random numbers, so that the
two share most of their noise. A second batch of the exact engine, for other prompts, tells how far
noise alone takes an estimate of this size. Score centering takes the whole vocabulary for its head,
which only a model of this size affords.

Command:  python experiments/laptop/estimators.py runs/laptop
Hardware: two CPU cores
Time:     not measured apart from other work
Result:   cosines of 0.93 uncorrected, 0.98 with TIS, where noise alone leaves 0.95
"""

import csv
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
from chain import FLOAT32, INT4
from directions import draw, inner, log_probs, mean, quantized, read_start, select_sampled

from dcmdp_jax.losses import centering, corrections

PROMPTS = 512  # eight completions each
COLUMNS = ("seed", "estimator", "cosine", "length")


def main(root):
    with (root / "estimators.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for seed in range(5):
            print(f"start {seed}", flush=True)
            writer.writerows({"seed": seed, **row} for row in compare_estimates(root, seed))


def compare_estimates(root, seed):
    """Yields the cosine of each estimate with the gradient on policy, and the ratio of lengths."""
    config, inputs, params = read_start(root, FLOAT32, seed, PROMPTS)
    exact, again = (
        gradient(params, draw(config, inputs, params, number), inputs.model_config, plain)
        for number in (1, 2)
    )
    config, inputs, params = read_start(root, INT4, seed, PROMPTS)
    batch = draw(config, inputs, params, number=1)
    batch["engine"] = jax.jit(partial(log_probs, model=inputs.model_config))(
        quantized(params, precision=INT4, model=inputs.model_config), batch
    )
    gradients = {"on policy, again": again} | {
        name: gradient(params, batch, inputs.model_config, loss)
        for name, loss in (
            ("uncorrected", plain),
            ("TIS, 2", weighted(corrections.tis(2.0))),
            ("IcePop, 0.5 to 5", weighted(corrections.icepop(0.5, 5.0))),
            ("score centering", centred(centering.unweighted)),
            ("score centering with TIS", centred(centering.truncated)),
        )
    }
    for name, grad in gradients.items():
        length = jnp.sqrt(inner(grad, grad))
        exact_length = jnp.sqrt(inner(exact, exact))
        yield {
            "estimator": name,
            "cosine": f"{float(inner(grad, exact) / (length * exact_length)):.4f}",
            "length": f"{float(length / exact_length):.4f}",
        }


def gradient(params, batch, model, loss):
    return jax.jit(jax.grad(lambda p, b: mean(loss(log_probs(p, b, model), b), b)))(params, batch)


def plain(logp, batch):
    return -batch["advantage"] * select_sampled(logp, batch)


def weighted(correction):
    def loss(logp, batch):
        old = jax.lax.stop_gradient(select_sampled(logp, batch))
        engine = select_sampled(batch["engine"], batch)
        weight, _ = correction.weights(old, engine, batch["mask"])
        return weight * plain(logp, batch)

    return loss


def centred(weight):
    def loss(logp, batch):
        engine = batch["engine"]
        return centering.score_centering(
            select_sampled(logp, batch),
            select_sampled(engine, batch),
            logp,
            engine,
            batch["advantage"],
            batch["mask"],
            weight=weight,
        )

    return loss


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/laptop"))
