"""Packing: every token exactly once, where `index` says."""

import collections
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcmdp_jax.records import Example, Prompts, Scored
from dcmdp_jax.tokens import packing as packing_module
from dcmdp_jax.tokens import segments
from dcmdp_jax.tokens.packing import pack
from support.rollouts import make_rollout

FIRST = 1_000_000  # tokens of completions are at least this


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
    tokens = FIRST * (1 + np.arange(count))[:, None] + np.arange(width)
    logp = np.where(np.arange(width) < told[:, None], -rng.random((count, width)), np.nan).astype(
        np.float32
    )
    prompts = Prompts(
        prompt.astype(np.int32), asked, tuple(Example(str(i), "") for i in range(len(asked)))
    )
    rollout = make_rollout(prompts, tokens, told, logp, told % 2 == 0)
    assert count == len(asked) * samples
    return Scored(rollout, rng.random(count).astype(np.float32))


def placed(batch):
    """Yields the microbatch of each completion, its number there, and its number in the rollout."""
    for at in np.ndindex(*batch.reward.shape[:2]):
        for j, tokens in enumerate(batch.completions[at]):
            yield at, j, tokens[0] // FIRST - 1


@st.composite
def packings(draw, share_prompts=None):
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
        "share_prompts": draw(st.booleans()) if share_prompts is None else share_prompts,
    }


@settings(max_examples=150, deadline=None)
@given(packings())
def test_packed_rows_hold_every_completion_token_once(packing):
    scored, how = packing
    rollout = scored.rollout
    batch = pack(scored, **how)
    tokens = batch.tokens[batch.segment_ids > 0]
    expected = [t for row, n in zip(rollout.tokens, rollout.lengths) for t in row[:n]]
    assert collections.Counter(tokens[tokens >= FIRST].tolist()) == collections.Counter(expected)


