"""What each loss costs, in units of reading its inputs once: `python -m benchmarks.losses`.

For [512, 8192] arrays, every loss is reduced to a scalar and differentiated by `logp`. `read` sums
the same inputs, each once. It prints milliseconds, and the ratios to `read` of time and of bytes as
XLA counts them. On a CPU the time is that of all threads of the process, so that other programs
disturb it less.

`--topology v5e:2x2` compiles for a TPU that need not be there (`pip install libtpu`) and prints
bytes only.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from dcmdp_jax import constraint
from dcmdp_jax.losses import corrections, covariance, kl, policy, reduce, rejection, sequence

LIMIT = 6.0
ROW = "{:6.1f}{:10.1f}{:8.1f}{:9.2f}{:6.2f}{:9.2f}{:6.2f}"
NAMES = ("logp", "old_logp", "rollout_logp", "ref_logp", "advantage", "mask")
RATIO = ("logp", "old_logp", "advantage", "mask")
SAMPLER = ("logp", "rollout_logp", "advantage", "mask")
REFERENCE = ("logp", "ref_logp", "mask")
MISMATCH = ("logp", "old_logp", "rollout_logp", "advantage", "mask")


def dc_grpo(logp, old_logp, rollout_logp, advantage, mask):
    shaped = constraint.shape_advantage(advantage, old_logp, rollout_logp, 0.1, 0.0037, mask)
    return policy.clipped(logp, old_logp, shaped, mask)


def corrected(correction=None, rejections=()):
    """The clipped loss under a correction, with the mask that it is reduced by."""
    return corrections.decoupled(policy.clipped, correction, rejections=rejections)


def clip_cov(*arrays):
    return covariance.clip_cov(*arrays, key=jax.random.key(0))


LOSSES: dict[str, tuple[tuple[str, ...], Callable]] = {
    "policy.clipped": (RATIO, policy.clipped),
    "policy.reinforce": (RATIO, policy.reinforce),
    "policy.gpg": (RATIO, policy.gpg),
    "policy.cispo": (RATIO, policy.cispo),
    "policy.sapo": (RATIO, policy.sapo),
    "policy.dppo_tv": (RATIO, policy.dppo_tv),
    "policy.dppo_kl": (RATIO, policy.dppo_kl),
    "policy.prime_tv": (SAMPLER, policy.prime_tv),
    "policy.spo": (RATIO, policy.spo),
    "policy.drpo": (SAMPLER, policy.drpo),
    "policy.dro": (RATIO, functools.partial(policy.dro, beta=0.1)),
    "policy.topr": (RATIO, policy.topr),
    "sequence.gspo": (RATIO, sequence.gspo),
    "sequence.gspo_token": (RATIO, sequence.gspo_token),
    "sequence.gmpo": (RATIO, sequence.gmpo),
    "sequence.vespo": (RATIO, sequence.vespo),
    "covariance.clip_cov": (RATIO, clip_cov),
    "covariance.kl_cov": (RATIO, covariance.kl_cov),
    "kl.k1": (REFERENCE, kl.k1),
    "kl.k2": (REFERENCE, kl.k2),
    "kl.k3": (REFERENCE, kl.k3),
    "kl.k3_k2_gradient": (REFERENCE, kl.k3_k2_gradient),
    "kl.unbiased": (("logp", "old_logp", "ref_logp", "mask"), kl.unbiased),
    "constraint.penalty": (
        ("logp", "rollout_logp", "mask"),
        functools.partial(constraint.penalty, multiplier=0.1),
    ),
    "constraint.shape_advantage + clipped": (MISMATCH, dc_grpo),
    "corrections.tis + clipped": (MISMATCH, corrected(corrections.tis())),
    "corrections.sequence_tis + clipped": (MISMATCH, corrected(corrections.sequence_tis())),
    "corrections.mis + clipped": (MISMATCH, corrected(corrections.mis())),
    "corrections.icepop + clipped": (MISMATCH, corrected(corrections.icepop())),
    "corrections.geometric_mask + clipped": (MISMATCH, corrected(corrections.geometric_mask())),
    "rejection.k3 + clipped": (MISMATCH, corrected(rejections=(rejection.k3,))),
    "rejection.veto + clipped": (MISMATCH, corrected(rejections=(rejection.veto,))),
    "rejection.kpop + clipped": (MISMATCH, corrected(rejections=(rejection.kpop,))),
    "rejection.m2po + clipped": (MISMATCH, corrected(rejections=(rejection.m2po,))),
    "corrections.bypass + clipped": (MISMATCH, corrections.bypass(policy.clipped)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--topology", help="compile for this TPU topology, e.g. v5e:2x2; no timing")
    options = parser.parse_args()
    keep_pages()
    if options.topology:
        data = shapes(options.rows, options.columns, options.topology)
        repeats = 0
    else:
        data = inputs(options.rows, options.columns)
        repeats = options.repeats
    place = options.topology or jax.devices()[0].device_kind
    print(
        f"{options.rows} x {options.columns} on {place}, jax {jax.__version__}; "
        "x is the ratio to read"
    )
    print(f"{'':36}{'time':>6}{'':18}{'time':>9}{'':6}{'bytes':>9}")
    print(
        f"{'loss':36}{'read':>6}{'forward':>10}{'+back':>8}"
        f"{'forward':>9}{'+back':>6}{'forward':>9}{'+back':>6}"
    )
    costly = []
    for name, (names, function) in LOSSES.items():
        figures = cost(function, [data[key] for key in names], repeats)
        print(name.ljust(36) + ROW.format(*figures), flush=True)
        if any(figure > LIMIT for figure in (figures[4], figures[6])):
            costly.append(name)
    print(f"above {LIMIT:g} x reading the inputs: {', '.join(costly) or 'none'}")


def keep_pages() -> None:
    """glibc hands large blocks back to the kernel, so that on CPU every run would first zero its
    pages again.

    It must come before any thread starts: the heaps of all but the first would end at 64 MB.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 2**30)):
            mallopt(option, value)


