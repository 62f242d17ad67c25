"""Values and gradients against vectors computed in float64 from the formulas, gradients by complex step.

The file is the one named by DCMDP_GOLDEN, else ../shared/golden/losses.json; nothing here is taken from its numbers.
"""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.losses import advantages, corrections, kl, policy, reduce, rejection, sequence

SHARED = pathlib.Path(__file__).parents[1].parent / "shared"
PATH = pathlib.Path(os.environ.get("DCMDP_GOLDEN") or SHARED / "golden" / "losses.json")
GOLDEN = json.loads(PATH.read_text()) if PATH.exists() else None
CASES = ("base", "flip", "matched", "extreme", "all_masked")

RTOL = 1e-5
# The file's log-probabilities are float64. Rounding one of size 4 to float32 moves it by up to 2.4e-7, and a token's
# loss of size about 1 by a few times that; where tokens of either sign cancel, that is what remains.
ATOL = 1e-6

pytestmark = pytest.mark.skipif(GOLDEN is None, reason=f"no golden file at {PATH}")

partial = functools.partial
PPO = partial(policy.clipped, clip_low=0.2, clip_high=0.28)
TOKENS, ROWS = reduce.token_mean, reduce.sequence_mean_token_mean

WEIGHTS = {
    "w_tis_token": corrections.tis(2.0),
    "w_tis_token_C1.05": corrections.tis(1.05),
    "w_tis_seq": corrections.sequence_tis(2.0),
    "w_icepop": corrections.icepop(0.5, 5.0),
    "w_clip_token": corrections.Correction(corrections.token, corrections.clip, 0.5, 2.0),
    "w_geo_seq_truncate": corrections.geometric_tis(2.0),
}
NORMALIZED = {"w_tis_token_batchnorm": ("w_tis_token", TOKENS), "w_tis_seq_batchnorm": ("w_tis_seq", ROWS)}
KEEPS = {
    "keep_mis_token": partial(rejection.k1, low=0.5, high=2.0),
    "keep_mis_seq": partial(rejection.k1, low=0.7, high=1.43, level=rejection.sequence_sum),
    "keep_geo_seq": partial(rejection.k1, low=0.95, high=1.05, level=rejection.sequence_mean),
    "keep_veto": partial(rejection.veto, threshold=1e-4),
    "keep_trm_max_k3": partial(rejection.trust_region, threshold=0.05),
    "keep_seq_mean_k3": partial(rejection.k3, high=0.02, level=rejection.sequence_mean),
    "keep_token_k3": partial(rejection.k3, high=0.05),
    "keep_kpop": partial(rejection.kpop, threshold=0.02),
    "keep_m2po": partial(rejection.m2po, threshold=0.02),
    "keep_ipo_absprob": partial(rejection.ipo, threshold=0.1),
}
# These two are also what a correction record with the operator `reject` keeps.
RECORDS = {
    "keep_mis_token": corrections.Correction(corrections.token, corrections.reject, 0.5, 2.0),
    "keep_mis_seq": corrections.Correction(corrections.sequence, corrections.reject, 0.7, 1.43),
    "keep_geo_seq": corrections.geometric_mask(0.95, 1.05),
}


def opsm_surrogate(logp, old_logp, rollout_logp, advantage, mask, denominator=corrections.original):
    keep = rejection.opsm(logp, rollout_logp, advantage, mask, threshold=0.5)
    return jnp.where(keep, PPO(logp, old_logp, advantage, mask), 0.0), denominator(mask > 0, keep)


def normalized_surrogate(logp, old_logp, rollout_logp, advantage, mask, name):
    weight, mean = NORMALIZED[name]
    weights, _ = WEIGHTS[weight].weights(old_logp, rollout_logp, mask)
    weights = corrections.batch_normalize(weights, mask, mean=mean(weights, mask))
    return PPO(logp, old_logp, advantage, mask) * weights, mask


