"""Values and gradients against vectors in float64, made from the formulas.

The vectors are those of `golden`: made by `losses_float64` of inputs of our own, and the files
beside the checkout.
Nothing here is taken from their numbers but the thresholds that they state.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcmdp_jax.losses import (
    advantages,
    corrections,
    diagnostics,
    kl,
    policy,
    reduce,
    rejection,
    sequence,
)
from support import golden, losses_float64

RTOL = 1e-5
# A file's log-probabilities are float64. Rounding one of size 4 to float32 moves it by up to
# 2.4e-7, and a token's loss of size about 1 by a few times that; where tokens of either sign
# cancel, that is what remains.
ATOL = 1e-6

partial = functools.partial
PPO = partial(policy.clipped, clip_low=0.2, clip_high=0.28)
TOKENS = reduce.token_mean
ROWS = reduce.sequence_mean_token_mean
NORMALIZED = {
    "w_tis_token_batchnorm": ("w_tis_token", TOKENS),
    "w_tis_seq_batchnorm": ("w_tis_seq", ROWS),
}


def weights(t: dict) -> dict:
    return {
        "w_tis_token": corrections.tis(t["w_tis_token"]),
        "w_tis_token_C1.05": corrections.tis(1.05),
        "w_tis_seq": corrections.sequence_tis(t["w_tis_seq"]),
        "w_icepop": corrections.icepop(*t["w_icepop"]),
        "w_clip_token": corrections.Correction(
            corrections.token, corrections.clip, *t["w_clip_token"]
        ),
        "w_geo_seq_truncate": corrections.geometric_tis(2.0),
    }


def keeps(t: dict) -> dict:
    def k1(name, level=rejection.each_token):
        return partial(rejection.k1, low=t[name][0], high=t[name][1], level=level)

    return {
        "keep_mis_token": k1("keep_mis_token"),
        "keep_mis_seq": k1("keep_mis_seq", rejection.sequence_sum),
        "keep_geo_seq": k1("keep_geo_seq", rejection.sequence_mean),
        "keep_veto": partial(rejection.veto, threshold=t["keep_veto"]),
        "keep_trm_max_k3": partial(rejection.trust_region, threshold=t["keep_trm_max_k3"]),
        "keep_seq_mean_k3": partial(
            rejection.k3, high=t["keep_seq_mean_k3"], level=rejection.sequence_mean
        ),
        "keep_token_k3": partial(rejection.k3, high=t["keep_token_k3"]),
        "keep_kpop": partial(rejection.kpop, threshold=t["keep_kpop"]),
        "keep_m2po": partial(rejection.m2po, threshold=t["keep_m2po"]),
        "keep_ipo_absprob": partial(rejection.ipo, threshold=t["keep_ipo_absprob"]),
    }


def records(t: dict) -> dict:
    """What a correction record with the operator `reject` keeps, of the same names."""
    return {
        "keep_mis_token": corrections.Correction(
            corrections.token, corrections.reject, *t["keep_mis_token"]
        ),
        "keep_mis_seq": corrections.Correction(
            corrections.sequence, corrections.reject, *t["keep_mis_seq"]
        ),
        "keep_geo_seq": corrections.geometric_mask(*t["keep_geo_seq"]),
    }


def opsm_surrogate(
    logp, old_logp, rollout_logp, advantage, mask, threshold, denominator=corrections.original
):
    keep = rejection.opsm(logp, rollout_logp, advantage, mask, threshold=threshold)
    return jnp.where(keep, PPO(logp, old_logp, advantage, mask), 0.0), denominator(mask > 0, keep)


def normalized_surrogate(logp, old_logp, rollout_logp, advantage, mask, correction, mean):
    weight, _ = correction.weights(old_logp, rollout_logp, mask)
    weight = corrections.batch_normalize(weight, mask, mean=mean(weight, mask))
    return PPO(logp, old_logp, advantage, mask) * weight, mask


def losses(t: dict) -> dict:
    """Name in the file -> (surrogate, reducer)."""
    plain = corrections.decoupled
    bypass = corrections.bypass
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
        "ppo_delta1.5": (plain(partial(PPO, ratio_max=1.5)), TOKENS),
        "ppo_bypass": (bypass(PPO), TOKENS),
        "gspo": (plain(sequence.gspo_token), ROWS),
        "gspo_seq_form": (plain(sequence.gspo), ROWS),
        "sapo": (plain(policy.sapo), ROWS),
        "cispo": (plain(partial(policy.cispo, low=1 - 0.2, high=1 + 0.28)), TOKENS),
        "cispo_abs5": (plain(partial(policy.cispo, high=5.0)), TOKENS),
        "dppo_tv": (
            plain(partial(policy.dppo_tv, tv_low=t["dppo_tv"], tv_high=t["dppo_tv"])),
            TOKENS,
        ),
        "dppo_kl": (plain(partial(policy.dppo_kl, kl_max=t["dppo_kl"])), TOKENS),
        "prime_tv": (bypass(policy.prime_tv), TOKENS),
        "drpo": (bypass(partial(policy.drpo, epsilon=12.5)), TOKENS),
        "drpo_spo": (bypass(partial(policy.spo, epsilon=12.5)), TOKENS),
        "dro": (plain(partial(policy.dro, beta=0.5)), TOKENS),
        "vespo": (plain(sequence.vespo), TOKENS),
        "reinforce_tis": (bypass(partial(policy.cispo, high=2.0)), TOKENS),
        "gmpo_nonempty_rows": (plain(sequence.gmpo), ROWS),
        "gmpo_all_rows_verl": (plain(sequence.gmpo), lambda x, m: ROWS(x, m, count=m.shape[0])),
        "ppo*keep_opsm": (partial(opsm_surrogate, threshold=t["keep_opsm"]), TOKENS),
        "ppo*keep_opsm_shrink": (
            partial(opsm_surrogate, threshold=t["keep_opsm"], denominator=corrections.surviving),
            TOKENS,
        ),
        "ppo*w_tis_token*keep_geo_seq": (
            plain(PPO, weights(t)["w_tis_token"], rejections=(keeps(t)["keep_geo_seq"],)),
            TOKENS,
        ),
    }
    table |= {f"ppo*{name}": (plain(PPO, weight), TOKENS) for name, weight in weights(t).items()}
    for name, (weight, mean) in NORMALIZED.items():
        table[f"ppo*{name}"] = (
            partial(normalized_surrogate, correction=weights(t)[weight], mean=mean),
            TOKENS,
        )
    for name, keep in keeps(t).items():
        table[f"ppo*{name}"] = (plain(PPO, rejections=(keep,)), TOKENS)
        shrinking = plain(PPO, rejections=(keep,), denominator=corrections.surviving)
        table[f"ppo*{name}_shrink"] = (shrinking, TOKENS)
    return table


DIVERGENCES = {"kl_ref_k1": kl.k1, "kl_ref_k2": kl.k2, "kl_ref_k3": kl.k3}
ENTRIES = [*losses(golden.THRESHOLDS), *DIVERGENCES]
# DC shaping is the constraint's, and tested with it.
ELSEWHERE = {"dcgrpo", "dcgrpo_penalty_variant", "dcgrpo*w_tis_token"}


def contents(name: str, case: str) -> tuple[dict[str, np.ndarray], dict]:
    """The inputs of a case in float32, and what the file says of them."""
    file = golden.FILES[name]["cases"][case]
    return {key: np.array(value, np.float32) for key, value in file["inputs"].items()}, file


@functools.cache
def value_and_gradient(name: str, entry: str):
    """The jitted function of an entry at a file's thresholds, compiled once for its cases."""

    def scalar(logp, x):
        if entry in DIVERGENCES:
            return TOKENS(DIVERGENCES[entry](logp, x["ref"], x["mask"]), x["mask"])
        surrogate, reducer = losses(golden.thresholds(name))[entry]
        return reducer(*surrogate(logp, x["old"], x["roll"], x["adv"], x["mask"]))

    return jax.jit(jax.value_and_grad(scalar))


