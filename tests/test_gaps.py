"""Gaps by position and at the worst tokens, against loops over the tokens."""

import jax
import numpy as np
import pytest

from dcmdp_jax.monitoring import gaps

N = 12
T = 41


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    old, rollout = (np.log(rng.uniform(0.05, 0.95, (N, T))).astype(np.float32) for _ in range(2))
    mask = np.arange(T) < rng.integers(1, T + 1, N)[:, None]
    rollout[3, 0] = np.nan  # a token whose probability the engine did not report
    return (
        old,
        rollout,
        rng.integers(0, 50, (N, T), dtype=np.int32),
        mask,
        rng.integers(0, 2, N).astype(np.float32),
    )


def decode(ids):
    return "".join(f"<{i}>" for i in ids)


def test_positions_and_worst_tokens_are_those_of_a_loop():
    old, rollout, tokens, mask, reward = arrays()
    made = gaps.record(
        jax.device_get(jax.jit(gaps.measure)(old, rollout, tokens, mask, reward)), T, decode
    )
    delta = np.where(mask & np.isfinite(rollout), np.abs(np.exp(old) - np.exp(rollout)), 0)
    for bucket, (start, end) in zip(
        made["positions"], [(0, 8), (8, 16), (16, 32), (32, 41)], strict=True
    ):
        counted = (mask & np.isfinite(rollout))[:, start:end]
        assert (bucket["from"], bucket["to"], bucket["tokens"]) == (start, end, counted.sum())
        assert bucket["delta"] == pytest.approx(delta[:, start:end].sum() / counted.sum(), rel=1e-5)
    order = sorted(range(N), key=lambda i: -delta[i].max())[: gaps.WORST]
    assert len(made["worst"]) == len(order)
    for found, i in zip(made["worst"], order):
        t = int(delta[i].argmax())
        ids = [int(x) for x in tokens[i, : mask[i].sum()]]
        assert found["position"] == t and found["reward"] == reward[i] and found["token"] == ids[t]
        assert found["before"] == decode(ids[max(0, t - gaps.BEFORE) : t]) and found[
            "text"
        ] == decode(ids[t : t + 1])
        assert found["after"] == decode(ids[t + 1 : t + 1 + gaps.AFTER])
        assert found["delta"] == pytest.approx(delta[i, t], rel=1e-5)
        assert abs(found["pi_train"] - found["pi_infer"]) == pytest.approx(found["delta"], rel=1e-4)


def test_an_exact_engine_has_no_worst_token_and_an_empty_bucket_no_row():
    old, _, tokens, _, reward = arrays()
    mask = np.arange(T) < np.full((N, 1), 9)
    made = gaps.record(jax.device_get(gaps.measure(old, old, tokens, mask, reward)), T, decode)
    assert made == {
        "positions": [
            {"from": 0, "to": 8, "tokens": 8 * N, "delta": 0.0},
            {"from": 8, "to": 16, "tokens": N, "delta": 0.0},
        ],
        "worst": [],
    }


@pytest.mark.parametrize(
    "length, ends", [(1, [0, 1]), (8, [0, 8]), (9, [0, 8, 9]), (64, [0, 8, 16, 32, 64])]
)
def test_buckets_double(length, ends):
    assert gaps.edges(length) == ends