def losses() -> dict:
    """Name in the file -> (surrogate, reducer)."""
    plain, bypass = corrections.decoupled, corrections.bypass
    table = {
        "ppo_dapo_token_mean": (plain(PPO), TOKENS),
        "ppo_dapo_token_sum": (plain(PPO), reduce.token_sum),
        "ppo_dapo_seq_mean_token_mean": (plain(PPO), ROWS),
        "ppo_dapo_batch_mean_token_mean": (plain(PPO), lambda x, m: ROWS(x, m, count=m.shape[0])),
        "ppo_dapo_seq_mean_token_sum": (plain(PPO), reduce.sequence_mean_token_sum),
        "ppo_dapo_seq_mean_token_sum_norm": (
            plain(PPO),
            lambda x, m: reduce.sequence_mean_token_sum(x, m) / m.shape[1],
        ),
        "ppo_dapo_dr_grpo_trl": (plain(PPO), lambda x, m: reduce.constant(x, m, normalizer=m.size)),
        "grpo_clip0.24": (plain(partial(policy.clipped, clip_low=0.24, clip_high=0.24)), TOKENS),
        "ppo_dual_c3": (plain(partial(policy.clipped, dual_clip=3.0)), TOKENS),
        "ppo_delta1.5": (plain(partial(PPO, delta=1.5)), TOKENS),
        "ppo_bypass": (bypass(PPO), TOKENS),
        "gspo": (plain(sequence.gspo_token), ROWS),
        "gspo_seq_form": (plain(sequence.gspo), ROWS),
        "sapo": (plain(policy.sapo), ROWS),
        "cispo": (plain(partial(policy.cispo, low=1 - 0.2, high=1 + 0.28)), TOKENS),
        "cispo_abs5": (plain(partial(policy.cispo, high=5.0)), TOKENS),
        "dppo_tv": (plain(partial(policy.dppo_tv, delta_low=0.2, delta_high=0.2)), TOKENS),
        "dppo_kl": (plain(partial(policy.dppo_kl, delta=0.05)), TOKENS),
        "prime_tv": (bypass(policy.prime_tv), TOKENS),
        "drpo": (bypass(partial(policy.drpo, epsilon=12.5)), TOKENS),
        "drpo_spo": (bypass(partial(policy.spo, epsilon=12.5)), TOKENS),
        "dro": (plain(partial(policy.dro, beta=0.5)), TOKENS),
        "vespo": (plain(sequence.vespo), TOKENS),
        "reinforce_tis": (bypass(partial(policy.cispo, high=2.0)), TOKENS),
        "gmpo_nonempty_rows": (plain(sequence.gmpo), ROWS),
        "gmpo_all_rows_verl": (plain(sequence.gmpo), lambda x, m: ROWS(x, m, count=m.shape[0])),
        "ppo*keep_opsm": (opsm_surrogate, TOKENS),
        "ppo*keep_opsm_shrink": (partial(opsm_surrogate, denominator=corrections.surviving), TOKENS),
        "ppo*w_tis_token*keep_geo_seq": (
            plain(PPO, WEIGHTS["w_tis_token"], rejections=(KEEPS["keep_geo_seq"],)),
            TOKENS,
        ),
    }
    table |= {f"ppo*{name}": (plain(PPO, weight), TOKENS) for name, weight in WEIGHTS.items()}
    table |= {f"ppo*{name}": (partial(normalized_surrogate, name=name), TOKENS) for name in NORMALIZED}
    for name, keep in KEEPS.items():
        table[f"ppo*{name}"] = (plain(PPO, rejections=(keep,)), TOKENS)
        shrinking = plain(PPO, rejections=(keep,), denominator=corrections.surviving)
        table[f"ppo*{name}_shrink"] = (shrinking, TOKENS)
    return table


LOSSES = losses()
DIVERGENCES = {"kl_ref_k1": kl.k1, "kl_ref_k2": kl.k2, "kl_ref_k3": kl.k3}
ELSEWHERE = {
    "dcgrpo": "DC shaping is the constraint's, and tested with it",
    "dcgrpo_penalty_variant": "DC shaping is the constraint's, and tested with it",
    "dcgrpo*w_tis_token": "DC shaping is the constraint's, and tested with it",
}


def inputs(case: str) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.float32) for name, value in GOLDEN["cases"][case]["inputs"].items()}


