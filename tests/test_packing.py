"""Packing: every token exactly once, where `index` says."""

import collections

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcmdp_jax.records import Example, Prompts, Scored
from dcmdp_jax.tokens.packing import pack
from support.rollouts import make_rollout


def completions(prompt_lengths, samples, lengths, seed=0):
    """A rollout with distinct tokens (and garbage in the padding), so that each can be told from
    every other.
    """
    rng = np.random.default_rng(seed)
    count = len(lengths)
    width = max(1, max(lengths))
    asked = np.array(prompt_lengths, np.int32)
    told = np.array(lengths, np.int32)
    prompt = 10_000 * (1 + np.arange(len(asked)))[:, None] + np.arange(asked.max() + 2)
    tokens = 1_000_000 * (1 + np.arange(count))[:, None] + np.arange(width)
    logp = np.where(np.arange(width) < told[:, None], -rng.random((count, width)), np.nan).astype(
        np.float32
    )
    prompts = Prompts(
        prompt.astype(np.int32), asked, tuple(Example(str(i), "") for i in range(len(asked)))
    )
    rollout = make_rollout(prompts, tokens, told, logp, told % 2 == 0)
    assert count == len(asked) * samples
    return Scored(rollout, rng.random(count).astype(np.float32))


@st.composite
def packings(draw):
    groups = draw(st.integers(1, 6))
    samples = draw(st.integers(1, 6))
    count = groups * samples
    parts = draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    minibatches = draw(st.sampled_from([n for n in range(1, parts + 1) if parts % n == 0]))
    scored = completions(
        draw(st.lists(st.integers(1, 6), min_size=groups, max_size=groups)),
        samples,
        draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)),
    )
    return scored, {
        "minibatches": minibatches,
        "microbatches": parts // minibatches,
        "row_length": draw(st.integers(15, 40)),
        "row_divisor": draw(st.integers(1, 4)),
        "pad_id": -1,
        "seed": draw(st.integers(0, 9)),
    }