@golden.every_case
def test_every_entry_is_compared_or_listed(name, case):
    _, file = contents(name, case)
    t = golden.thresholds(name)
    assert set(file["losses"]) == set(ENTRIES) | ELSEWHERE
    assert set(file["corrections"]) == set(weights(t)) | set(NORMALIZED) | set(keeps(t)) | {
        "keep_opsm"
    }
    assert set(t) == set(golden.THRESHOLDS), "a threshold that no entry reads"


@pytest.mark.skipif("losses_2" not in golden.GIVEN, reason="no ../shared/golden/losses_2.json")
def test_the_second_file_states_every_threshold():
    assert set(golden.GIVEN["losses_2"]["thresholds"]) == set(golden.THRESHOLDS)


@pytest.mark.full
@golden.every_case
@pytest.mark.parametrize("entry", ENTRIES)
def test_value_and_gradient(name, case, entry):
    x, file = contents(name, case)
    value, gradient = value_and_gradient(name, entry)(x["cur"], x)
    np.testing.assert_allclose(value, file["losses"][entry]["value"], rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(gradient, file["losses"][entry]["grad_cur"], rtol=RTOL, atol=ATOL)
    assert value.dtype == gradient.dtype == jnp.float32
    assert np.all(np.asarray(gradient)[x["mask"] == 0] == 0)


@golden.every_case
def test_weights(name, case):
    x, file = contents(name, case)
    table = weights(golden.thresholds(name))
    for entry, correction in table.items():
        weight, keep = correction.weights(x["old"], x["roll"], x["mask"])
        np.testing.assert_allclose(weight, file["corrections"][entry], rtol=RTOL, err_msg=entry)
        np.testing.assert_array_equal(keep, x["mask"] > 0)
    for entry, (of, mean) in NORMALIZED.items():
        weight, _ = table[of].weights(x["old"], x["roll"], x["mask"])
        weight = corrections.batch_normalize(weight, x["mask"], mean=mean(weight, x["mask"]))
        np.testing.assert_allclose(weight, file["corrections"][entry], rtol=RTOL, err_msg=entry)


@golden.every_case
def test_keeps(name, case):
    x, file = contents(name, case)
    t = golden.thresholds(name)
    expected = file["corrections"]
    for entry, keep in keeps(t).items():
        kept = keep(x["old"], x["roll"], x["mask"])
        np.testing.assert_array_equal(kept, expected[entry], err_msg=entry)
    for entry, record in records(t).items():
        weight, keep = record.weights(x["old"], x["roll"], x["mask"])
        np.testing.assert_array_equal(keep, expected[entry], err_msg=entry)
        np.testing.assert_array_equal(weight, expected[entry], err_msg=entry)
    keep = rejection.opsm(x["cur"], x["roll"], x["adv"], x["mask"], threshold=t["keep_opsm"])
    np.testing.assert_array_equal(keep, expected["keep_opsm"])


@golden.every_file
def test_advantages(file):
    file = file["advantages"]
    reward = np.array(file["rewards"], np.float32)
    group = np.array(file["groups"], np.int32)
    of_group = {
        "grpo": advantages.grpo,
        "dr_grpo": advantages.dr_grpo,
        "rloo": advantages.rloo,
        "rfpp_baseline_unwhitened": advantages.dr_grpo,
        "keep_dynamic_sampling": advantages.dynamic_sampling_mask,
    }
    computed = {
        name: f(reward, group, num_groups=int(group.max()) + 1) for name, f in of_group.items()
    }
    lengths = np.array(file["lengths"], np.int32)
    computed["overlong_penalty"] = advantages.overlong_penalty(lengths, max_length=10, cache=4)
    token_reward = np.array(file["token_rewards"], np.float32)
    mask = np.array(file["mask"], np.float32)
    computed["reinforce_pp_gamma1"] = advantages.reinforce_pp(token_reward, mask)
    for name, value in computed.items():
        np.testing.assert_allclose(value, file[name], rtol=RTOL, atol=ATOL, err_msg=name)
    assert set(file) == set(computed) | {"rewards", "groups", "lengths", "token_rewards", "mask"}


@pytest.mark.skipif(not golden.GIVEN, reason="no golden file in ../shared/golden or DCMDP_GOLDEN")
def test_our_vectors_are_those_of_another_hand():
    """`losses_float64` on a given file's inputs: each of its numbers to nine digits."""
    parts = {
        "controllers": losses_float64.controllers,
        "advantages": losses_float64.advantages,
        "score_centering": losses_float64.score_centering,
    }
    for name, file in golden.GIVEN.items():
        for case in file["cases"].values():
            same_numbers(losses_float64.of_case(case["inputs"], golden.thresholds(name)), case)
        for part, function in parts.items():
            computed = function(file[part])
            same_numbers(computed, {key: file[part][key] for key in computed})


def same_numbers(computed, expected):
    if isinstance(expected, dict):
        assert set(computed) == set(expected)
        for key, value in expected.items():
            same_numbers(computed[key], value)
    else:
        np.testing.assert_allclose(computed, np.array(expected, float), rtol=1e-9, atol=1e-11)


def test_a_completion_s_log_ratio_is_clamped_once_after_the_sum():
    """D of -30 and 15.25: the ratio is exp(-14.75); with -30 clamped first it were exp(-4.75)."""
    old = np.float32([[-30.25, -0.25]])
    rollout = np.float32([[-0.25, -15.5]])
    mask = np.ones((1, 2), bool)
    once = np.exp(-14.75)
    product, _ = corrections.sequence_tis(2.0).weights(old, rollout, mask)
    np.testing.assert_allclose(product, [[once, once]], rtol=1e-5)
    near = partial(rejection.k1, low=0.99 * once, high=1.01 * once, level=rejection.sequence_sum)
    assert np.all(near(old, rollout, mask))
    chi2 = diagnostics.chi2(old, rollout, mask)["chi2_sequence"]
    np.testing.assert_allclose(chi2, np.expm1(-29.5), rtol=1e-6)
    # VESPO, A >= 0: exp(3 + 2 log w - 3 w), of the same log w.
    loss = sequence.vespo(old, rollout, np.ones_like(old), mask)
    np.testing.assert_allclose(loss, -np.exp(3 - 29.5 - 3 * once) * old, rtol=1e-5)