@functools.cache
def value_and_gradient(name: str):
    """The jitted function of an entry, compiled once for all cases."""

    def scalar(logp, x):
        if name in DIVERGENCES:
            return TOKENS(DIVERGENCES[name](logp, x["ref"], x["mask"]), x["mask"])
        surrogate, reducer = LOSSES[name]
        return reducer(*surrogate(logp, x["old"], x["roll"], x["adv"], x["mask"]))

    return jax.jit(jax.value_and_grad(scalar))


@pytest.mark.parametrize("case", CASES)
def test_every_entry_is_compared_or_listed(case):
    file = GOLDEN["cases"][case]
    assert set(file["losses"]) == set(LOSSES) | set(DIVERGENCES) | set(ELSEWHERE)
    assert set(file["corrections"]) == set(WEIGHTS) | set(NORMALIZED) | set(KEEPS) | {"keep_opsm"}
    assert set(GOLDEN["cases"]) == set(CASES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*LOSSES, *DIVERGENCES])
def test_value_and_gradient(case, name):
    x, expected = inputs(case), GOLDEN["cases"][case]["losses"][name]
    value, gradient = value_and_gradient(name)(x["cur"], x)
    np.testing.assert_allclose(value, expected["value"], rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(gradient, expected["grad_cur"], rtol=RTOL, atol=ATOL)
    assert value.dtype == gradient.dtype == jnp.float32
    assert np.all(np.asarray(gradient)[x["mask"] == 0] == 0)


@pytest.mark.parametrize("case", CASES)
def test_weights(case):
    x, expected = inputs(case), GOLDEN["cases"][case]["corrections"]
    for name, correction in WEIGHTS.items():
        weights, keep = correction.weights(x["old"], x["roll"], x["mask"])
        np.testing.assert_allclose(weights, expected[name], rtol=RTOL, err_msg=name)
        np.testing.assert_array_equal(keep, x["mask"] > 0)
    for name, (weight, mean) in NORMALIZED.items():
        weights, _ = WEIGHTS[weight].weights(x["old"], x["roll"], x["mask"])
        weights = corrections.batch_normalize(weights, x["mask"], mean=mean(weights, x["mask"]))
        np.testing.assert_allclose(weights, expected[name], rtol=RTOL, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_keeps(case):
    x, expected = inputs(case), GOLDEN["cases"][case]["corrections"]
    for name, keep in KEEPS.items():
        np.testing.assert_array_equal(keep(x["old"], x["roll"], x["mask"]), expected[name], err_msg=name)
    for name, record in RECORDS.items():
        weights, keep = record.weights(x["old"], x["roll"], x["mask"])
        np.testing.assert_array_equal(keep, expected[name], err_msg=name)
        np.testing.assert_array_equal(weights, expected[name], err_msg=name)
    keep = rejection.opsm(x["cur"], x["roll"], x["adv"], x["mask"], threshold=0.5)
    np.testing.assert_array_equal(keep, expected["keep_opsm"])


def test_advantages():
    file = GOLDEN["advantages"]
    reward, group = np.array(file["rewards"], np.float32), np.array(file["groups"], np.int32)
    of_group = {
        "grpo": advantages.grpo,
        "dr_grpo": advantages.dr_grpo,
        "rloo": advantages.rloo,
        "rfpp_baseline_unwhitened": advantages.dr_grpo,
        "keep_dynamic_sampling": advantages.dynamic_sampling_mask,
    }
    computed = {name: f(reward, group, num_groups=int(group.max()) + 1) for name, f in of_group.items()}
    lengths = np.array(file["lengths"], np.int32)
    computed["overlong_penalty"] = advantages.overlong_penalty(lengths, max_length=10, cache=4)
    token_reward, mask = np.array(file["token_rewards"], np.float32), np.array(file["mask"], np.float32)
    computed["reinforce_pp_gamma1"] = advantages.reinforce_pp(token_reward, mask)
    for name, value in computed.items():
        np.testing.assert_allclose(value, file[name], rtol=RTOL, atol=ATOL, err_msg=name)
    assert set(file) == set(computed) | {"rewards", "groups", "lengths", "token_rewards", "mask"}