@settings(max_examples=150, deadline=None)
@given(packings())
def test_a_completion_attends_to_its_prompt_and_to_itself(packing):
    """The tokens of its segment, and of the prompt that this continues, are in the order of their
    positions the prompt and the completion.
    """
    scored, how = packing
    rollout = scored.rollout
    batch = pack(scored, **how)
    samples = len(rollout.tokens) // len(rollout.prompts.lengths)
    for at, j, i in placed(batch):
        place = batch.index[at][j, 0]
        if not rollout.lengths[i]:
            continue
        row = place // how["row_length"]
        ids = batch.segment_ids[at][row]
        column = place % how["row_length"]
        seen = ids == ids[column]
        if how["share_prompts"] and batch.prefix_ids[at][row, column]:
            seen |= ids == batch.prefix_ids[at][row, column]
            seen &= np.arange(len(ids)) < column + 1 + rollout.lengths[i]
        asked = rollout.prompts.lengths[i // samples]
        whole = [*rollout.prompts.tokens[i // samples, :asked], *rollout.tokens[i]]
        whole = whole[: asked + rollout.lengths[i]]
        assert batch.tokens[at][row][seen].tolist() == whole
        assert batch.positions[at][row][seen].tolist() == list(range(len(whole)))


@settings(max_examples=150, deadline=None)
@given(packings(share_prompts=True))
def test_shared_prompts_take_no_more_rows_and_tokens(packing):
    """Of the same completions in each microbatch, each with a prompt of its own."""
    scored, how = packing
    batch = pack(scored, **how)
    rollout = scored.rollout
    samples = len(rollout.tokens) // len(rollout.prompts.lengths)
    needed = []
    for at in np.ndindex(*batch.reward.shape[:2]):
        own = np.array([i for there, _, i in placed(batch) if there == at])
        lengths = rollout.prompts.lengths[own // samples], rollout.lengths[own]
        alone = segments.place(*lengths, np.arange(len(own)), how["row_length"])
        together = segments.place(*lengths, own // samples, how["row_length"])
        assert together.row.max() <= alone.row.max()
        assert together.length.sum() <= alone.length.sum()
        needed.append(int(together.row.max()) + 1)
    rows = packing_module.padded_rows(max(needed), batch.reward.shape[2], how["row_divisor"])
    assert batch.tokens.shape[2] == rows


@settings(max_examples=150, deadline=None)
@given(packings(share_prompts=True))
def test_a_shared_prompt_is_followed_by_its_branches(packing):
    """What the attention kernels rely on: between a prompt and its last branch there are no other
    segments. No prompt of one token is shared, and none by a single completion.
    """
    scored, how = packing
    batch = pack(scored, **how)
    rows = (x.reshape(-1, how["row_length"]) for x in (batch.segment_ids, batch.prefix_ids))
    for ids, prefixes in zip(*rows):
        for prompt in set(prefixes[prefixes > 0].tolist()):
            (branches,) = np.nonzero(prefixes == prompt)
            (place,) = np.nonzero(ids == prompt)
            assert len(place) and (prefixes[place] == 0).all()
            assert place[-1] + 1 == branches[0]
            assert (np.diff(branches) == 1).all()
            assert len(set(ids[branches].tolist())) > 1


@settings(max_examples=150, deadline=None)
@given(packings())
def test_no_batch_has_more_rows_than_the_most(packing):
    scored, how = packing
    rollout = scored.rollout
    count = len(rollout.tokens)
    most = packing_module.most_rows(
        count=count,
        samples=count // len(rollout.prompts.lengths),
        parts=how["minibatches"] * how["microbatches"],
        prompt_tokens=6,
        completion_tokens=9,
        row_length=how["row_length"],
        row_divisor=how["row_divisor"],
        share_prompts=how["share_prompts"],
    )
    assert pack(scored, **how).tokens.shape[2] <= most


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
    for at, j, i in placed(batch):
        seen.append(i)
        tokens, ids, positions = (
            x[at].reshape(-1) for x in (batch.tokens, batch.segment_ids, batch.positions)
        )
        length = rollout.lengths[i]
        asked = rollout.prompts.lengths[i // samples]
        index = batch.index[at][j]
        mask = batch.mask[at][j]
        assert mask.tolist() == [t < length for t in range(len(mask))]
        assert (index[~mask] == 0).all()
        # what `index` predicts
        np.testing.assert_array_equal(tokens[index[mask] + 1], rollout.tokens[i, :length])
        np.testing.assert_array_equal(ids[index[mask]], ids[index[mask] + 1])
        np.testing.assert_array_equal(positions[index[mask]], asked - 1 + np.arange(length))
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
    for ids in batch.segment_ids.reshape(-1, how["row_length"]):
        inside = ids[ids > 0]
        assert (ids[: len(inside)] == inside).all()
        assert (np.diff(inside, prepend=0) >= 0).all() and (np.diff(inside, prepend=0) <= 1).all()


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
    left = batch.replayed.reshape(*batch.reward.shape[:2], -1, 3, 2).copy()
    for at, j, i in placed(batch):
        index = batch.index[at][j][batch.mask[at][j]]
        np.testing.assert_array_equal(left[at][index], recorded[i, : scored.rollout.lengths[i]])
        left[at][index] = -1
    assert (left == -1).all()


def groups_of(batch):
    """The groups of each microbatch's completions."""
    return batch.group.reshape(-1, batch.group.shape[-1]).tolist()


@pytest.mark.parametrize(
    "minibatches, microbatches", [(1, 1), (2, 1), (1, 6), (3, 2)], ids=lambda n: str(n)
)
def test_groups_stay_whole_where_microbatches_hold_a_multiple(minibatches, microbatches):
    scored = completions([3] * 6, 4, [5] * 24)
    batch = pack(
        scored,
        minibatches=minibatches,
        microbatches=microbatches,
        row_length=40,
        share_prompts=True,
    )
    held = [collections.Counter(groups) for groups in groups_of(batch)]
    assert all(count == 4 for counter in held for count in counter.values())


@pytest.mark.parametrize(
    "groups, microbatches, parts",
    [
        (6, 12, 12),  # two microbatches to a group
        (3, 2, 4),  # one group of three is cut
        (6, 4, 8),  # two of six
        (4, 3, None),  # refused: 16 completions in three parts
    ],
)
def test_groups_are_cut_into_as_few_parts_as_possible(groups, microbatches, parts):
    scored = completions([3] * groups, 4, [5] * (4 * groups))
    how = {"minibatches": 1, "microbatches": microbatches, "row_length": 40, "share_prompts": True}
    if parts is None:
        with pytest.raises(ValueError, match="do not divide"):
            pack(scored, **how)
    else:
        assert sum(len(set(held)) for held in groups_of(pack(scored, **how))) == parts


def test_the_halves_of_a_group_have_about_as_many_tokens():
    """By hand: 1, 3, 5, 7 dealt to and fro over two are 7, 1 and 5, 3."""
    scored = completions([2, 2], 4, [1, 3, 5, 7] * 2)
    batch = pack(scored, minibatches=1, microbatches=4, row_length=16, share_prompts=True)
    assert [sorted(part) for part in batch.length[0]] == [[1, 7], [3, 5]] * 2


def test_microbatches_of_whole_groups_have_about_as_many_tokens():
    """By hand: prompts of 1, 4, 6 and 9 tokens are dealt to and fro over two as 9, 1 and 6, 4."""
    scored = completions([1, 4, 6, 9], 2, [3] * 8)
    batch = pack(scored, minibatches=1, microbatches=2, row_length=20, share_prompts=True)
    assert [sorted(set(part)) for part in groups_of(batch)] == [[0, 3], [1, 2]]


@settings(max_examples=150, deadline=None)
@given(packings(share_prompts=True))
def test_sharing_takes_no_more_rows_than_the_same_minibatches_without(packing):
    scored, how = packing
    own = pack(scored, **how | {"share_prompts": False}, draw_groups=True)
    assert pack(scored, **how).tokens.shape[2] <= own.tokens.shape[2]


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_skewed_lengths_take_no_more_rows_shared(seed):
    """One group to a microbatch, of log-normal lengths whose groups differ by more than their
    completions: the longest group alone would need more rows than a mean microbatch.
    """
    rng = np.random.default_rng(seed)
    scale = rng.normal(0, 0.7, (16, 1)) + rng.normal(0, 0.4, (16, 8))
    lengths = np.exp(5 + scale).astype(int)
    scored = completions([40] * 16, 8, list(lengths.reshape(-1)))
    how = {"minibatches": 1, "microbatches": 16, "row_length": 40 + int(lengths.max())}
    whole = segments.place(
        np.full(8, 40), lengths[lengths.sum(1).argmax()], np.zeros(8, int), how["row_length"]
    )
    own = pack(scored, **how).tokens.shape[2]
    shared = pack(scored, **how, share_prompts=True).tokens.shape[2]
    assert shared <= own < whole.row.max() + 1


@pytest.mark.parametrize(
    "ways", [[{}], [{"draw_groups": True}, {"share_prompts": True}]], ids=["completions", "groups"]
)
def test_minibatches_depend_on_whether_groups_are_drawn_alone(ways):
    """Not on the number of microbatches, on the rows, or on whether these share prompts: a run that
    is resumed with others makes its updates of the same completions.
    """
    scored = completions([3] * 6, 4, list(np.random.default_rng(0).integers(0, 9, 24)))
    held = set()
    for way, microbatches, row_length in itertools.product(ways, (1, 2, 3, 4, 6, 12), (15, 40)):
        how = {"microbatches": microbatches, "row_length": row_length, "seed": 1} | way
        order = packing_module.packing_order(scored.rollout, minibatches=2, **how)
        held.add(tuple(frozenset(part) for part in np.split(order, 2)))
    assert len(held) == 1


def test_minibatches_are_draws_of_groups():
    scored = completions([3] * 4, 4, [5] * 16)
    drawn = set()
    for seed in range(40):
        batch = pack(
            scored, minibatches=2, microbatches=1, row_length=40, seed=seed, share_prompts=True
        )
        drawn.add(frozenset(groups_of(batch)[0]))
    assert len(drawn) == 6  # pairs of four


def test_a_family_by_hand():
    """A prompt of three tokens with completions of two and one, in a row with its padding."""
    scored = completions([3], 2, [1, 2])
    batch = pack(scored, minibatches=1, microbatches=1, row_length=8, pad_id=-1, share_prompts=True)
    a, b, c = 10_000, 10_001, 10_002
    first, second = FIRST, 2 * FIRST
    assert batch.tokens[0, 0].tolist() == [[a, b, c, second, second + 1, c, first, -1]]
    assert batch.positions[0, 0].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert batch.segment_ids[0, 0].tolist() == [[1, 1, 2, 2, 2, 3, 3, 0]]
    assert batch.prefix_ids[0, 0].tolist() == [[0, 0, 1, 1, 1, 1, 1, 0]]


def test_a_family_too_long_for_a_row_is_cut_with_its_prompt():
    """Four branches of six tokens after four of the prompt: two to a row of 16."""
    scored = completions([5], 4, [5] * 4)
    batch = pack(scored, minibatches=1, microbatches=1, row_length=16, share_prompts=True)
    assert batch.segment_ids[0, 0].tolist() == [[1] * 4 + [2] * 6 + [3] * 6] * 2


def test_a_prompt_of_one_token_is_not_shared():
    scored = completions([1, 1], 2, [3, 2, 1, 0])
    batch = pack(scored, minibatches=1, microbatches=1, row_length=16, share_prompts=True)
    assert not batch.prefix_ids.any()


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