@settings(max_examples=150, deadline=None)
@given(packings())
def test_packed_rows_hold_every_token_once(packing):
    scored, how = packing
    rollout = scored.rollout
    batch = pack(scored, **how)
    prompts, samples = rollout.prompts, len(rollout.tokens) // len(rollout.prompts.lengths)
    expected = collections.Counter(
        t
        for i in range(len(rollout.tokens))
        for t in [
            *prompts.tokens[i // samples][: prompts.lengths[i // samples]],
            *rollout.tokens[i][: rollout.lengths[i]],
        ]
    )
    assert collections.Counter(batch.tokens[batch.segment_ids > 0].tolist()) == expected


@settings(max_examples=50, deadline=None)
@given(packings())
def test_the_rest_of_a_packed_row_is_padding(packing):
    scored, how = packing
    batch = pack(scored, **how)
    padding = batch.segment_ids == 0
    assert (batch.tokens[padding] == how["pad_id"]).all()
    assert (batch.positions[padding] == 0).all()


@settings(max_examples=150, deadline=None)
@given(packings())
def test_the_number_of_rows_is_a_bucket(packing):
    """One of four in each doubling times the divisor, or enough rows for one completion each."""
    scored, how = packing
    batch = pack(scored, **how)
    rows, width = batch.tokens.shape[2:]
    size = len(scored.reward) // how["minibatches"] // how["microbatches"]
    assert width == how["row_length"] and rows % how["row_divisor"] == 0
    bucket = rows // how["row_divisor"]
    buckets = {count << doubling for doubling in range(10) for count in (1, 5, 6, 7)}
    assert bucket in buckets | {3} or rows - how["row_divisor"] < size <= rows


@settings(max_examples=50, deadline=None)
@given(packings())
def test_a_batch_has_minibatches_of_microbatches(packing):
    scored, how = packing
    batch = pack(scored, **how)
    parts = (how["minibatches"], how["microbatches"])
    assert batch.tokens.shape[:2] == batch.reward.shape[:2] == parts


def test_a_batch_holds_32_bit_numbers_and_booleans():
    batch = pack(completions([2], 2, [1, 3]), minibatches=1, microbatches=1, row_length=8)
    kinds = {field.dtype for field in batch if field is not None}
    assert kinds == {np.dtype("int32"), np.dtype("float32"), np.dtype("bool")}


@settings(max_examples=150, deadline=None)
@given(packings())
def test_unpacking_gives_the_completions_back(packing):
    scored, how = packing
    rollout = scored.rollout
    batch = pack(scored, **how)
    samples = len(rollout.tokens) // len(rollout.prompts.lengths)
    seen = []
    for at in np.ndindex(*batch.reward.shape[:2]):
        tokens, segments, positions = (
            x[at].reshape(-1) for x in (batch.tokens, batch.segment_ids, batch.positions)
        )
        for j in range(batch.reward.shape[2]):
            i = np.flatnonzero(rollout.tokens[:, 0] == batch.completions[at][j, 0]).item()
            seen.append(i)
            length = rollout.lengths[i]
            asked = rollout.prompts.lengths[i // samples]
            index = batch.index[at][j]
            mask = batch.mask[at][j]
            assert mask.tolist() == [t < length for t in range(len(mask))]
            assert (index[~mask] == 0).all()
            # what `index` predicts
            np.testing.assert_array_equal(tokens[index[mask] + 1], rollout.tokens[i, :length])
            np.testing.assert_array_equal(segments[index[mask]], segments[index[mask] + 1])
            np.testing.assert_array_equal(positions[index[mask]], asked - 1 + np.arange(length))
            if length:
                whole = slice(index[0] - asked + 1, index[0] + 1 + length)
                np.testing.assert_array_equal(
                    tokens[whole][:asked], rollout.prompts.tokens[i // samples, :asked]
                )
                np.testing.assert_array_equal(positions[whole], np.arange(asked + length))
                assert len(set(segments[whole].tolist())) == 1
            np.testing.assert_array_equal(batch.completions[at][j], rollout.tokens[i])
            np.testing.assert_array_equal(batch.rollout_logp[at][j], rollout.rollout_logp[i])
            assert (batch.reward[at][j], batch.group[at][j]) == (scored.reward[i], i // samples)
            assert (batch.length[at][j], batch.truncated[at][j]) == (length, not rollout.stopped[i])
    assert sorted(seen) == list(range(len(rollout.tokens)))


@settings(max_examples=100, deadline=None)
@given(packings())
def test_segments_are_numbered_and_contiguous(packing):
    scored, how = packing
    batch = pack(scored, **how)
    rows = (x.reshape(-1, how["row_length"]) for x in (batch.segment_ids, batch.positions))
    for segments, positions in zip(*rows):
        inside = segments[segments > 0]
        assert (segments[: len(inside)] == inside).all()
        starts = np.flatnonzero(positions[: len(inside)] == 0)
        np.testing.assert_array_equal(inside[starts], 1 + np.arange(len(starts)))
        assert (np.diff(inside) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(packings())
def test_experts_go_to_the_tokens_that_they_were_chosen_for(packing):
    """What made completion token t's distribution stands at `index` of t, one place before t; all
    else routes freely.
    """
    scored, how = packing
    recorded = (
        np.random.default_rng(0)
        .integers(0, 9, (*scored.rollout.tokens.shape, 3, 2))
        .astype(np.int32)
    )
    batch = pack(scored._replace(rollout=scored.rollout._replace(experts=recorded)), **how)
    plain = pack(scored, **how)
    assert plain.replayed is None
    jax.tree.map(np.testing.assert_array_equal, batch._replace(replayed=None), plain)
    owner = batch.completions[..., 0] // 1_000_000 - 1
    for at in np.ndindex(*batch.reward.shape[:2]):
        left = batch.replayed[at].reshape(-1, 3, 2).copy()
        for j, i in enumerate(owner[at]):
            index = batch.index[at][j][batch.mask[at][j]]
            np.testing.assert_array_equal(left[index], recorded[i, : scored.rollout.lengths[i]])
            left[index] = -1
        assert (left == -1).all()


@pytest.fixture
def mixed():
    """64 segments of 32, 16 and 8 tokens, which fill 18 rows of 64."""
    return completions([4] * 8, 8, [28] * 16 + [12] * 32 + [4] * 16)


def test_first_fit_fills_rows(mixed):
    batch = pack(mixed, minibatches=1, microbatches=1, row_length=64)
    assert batch.tokens.shape[2] == 20  # 18 rows, in the next bucket
    assert (batch.segment_ids[0, 0] > 0).all(axis=1).sum() == 18


def test_one_shape_serves_all_orders(mixed):
    how = {"minibatches": 2, "microbatches": 2, "row_length": 64, "row_divisor": 2}
    shapes = {pack(mixed, **how, seed=seed).tokens.shape for seed in range(30)}
    assert shapes == {(2, 2, 6, 64)}


@pytest.mark.parametrize(
    "count, tokens, row_length, row_divisor, rows",
    [
        (32, 16, 64, 1, 8),  # four to a row
        (64, 32, 32, 24, 72),  # 64 rows of one, over 24 shards
        (6, 32, 32, 1, 6),  # not more rows than completions
    ],
)
def test_rows_of_equal_segments(count, tokens, row_length, row_divisor, rows):
    scored = completions([4] * count, 1, [tokens - 4] * count)
    batch = pack(
        scored, minibatches=1, microbatches=1, row_length=row_length, row_divisor=row_divisor
    )
    assert batch.tokens.shape[2] == rows


def test_rows_divide_over_shards(mixed):
    batch = pack(mixed, minibatches=1, microbatches=1, row_length=32, row_divisor=24)
    assert batch.tokens.shape[2] == 48


def test_microbatches_of_a_minibatch_have_about_as_many_tokens():
    """By hand: 1..8 dealt to and fro over two are 8, 5, 4, 1 and 7, 6, 3, 2. At random, minibatches
    of 64 skewed lengths differ by more than the longest completion.
    """
    scored = completions([1] * 8, 1, list(range(8)))
    batch = pack(scored, minibatches=1, microbatches=2, row_length=8)
    assert [sorted(part) for part in batch.length[0]] == [[0, 3, 4, 7], [1, 2, 5, 6]]

    lengths = np.random.default_rng(0).exponential(20, 256).astype(int)
    batch = pack(
        completions([1] * 256, 1, list(lengths)), minibatches=4, microbatches=4, row_length=256
    )
    tokens = batch.length.sum(-1)
    assert (tokens.max(1) - tokens.min(1) <= lengths.max()).all()
    assert len(set(map(tuple, np.sort(batch.length.reshape(4, -1))))) == 4, "minibatches are random"


def test_seeds_give_other_orders():
    scored = completions([3] * 4, 4, [5] * 16)
    orders = {
        pack(scored, minibatches=2, microbatches=1, row_length=8, seed=s).completions.tobytes()
        for s in range(20)
    }
    assert len(orders) == 20


def test_one_seed_gives_one_batch():
    scored = completions([3] * 4, 4, [5] * 16)
    first, again = (
        pack(scored, minibatches=2, microbatches=1, row_length=8, seed=1) for _ in range(2)
    )
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)


def test_a_batch_is_compared_before_the_support_is_cut():
    """log p = rollout_logp + log support_mass on every token."""
    scored = completions([2, 3], 2, [4, 1, 0, 3])
    rng = np.random.default_rng(1)
    p = rng.uniform(0.01, 0.5, scored.rollout.tokens.shape)
    inside = np.arange(4) < scored.rollout.lengths[:, None]
    kept = np.where(inside, rng.uniform(0.5, 1, p.shape), 0).astype(np.float32)
    logp = np.log(p / np.maximum(kept, 0.1)).astype(np.float32)
    cut = scored.rollout._replace(rollout_logp=logp, support_mass=kept)
    batch = pack(scored._replace(rollout=cut), minibatches=1, microbatches=2, row_length=8)
    order = [int(np.flatnonzero(scored.reward == reward)[0]) for reward in batch.reward.reshape(-1)]
    mask = batch.mask.reshape(p.shape)
    assert mask.sum() == 8
    found = batch.rollout_logp.reshape(p.shape)[mask]
    np.testing.assert_allclose(found, np.log(p)[order][mask], rtol=1e-6)


@pytest.mark.parametrize(
    "prompt_lengths, minibatches, row_length, message",
    [
        ([3, 3], 3, 8, "4 completions do not divide into .* = 3"),
        ([3, 3], 1, 7, "8 tokens, more than algorithm.row_length=7"),
        ([3, 0], 1, 8, "a prompt is empty"),
    ],
)
def test_packing_refuses(prompt_lengths, minibatches, row_length, message):
    scored = completions(prompt_lengths, 2, [5, 1, 2, 3])
    with pytest.raises(ValueError, match=message):
        pack(scored, minibatches=minibatches, microbatches=1, row_length=row_length)