def inputs(rows: int, columns: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    logp = -rng.exponential(0.5, (rows, columns)).astype(np.float32)

    def near() -> np.ndarray:
        return logp + rng.normal(0.0, 0.05, logp.shape).astype(np.float32)

    mask = np.arange(columns) < rng.integers(columns // 4, columns + 1, (rows, 1))
    advantage = np.repeat(rng.normal(size=(rows, 1)), columns, axis=1).astype(np.float32)
    return jax.device_put(dict(zip(NAMES, (logp, near(), near(), near(), advantage, mask))))


def shapes(rows: int, columns: int, topology: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The inputs as shapes on a device of a topology that is only described."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    dtypes = [jnp.float32] * (len(NAMES) - 1) + [jnp.bool_]
    return {
        name: jax.ShapeDtypeStruct((rows, columns), t, sharding=place)
        for name, t in zip(NAMES, dtypes)
    }


def cost(function: Callable, arrays: list, repeats: int) -> list[float]:
    """Milliseconds of read, forward, forward and backward; ratios of time to read; ratios of bytes
    to read.
    """

    def value(*arrays):
        loss = function(*arrays)
        return reduce.token_mean(*(loss if isinstance(loss, tuple) else (loss, arrays[-1])))

    programs = [
        jax.jit(f).lower(*arrays).compile() for f in (read, value, jax.value_and_grad(value))
    ]
    once, forward, both = milliseconds(programs, arrays, repeats)
    touched = [program.cost_analysis()["bytes accessed"] for program in programs]
    ratios = [forward / once, both / once, touched[1] / touched[0], touched[2] / touched[0]]
    return [once, forward, both, *ratios]


def read(*arrays: jax.Array) -> jax.Array:
    """The sum of every input: one pass over each."""
    return sum(jnp.sum(array, dtype=jnp.float32) for array in arrays)


def milliseconds(programs: list, arrays: list, repeats: int) -> np.ndarray:
    """Of the fastest of `repeats` runs of each, in turn, after a first; NaN without repeats."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times = np.full((len(programs), repeats + 1), np.nan)
    for run in range(repeats + 1 if repeats else 0):
        for place, program in enumerate(programs):
            start = clock()
            jax.block_until_ready(program(*arrays))
            times[place, run] = 1e3 * (clock() - start)
    return times[:, 1:].min(axis=1) if repeats else times[:, 0]


if __name__ == "__main__":
    main()
