"""Separability over microbatches is declared: the oracle that every declaration is held to.

A loss is separable if its gradient with respect to the log-probs of one microbatch is the same, bit
for bit, whatever the log-probs of the others are. Every part of a loss that the library offers is
put into a configuration and tried on made-up batches: what is declared must pass, what is not must
fail, but for one loss that couples its batch off policy alone.
"""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest

from dcmdp_jax import compiled_step, constraint, objective
from dcmdp_jax.config import (
    AlgorithmConfig,
    Config,
    ConstraintConfig,
    DataConfig,
    ModelSource,
    RolloutConfig,
)
from dcmdp_jax.losses import (
    advantages,
    corrections,
    covariance,
    kl,
    operators,
    policy,
    reduce,
    rejection,
    sequence,
    surrogates,
)
from dcmdp_jax.losses._separable import is_separable, separable
from dcmdp_jax.records import Batch

A = 4
N = 8
T = 6
GROUP = 4

# Options that a function needs, and bounds that the made-up batches reach.
OPTIONS = {
    policy.dro: {"beta": 0.3},
    covariance.clip_cov: {"key": jax.random.key(1), "fraction": 0.2, "cov_low": 0.01},
    covariance.kl_cov: {"fraction": 0.2},
    sequence.tbpo: {"dual_clip": 1.05},
    rejection.k1: {"low": 0.9, "high": 1.1},
    rejection.k2: {"high": 0.005},
    rejection.k3: {"high": 0.005},
    rejection.trust_region: {"threshold": 0.02},
    rejection.veto: {"threshold": 0.8},
    rejection.kpop: {"threshold": 0.01},
    rejection.ipo: {"threshold": 0.03},
    rejection.m2po: {"threshold": 0.005},
}


def functions(*modules):
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}": functools.partial(
            function, **OPTIONS.get(function, {})
        )
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


LOSSES = functions(policy, sequence, covariance)
LEVELS = (
    rejection.each_token,
    rejection.sequence_sum,
    rejection.sequence_mean,
    rejection.sequence_max,
)
REJECTIONS = {
    name: reject
    for name, reject in functions(rejection).items()
    if reject.func not in (*LEVELS, rejection.opsm)
} | {
    f"k2 {level.__name__}": functools.partial(rejection.k2, high=0.02, level=level)
    for level in LEVELS
}
CORRECTIONS = {
    f"{level.__name__} {operator.__name__} {denominator.__name__}": corrections.Correction(
        level,
        operator,
        None if operator is operators.truncate else 0.95,
        1.05,
        denominator,
    )
    for level in (operators.token, operators.sequence, operators.geometric)
    for operator, denominator in (
        (operators.truncate, operators.original),
        (operators.clip, operators.original),
        (operators.zero_outside, operators.original),
        (operators.keep_inside, operators.original),
        (operators.keep_inside, operators.surviving),
        (operators.reject, operators.original),
        (operators.reject, operators.surviving),
    )
}
SHAPINGS = {name: f for name, f in functions(constraint).items() if ".shape_" in name}
PENALTIES = functions(kl)

CLIPPED = corrections.decoupled(policy.clipped)
REWEIGHTS = {
    "batch_normalize": corrections.batch_normalize,
    "blend": functools.partial(corrections.blend, alpha=0.5),
}
SURROGATES = {
    "adaptive_clip": surrogates.adaptive_clip,
    "log_linear": functools.partial(
        surrogates.log_linear,
        surrogate=corrections.decoupled(policy.clipped, corrections.tis(1.05)),
        alpha=0.3,
    ),
    "log_linear of a loss that is not separable": functools.partial(
        surrogates.log_linear,
        surrogate=corrections.decoupled(functools.partial(covariance.kl_cov, fraction=0.2)),
        alpha=0.3,
    ),
}
PARTS = (
    {f"decoupled {name}": {"surrogate": corrections.decoupled(f)} for name, f in LOSSES.items()}
    | {f"bypass {name}": {"surrogate": corrections.bypass(f)} for name, f in LOSSES.items()}
    | {
        f"decoupled, {name}": {"surrogate": corrections.decoupled(policy.clipped, rejections=(f,))}
        for name, f in REJECTIONS.items()
    }
    | {
        f"bypass, {name}": {"surrogate": corrections.bypass(policy.clipped, rejections=(f,))}
        for name, f in REJECTIONS.items()
    }
    | {
        f"surviving, {kind.__name__}": {
            "surrogate": kind(
                policy.clipped,
                rejections=(functools.partial(rejection.ipo, threshold=0.03),),
                denominator=operators.surviving,
            )
        }
        for kind in (corrections.decoupled, corrections.bypass)
    }
    | {
        name: {"surrogate": corrections.decoupled(policy.clipped, c)}
        for name, c in CORRECTIONS.items()
    }
    | {name: {"surrogate": f} for name, f in SURROGATES.items()}
    | {
        f"reweight {name}": {
            "surrogate": corrections.decoupled(policy.clipped, corrections.tis(1.05), reweight=f)
        }
        for name, f in REWEIGHTS.items()
    }
    | {name: {"shaping": f} for name, f in SHAPINGS.items()}
    | {"penalty": {"penalty": constraint.penalty}}
    | {name: {"reference_penalty": f} for name, f in PENALTIES.items()}
)
NOT_DECLARED = {
    "decoupled covariance.clip_cov",  # means over the batch
    "bypass covariance.clip_cov",
    "decoupled covariance.kl_cov",
    "bypass covariance.kl_cov",
    "decoupled, rejection.m2po",  # a budget of the batch
    "bypass, rejection.m2po",
    "surviving, decoupled",  # counts the tokens of the batch that survive
    "surviving, bypass",
    "log_linear of a loss that is not separable",
    "reweight batch_normalize",  # the mean weight of the batch
    "constraint.shape_centred",  # subtracts the mean of the batch
} | {name for name in CORRECTIONS if name.endswith("surviving")}


