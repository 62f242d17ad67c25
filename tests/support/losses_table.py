"""One case for every public function of `losses` and `constraint`, and the data they are called on.

The data is [N, T] = [8, 6] with a hole in the mask. `test_losses_contract` runs the cases.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import constraint
from dcmdp_jax.losses import (
    advantages,
    centering,
    corrections,
    covariance,
    diagnostics,
    kl,
    operators,
    policy,
    reduce,
    rejection,
    routing,
    sequence,
    step_size,
    surrogates,
    tails,
)

N = 8
T = 6
G = 3
V = 5
K = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """How to call a function on the data, and what is peculiar to it."""

    call: Callable  # data -> arrays
    wrt: tuple[str, ...] = ()  # the gradient with respect to these is the derivative of the value
    # the gradient with respect to these is not: part of the value is detached
    surrogate: tuple[str, ...] = ()
    # every float with nothing in the mask; None: not a function of the mask
    empty: float | None = 0.0
    elementwise: bool = False  # reads no mask, so what padding holds comes out at the padding
    trusting: bool = False  # its arrays are checked by its caller
    shuffled: str = ""  # reason why the order of the batch shows
    drawn: str = ""  # reason why the size of the batch shows


def losses_of(d, advantage="advantage", old="old_logp"):
    return d["logp"], d[old], d[advantage], d["mask"]


def loss(function, *, exact=True, old="old_logp", **options):
    """A policy loss; `exact` where no part of it is detached."""
    wrt = {"wrt": ("logp",)} if exact else {"surrogate": ("logp",)}
    return Case(lambda d: function(*losses_of(d, old=old), **options), **wrt)


def pair(function, empty=0.0, **options):
    """A detached function of (old_logp, rollout_logp, mask)."""
    return Case(
        lambda d: function(d["old_logp"], d["rollout_logp"], d["mask"], **options), empty=empty
    )


def gap_of(d):
    return d["old_logp"], d["rollout_logp"], d["advantage"], d["mask"]


def weights(make):
    return Case(lambda d: make().weights(d["old_logp"], d["rollout_logp"], d["mask"]))


def grouped(function, **options):
    """An advantage of (reward, group); padded completions have a group outside the range."""
    return Case(
        lambda d: function(d["reward"], d["group"], num_groups=G, **options), surrogate=("reward",)
    )


def shaped(function, multiplier=0.3):
    return Case(
        lambda d: function(
            d["advantage"], d["old_logp"], d["rollout_logp"], multiplier, 0.01, d["mask"]
        )
    )


def dual(controller):
    def call(d):
        gap_sum, count = constraint.measure(d["old_logp"], d["rollout_logp"], d["mask"])
        return controller.update(controller.init(), gap_sum, count, 0.05)

    return Case(call, empty=None, surrogate=("old_logp", "rollout_logp"))


def positive(d):
    """A weight or ratio per token; where the mask is false it holds what the data holds."""
    return jnp.exp(0.3 * d["ref_logp"])


def ratio(function):
    return Case(
        lambda d: function(positive(d), 0.7, 0.9),
        elementwise=True,
        empty=None,
        surrogate=("ref_logp",),
    )


def level(function, **extra):
    return Case(lambda d: function(d["ref_logp"], d["mask"]), trusting=True, **extra)


def keep(d):
    return d["ref_logp"] > -1.0


def surrogate(make):
    def call(d):
        return make(d["logp"], d["old_logp"], d["rollout_logp"], d["advantage"], d["mask"])

    return Case(call, wrt=("logp",))


def centred(d):
    return centering.score_centering(
        d["logp"],
        d["rollout_logp"],
        d["head_logp"],
        d["head_rollout_logp"],
        d["advantage"],
        d["mask"],
    )


def centred_surrogate(d):
    return centering.centred(
        d["logp"],
        d["old_logp"],
        d["rollout_logp"],
        d["advantage"],
        d["mask"],
        top_logp=d["head_logp"],
        top_rollout_logp=d["head_rollout_logp"],
    )


TABLE = {
    "advantages.grpo": grouped(advantages.grpo),
    "advantages.dr_grpo": grouped(advantages.dr_grpo),
    "advantages.rloo": grouped(advantages.rloo),
    "advantages.gpg": grouped(advantages.gpg),
    "advantages.pass_at_k_advantage": grouped(advantages.pass_at_k_advantage),
    "advantages.pass_at_k": grouped(advantages.pass_at_k, k=2),
    "advantages.at_last_token": Case(
        lambda d: advantages.at_last_token(d["reward"], d["mask"]), ("reward",)
    ),
    "advantages.reinforce_pp": Case(
        lambda d: advantages.reinforce_pp(d["token_reward"], d["mask"]), ("token_reward",)
    ),
    "advantages.reinforce_pp_baseline": Case(
        lambda d: advantages.reinforce_pp_baseline(
            d["reward"], d["group"], d["mask"], num_groups=G
        ),
        ("reward",),
    ),
    "advantages.whiten": Case(
        lambda d: advantages.whiten(d["token_reward"], d["mask"]), ("token_reward",)
    ),
    "advantages.dynamic_sampling_mask": grouped(advantages.dynamic_sampling_mask),
    "advantages.overlong_penalty": Case(
        lambda d: advantages.overlong_penalty(d["length"], max_length=6, cache=4),
        empty=None,
        elementwise=True,
    ),
    "advantages.overlong_mask": Case(
        lambda d: advantages.overlong_mask(d["mask"], d["length"] > 4)
    ),
    "advantages.length_reward": Case(
        lambda d: advantages.length_reward(d["reward"], d["length"], d["group"], num_groups=G)
    ),
    "centering.unweighted": Case(
        lambda d: centering.unweighted(positive(d)), empty=None, elementwise=True
    ),
    "centering.truncated": Case(
        lambda d: centering.truncated(positive(d), high=0.8),
        ("ref_logp",),
        empty=None,
        elementwise=True,
    ),
    "centering.masked": Case(
        lambda d: centering.masked(positive(d), low=0.5, high=0.9),
        ("ref_logp",),
        empty=None,
        elementwise=True,
    ),
    "centering.score_centering": Case(centred, surrogate=("logp", "head_logp")),
    "centering.centred": Case(centred_surrogate, surrogate=("logp", "head_logp")),
    "constraint.delta": Case(
        lambda d: constraint.delta(d["old_logp"], d["rollout_logp"], d["mask"]),
        ("old_logp", "rollout_logp"),
    ),
    "constraint.signed_delta": Case(
        lambda d: constraint.signed_delta(d["old_logp"], d["rollout_logp"], d["mask"]),
        ("old_logp", "rollout_logp"),
    ),
    "constraint.measure": Case(
        lambda d: constraint.measure(d["old_logp"], d["rollout_logp"], d["mask"]),
        ("old_logp", "rollout_logp"),
    ),
    "constraint.shape_advantage": shaped(constraint.shape_advantage),
    "constraint.shape_signed": shaped(constraint.shape_signed),
    "constraint.shape_credit": shaped(constraint.shape_credit),
    "constraint.shape_centred": shaped(constraint.shape_centred),
    "constraint.shape_hinge": shaped(constraint.shape_hinge),
    "constraint.shape_cost_to_go": shaped(constraint.shape_cost_to_go),
    "constraint.shape_normalised": shaped(constraint.shape_normalised),
    "constraint.penalty": Case(
        lambda d: constraint.penalty(d["logp"], d["rollout_logp"], d["mask"], 0.3), ("logp",)
    ),
    "constraint.projected_ascent": dual(constraint.projected_ascent()),
    "constraint.relative_ascent": dual(constraint.relative_ascent()),
    "constraint.log_space_ascent": dual(constraint.log_space_ascent()),
    "constraint.pi": dual(constraint.pi()),
    "constraint.pid": dual(constraint.pid()),
    "constraint.with_ema": dual(constraint.with_ema(constraint.projected_ascent())),
    "constraint.with_deadband": dual(constraint.with_deadband(constraint.projected_ascent())),
    "constraint.calibrate_tolerance": Case(
        lambda d: constraint.calibrate_tolerance(
            reduce_rows(constraint.delta(d["old_logp"], d["rollout_logp"], d["mask"])),
            reduce_rows(d["mask"]),
        ),
        surrogate=("old_logp",),
    ),
    "corrections.tis": weights(corrections.tis),
    "corrections.sequence_tis": weights(corrections.sequence_tis),
    "corrections.geometric_tis": weights(corrections.geometric_tis),
    "corrections.mis": weights(functools.partial(corrections.mis, 0.9, 1.1)),
    "corrections.sequence_mis": weights(functools.partial(corrections.sequence_mis, 0.8, 1.2)),
    "corrections.icepop": weights(functools.partial(corrections.icepop, 0.9, 1.1)),
    "corrections.geometric_mask": weights(corrections.geometric_mask),
    "corrections.batch_normalize": Case(
        lambda d: corrections.batch_normalize(positive(d), d["mask"])
    ),
    "corrections.blend": Case(lambda d: corrections.blend(positive(d), d["mask"], alpha=0.3)),
    "corrections.decoupled": surrogate(
        corrections.decoupled(
            policy.clipped,
            corrections.mis(0.8, 1.2, operators.surviving),
            rejections=(rejection.ipo,),
        )
    ),
    "corrections.bypass": surrogate(corrections.bypass(policy.clipped)),
    "covariance.clip_cov": Case(
        lambda d: covariance.clip_cov(
            *losses_of(d, "token_reward"), key=jax.random.key(3), fraction=0.2, cov_low=0.1
        ),
        ("logp",),
        shuffled="the draw is by place",
        drawn="the draw is by place",
    ),
    "covariance.kl_cov": Case(
        lambda d: covariance.kl_cov(*losses_of(d, "token_reward"), fraction=0.2), wrt=("logp",)
    ),
    "diagnostics.summary": Case(
        lambda d: diagnostics.summary(
            d["old_logp"], d["rollout_logp"], d["advantage"], d["mask"], logp=d["logp"]
        )
    ),
    "diagnostics.dropped": Case(lambda d: diagnostics.dropped(d["rollout_logp"], d["mask"])),
    "diagnostics.prob_diff": pair(diagnostics.prob_diff),
    "diagnostics.log_ratio": pair(diagnostics.log_ratio),
    "diagnostics.perplexity": pair(diagnostics.perplexity),
    "diagnostics.chi2": pair(diagnostics.chi2),
    "diagnostics.effective_sample_size": pair(diagnostics.effective_sample_size),
    "diagnostics.weight": Case(lambda d: diagnostics.weight(positive(d), d["mask"])),
    "diagnostics.rejected": Case(lambda d: diagnostics.rejected(keep(d), d["mask"])),
    "diagnostics.clip_fraction": Case(lambda d: diagnostics.clip_fraction(*losses_of(d))),
    "diagnostics.advantage_skew": Case(
        lambda d: diagnostics.advantage_skew(
            d["old_logp"], d["rollout_logp"], d["advantage"], d["mask"]
        )
    ),
    "diagnostics.sign_flip": Case(
        lambda d: diagnostics.sign_flip(d["advantage"], d["token_reward"], d["mask"])
    ),
    "diagnostics.staleness": Case(
        lambda d: diagnostics.staleness(d["logp"], d["old_logp"], d["rollout_logp"], d["mask"])
    ),
    "diagnostics.shift": pair(diagnostics.shift),
    "diagnostics.support_mass": Case(
        lambda d: diagnostics.support_mass(d["logits"], d["mask"], top_k=4, top_p=0.8), empty=1.0
    ),
    "kl.k1": Case(lambda d: kl.k1(d["logp"], d["ref_logp"], d["mask"]), ("logp", "ref_logp")),
    "kl.k2": Case(lambda d: kl.k2(d["logp"], d["ref_logp"], d["mask"]), ("logp", "ref_logp")),
    "kl.k3": Case(lambda d: kl.k3(d["logp"], d["ref_logp"], d["mask"]), ("logp", "ref_logp")),
    "kl.k3_k2_gradient": Case(
        lambda d: kl.k3_k2_gradient(d["logp"], d["ref_logp"], d["mask"]),
        surrogate=("logp", "ref_logp"),
    ),
    "kl.unbiased": Case(
        lambda d: kl.unbiased(d["logp"], d["old_logp"], d["ref_logp"], d["mask"]),
        ("logp", "ref_logp"),
    ),
    "operators.token": level(operators.token, wrt=("ref_logp",)),
    "operators.sequence": level(operators.sequence, wrt=("ref_logp",)),
    "operators.geometric": level(operators.geometric, wrt=("ref_logp",)),
    "operators.truncate": ratio(operators.truncate),
    "operators.clip": ratio(operators.clip),
    "operators.keep_inside": ratio(operators.keep_inside),
    "operators.zero_outside": ratio(operators.zero_outside),
    "operators.reject": ratio(operators.reject),
    "operators.original": Case(lambda d: operators.original(d["mask"], keep(d)), trusting=True),
    "operators.surviving": Case(lambda d: operators.surviving(d["mask"], keep(d)), trusting=True),
    "policy.clipped": loss(policy.clipped, clip_high=0.28, dual_clip=1.1, ratio_max=1.5),
    "policy.reinforce": loss(policy.reinforce),
    "policy.gpg": loss(policy.gpg, alpha=1.5),
    "policy.cispo": loss(policy.cispo, exact=False, low=0.9, high=1.2),
    "policy.sapo": loss(policy.sapo),
    "policy.dppo_tv": loss(policy.dppo_tv, exact=False, tv_low=0.02, tv_high=0.02),
    "policy.dppo_kl": loss(policy.dppo_kl, exact=False, kl_max=1e-3),
    "policy.prime_tv": loss(policy.prime_tv, old="rollout_logp", tv_low=0.05, tv_high=0.05),
    "policy.spo": loss(policy.spo),
    "policy.drpo": loss(policy.drpo, old="rollout_logp"),
    "policy.dro": loss(policy.dro, beta=0.3),
    "policy.topr": loss(policy.topr, exact=False),
    "reduce.token_mean": Case(lambda d: reduce.token_mean(d["logp"], d["mask"]), ("logp",)),
    "reduce.token_sum": Case(lambda d: reduce.token_sum(d["logp"], d["mask"]), ("logp",)),
    "reduce.sequence_mean_token_mean": Case(
        lambda d: reduce.sequence_mean_token_mean(d["logp"], d["mask"]), ("logp",)
    ),
    "reduce.sequence_mean_token_sum": Case(
        lambda d: reduce.sequence_mean_token_sum(d["logp"], d["mask"]), ("logp",)
    ),
    "reduce.constant": Case(
        lambda d: reduce.constant(d["logp"], d["mask"], normalizer=64), ("logp",)
    ),
    "rejection.each_token": level(rejection.each_token, wrt=("ref_logp",)),
    "rejection.sequence_sum": level(rejection.sequence_sum, wrt=("ref_logp",)),
    "rejection.sequence_mean": level(rejection.sequence_mean, wrt=("ref_logp",)),
    "rejection.sequence_max": level(rejection.sequence_max, wrt=("ref_logp",)),
    "rejection.k1": pair(rejection.k1, low=0.9, high=1.1),
    "rejection.k2": pair(rejection.k2, high=0.005),
    "rejection.k3": pair(rejection.k3, high=0.005),
    "rejection.trust_region": pair(rejection.trust_region, threshold=0.02),
    "rejection.veto": pair(rejection.veto, threshold=0.8),
    "rejection.kpop": pair(rejection.kpop, threshold=0.01),
    "rejection.ipo": pair(rejection.ipo, threshold=0.03),
    "rejection.m2po": pair(rejection.m2po, threshold=0.005),
    "rejection.opsm": Case(
        lambda d: rejection.opsm(
            d["logp"], d["rollout_logp"], d["advantage"], d["mask"], threshold=0.01
        )
    ),
    "routing.replay_ids": Case(
        lambda d: routing.replay_ids(d["logits"], d["recorded_ids"]), empty=None, elementwise=True
    ),
    "routing.replay_weights": Case(
        lambda d: routing.replay_weights(d["logits"], jnp.clip(d["recorded_ids"], 0, V - 1)),
        ("logits",),
        empty=None,
        elementwise=True,
    ),
    "routing.flips": Case(
        lambda d: routing.flips(
            jnp.stack([d["logits"], -d["logits"]]), jnp.stack([d["recorded_ids"]] * 2), d["mask"]
        )
    ),
    "sequence.gspo": loss(sequence.gspo, clip_low=0.03, clip_high=0.03),
    "sequence.gspo_token": loss(sequence.gspo_token, exact=False, clip_low=0.03, clip_high=0.03),
    "sequence.gmpo": loss(sequence.gmpo, clip_low=0.1, clip_high=0.1),
    "sequence.tbpo": loss(sequence.tbpo, clip_low=0.03, clip_high=0.03, dual_clip=1.05),
    "sequence.vespo": loss(sequence.vespo, exact=False),
    "step_size.sqrt_ess": pair(step_size.sqrt_ess, empty=1.0),
    "step_size.length_decay": pair(step_size.length_decay, empty=1.0, length=2.0),
    "step_size.inference_gap": Case(lambda d: step_size.inference_gap(*gap_of(d))),
    "step_size.accept": Case(lambda d: step_size.accept(*gap_of(d), tolerance=1e-3), empty=1.0),
    "surrogates.adaptive_clip": surrogate(functools.partial(surrogates.adaptive_clip, high=1.1)),
    "surrogates.log_linear_proximal": Case(
        lambda d: surrogates.log_linear_proximal(d["logp"], d["rollout_logp"], d["mask"], alpha=0.3)
    ),
    "surrogates.log_linear": Case(
        lambda d: surrogates.log_linear(
            d["logp"],
            d["old_logp"],
            d["rollout_logp"],
            d["advantage"],
            d["mask"],
            surrogate=corrections.decoupled(policy.clipped, corrections.tis(1.05)),
            alpha=0.3,
        ),
        surrogate=("logp",),
    ),
    "tails.quantiles": Case(lambda d: tails.quantiles(d["logp"], d["mask"])),
    "tails.quantiles_by_bucket": Case(
        lambda d: tails.quantiles_by_bucket(
            d["logp"], d["recorded_ids"][..., 0], d["mask"], num_buckets=V
        )
    ),
    "tails.position_bucket": Case(
        lambda d: tails.position_bucket(d["mask"], edges=(1, 3)), elementwise=True
    ),
    "tails.probability_bucket": Case(
        lambda d: tails.probability_bucket(d["rollout_logp"], d["mask"])
    ),
    "tails.summary": pair(tails.summary),
    "tails.top_share": Case(lambda d: tails.top_share(positive(d), d["mask"], fraction=0.1)),
    "tails.worst_tokens": Case(
        lambda d: tails.worst_tokens(d["old_logp"], d["rollout_logp"], d["mask"], k=4),
        empty=None,
        shuffled="it returns rows",
    ),
}


def reduce_rows(x):
    return jnp.sum(x, axis=-1, dtype=jnp.float32)


NO_SLOPE = {
    "advantages.dynamic_sampling_mask": "bool",
    "advantages.pass_at_k": "counts",
    "operators.reject": "weight 1",
}

# Fields of the data that a case passes under a name of another kind (x, value, weights, keep), or
# that it ignores.
RENAMED = {
    f"{name}:{key}"
    for key, names in {
        "logp": [n for n in TABLE if n.startswith(("reduce.", "tails.quantiles"))],
        "old_logp": ["corrections.bypass"],
        "ref_logp": [
            "corrections.batch_normalize",
            "corrections.blend",
            "diagnostics.weight",
            "diagnostics.rejected",
            "tails.top_share",
        ],
    }.items()
    for name in names
}


GARBAGE = np.float32([np.nan, np.inf, -np.inf, 1e4, -1e4])


def make_data(seed, rows=N, columns=T):
    """Log-probs away from the kinks of every loss in the table: finite differences then mean
    something.
    """
    rng = np.random.default_rng(seed)
    logp = -0.2 - rng.exponential(0.8, (rows, columns))
    mask = np.arange(columns) < rng.integers(2, columns + 1, (rows, 1))
    mask[1, 1] = False
    group = np.int32([0, 1, 2, 0, 1, 0, 1, 2][:rows])
    data = {
        "logp": logp,
        "old_logp": logp + 0.12 * rng.normal(size=logp.shape),
        "rollout_logp": logp + 0.12 * rng.normal(size=logp.shape),
        "ref_logp": logp + 0.5 * rng.normal(size=logp.shape),
        "advantage": np.repeat(rng.normal(size=(rows, 1)), columns, 1),
        "token_reward": rng.normal(size=logp.shape),
        "reward": rng.normal(size=rows),
        "head_logp": -1.0 - rng.random((rows, columns, K)),
        "head_rollout_logp": -1.2 - rng.random((rows, columns, K)),
        "logits": rng.normal(size=(rows, columns, V)),
    }
    data = {name: np.float32(value) for name, value in data.items()}
    data["recorded_ids"] = np.int32(np.argsort(rng.random((rows, columns, V)), -1)[..., :K])
    data["length"] = np.int32(mask.sum(1))
    return data | {"mask": mask, "group": group}


def spoil(data, seed):
    """Garbage wherever the mask is false."""
    rng = np.random.default_rng(seed)
    spoiled = dict(data)
    for name, value in data.items():
        if value.dtype == np.float32 and value.shape[:2] == data["mask"].shape:
            inside = data["mask"].reshape(data["mask"].shape + (1,) * (value.ndim - 2))
            spoiled[name] = np.where(inside, value, rng.choice(GARBAGE, value.shape))
    # -7 is no expert, no bucket
    spoiled["recorded_ids"] = np.where(data["mask"][..., None], data["recorded_ids"], np.int32(-7))
    return spoiled


def pad(data, seed, rows=4, columns=3):
    """More rows and columns, all outside the mask, and garbage in them and in the hole."""
    rng = np.random.default_rng(seed)
    padded = {}
    for name, value in data.items():
        more = [(0, rows)] + [(0, columns)] * (value.ndim > 1) + [(0, 0)] * (value.ndim - 2)
        padded[name] = np.pad(value, more)
    padded["group"][-rows:] = G + 4
    padded["reward"][-rows:] = rng.choice(GARBAGE, rows)
    padded["length"][-rows:] = 77
    return spoil(padded, seed + 1)


def empty(data):
    return spoil(
        data | {"mask": np.zeros_like(data["mask"]), "group": np.full_like(data["group"], -1)}, 5
    )