def config_with(surrogate=CLIPPED, shaping=None, penalty=None, reference_penalty=None) -> Config:
    return Config(
        name="separable",
        model=ModelSource(),
        data=DataConfig(verifier=max, task=object(), prompts_per_step=A * N // GROUP),
        rollout=RolloutConfig(samples=GROUP, max_tokens=T),
        algorithm=AlgorithmConfig(
            advantage=advantages.grpo,
            surrogate=surrogate,
            reduce=reduce.token_mean,
            microbatches=A,
            reference_penalty=reference_penalty,
        ),
        constraint=ConstraintConfig(
            shaping=shaping, dual=constraint.projected_ascent, tolerance=0.01, penalty=penalty
        ),
        steps=1,
    )


def made_up(seed):
    """A batch, its old log-probs and a reference's; half of the completions have no gap."""
    rng = np.random.default_rng(seed)
    size = 1, A, N, T
    logp = np.float32(-0.2 - rng.exponential(0.8, size))
    exact = rng.random((*size[:3], 1)) < 0.5
    batch = Batch(**dict.fromkeys(Batch._fields))._replace(
        mask=np.arange(T) < rng.integers(1, T + 1, (*size[:3], 1)),
        rollout_logp=np.float32(logp + np.where(exact, 0, rng.normal(0, 0.1, size))),
        reward=rng.integers(0, 2, size[:3]).astype(np.float32),
        group=(rng.permutation(A * N).reshape(size[:3]) // GROUP).astype(np.int32),
    )
    return batch, logp[0], np.float32(logp + rng.normal(0, 0.3, size))


def gradient_of(config):
    """The gradient [A, n, T] of `compiled_step.on_policy_loss` with respect to the log-probs."""

    def gradient(logp, batch, ref_logp):
        advantage = objective.group_advantage(batch, config)
        return jax.grad(compiled_step.on_policy_loss)(logp, batch, ref_logp, advantage, 0.3, config)

    return jax.jit(gradient)


def is_unchanged(config, seed):
    """Whether no microbatch's gradient changes when the log-probs of the others do."""
    gradient = gradient_of(config)
    batch, logp, ref_logp = made_up(seed)
    expected = np.asarray(gradient(logp, batch, ref_logp))
    assert np.isfinite(expected).all() and expected.any(), "there is something to see"
    rng = np.random.default_rng(seed)
    far = np.float32(-rng.exponential(2.0, logp.shape))
    for others in (np.zeros_like(logp), logp + np.float32(0.05) * far, logp + far):
        for i in range(A):
            changed = others.copy()
            changed[i] = logp[i]
            if not np.array_equal(np.asarray(gradient(changed, batch, ref_logp))[i], expected[i]):
                return False
    return True


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in PARTS if name not in NOT_DECLARED])
def test_what_is_declared_separable_is(name):
    config = config_with(**PARTS[name])
    assert compiled_step.in_one_pass(config)
    assert is_unchanged(config, 0)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(NOT_DECLARED))
def test_what_is_not_declared_couples_microbatches(name):
    config = config_with(**PARTS[name])
    assert not compiled_step.in_one_pass(config)
    # On policy kl_cov's penalty has no slope, whichever tokens of the batch it chooses
    couples = name != "decoupled covariance.kl_cov"
    assert couples != all(is_unchanged(config, seed) for seed in range(3))


def plain(logp, old_logp, rollout_logp, advantage, mask):
    return -advantage * logp, mask


@separable
def declared(logp, old_logp, rollout_logp, advantage, mask):
    return -advantage * logp, mask


def test_a_user_s_function_is_separable_only_if_it_says_so():
    assert not is_separable(plain) and is_separable(declared)
    assert is_separable(functools.partial(declared))
    assert not is_separable(functools.partial(declared, mask=plain))
    assert not compiled_step.in_one_pass(config_with(surrogate=plain))
    assert compiled_step.in_one_pass(config_with(surrogate=declared))


def test_one_microbatch_needs_no_declaration():
    config = config_with(surrogate=plain)
    alone = dataclasses.replace(config.algorithm, microbatches=1)
    assert compiled_step.in_one_pass(dataclasses.replace(config, algorithm=alone))
