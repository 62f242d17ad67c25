"""Completions packed into rows for the model, with the map back to completions.

`segments.py` says where they stand in the rows.
"""

from __future__ import annotations

import numpy as np

from dcmdp_jax.records import Batch, Rollout, Scored
from dcmdp_jax.tokens import segments


def pack(
    scored: Scored,
    *,
    minibatches: int,
    microbatches: int,
    row_length: int,
    row_divisor: int = 1,
    pad_id: int = 0,
    seed: int | tuple[int, ...] = 0,
    draw_groups: bool = False,
    share_prompts: bool = False,
    with_versions: bool = False,
) -> Batch:
    """Packs the completions into M x A microbatches of R rows of S tokens.

    Completions are dealt as `packing_order` says, and rows filled as `segments.place` says. With
    `share_prompts` the completions of a group that stand in one row share their prompt, and groups
    are drawn as with `draw_groups`.

    R is the same in every microbatch: `row_divisor` times a number of `row_count`, or the number of
    rows that n completions can need at most if that is less, so that few shapes are compiled.
    Recorded experts lie on the tokens that they were chosen for, which are the tokens before those
    of the completion: the prompt's last to the completion's last but one.
    Log-probs are those of `full_vocab_logp`. Raises ValueError if the completions do not divide
    into M x A parts, if a row is too short, or if a prompt is empty.
    """
    rollout = scored.rollout
    parts = minibatches * microbatches
    count, width = rollout.tokens.shape
    _check(rollout, parts, row_length)
    order = packing_order(
        rollout,
        minibatches=minibatches,
        microbatches=microbatches,
        row_length=row_length,
        row_divisor=row_divisor,
        seed=seed,
        draw_groups=draw_groups,
        share_prompts=share_prompts,
    )
    group = _groups(rollout)[order]
    prompt_lengths = rollout.prompts.lengths[group]
    completion_lengths = rollout.lengths[order]
    of_part = _place(rollout, order.reshape(parts, -1), row_length, share_prompts)
    rows = padded_rows(_needed_rows(of_part), count // parts, row_divisor)
    placed = segments.join(of_part, rows)
    shape = (minibatches, microbatches, rows, row_length)
    tokens, positions, segment_ids, prefix_ids = _fill_rows(
        placed,
        rollout.prompts.tokens[group],
        prompt_lengths,
        rollout.tokens[order],
        shape,
        pad_id,
    )
    predicts = _last_of_prompts(placed, prompt_lengths, row_length)[:, None] + np.arange(width)
    mask = np.arange(width) < completion_lengths[:, None]
    replayed = None
    if rollout.experts is not None:
        recorded = rollout.experts[order]
        replayed = np.full((*shape, *recorded.shape[2:]), -1, np.int16)
        replayed.reshape(-1, *recorded.shape[2:])[predicts[mask]] = recorded[mask]

    def deal(values: np.ndarray) -> np.ndarray:
        return values.reshape(minibatches, microbatches, count // parts, *values.shape[1:])

    return Batch(
        tokens=tokens,
        positions=positions,
        segment_ids=segment_ids,
        index=deal(np.where(mask, predicts % (rows * row_length), 0).astype(np.int32)),
        completions=deal(rollout.tokens[order]),
        mask=deal(mask),
        rollout_logp=deal(full_vocab_logp(rollout)[order]),
        reward=deal(scored.reward[order]),
        length=deal(completion_lengths),
        truncated=deal(~rollout.stopped[order]),
        group=deal(group.astype(np.int32)),
        prefix_ids=prefix_ids if share_prompts else None,
        replayed=replayed,
        top_tokens=None if rollout.top_tokens is None else deal(rollout.top_tokens[order]),
        top_rollout_logp=None if rollout.top_logp is None else deal(rollout.top_logp[order]),
        version=deal(rollout.version[order]) if with_versions else None,
    )


def _check(rollout: Rollout, parts: int, row_length: int) -> None:
    count = len(rollout.lengths)
    if count % parts:
        raise ValueError(
            f"{count} completions do not divide into algorithm.minibatches * "
            f"algorithm.microbatches = {parts} parts"
        )
    if rollout.prompts.lengths.min() < 1:
        raise ValueError("a prompt is empty; the first completion token has nothing to follow")
    longest = (rollout.prompts.lengths[_groups(rollout)] + rollout.lengths).max()
    if longest > row_length:
        raise ValueError(
            f"a prompt and its completion have {longest} tokens, more than "
            f"algorithm.row_length={row_length}"
        )


def packing_order(
    rollout: Rollout,
    *,
    minibatches: int,
    microbatches: int,
    row_length: int,
    row_divisor: int = 1,
    seed: int | tuple[int, ...] = 0,
    draw_groups: bool = False,
    share_prompts: bool = False,
) -> np.ndarray:
    """Returns [N] int: the number of each completion, in the order in which `pack` deals them.

    Minibatches are drawn: with `draw_groups` or `share_prompts` a line of groups is cut into them,
    otherwise a line of completions. Nothing else but `seed` decides which a minibatch has.

    The completions of a minibatch are dealt from the longest to the shortest, to and fro over its
    microbatches. With `share_prompts` groups are dealt (see `_deal_groups`), unless that takes more
    rows.
    """
    count = len(rollout.lengths)
    samples = count // len(rollout.prompts.lengths)
    rng = np.random.default_rng(seed)
    if draw_groups or share_prompts:
        groups = rng.permuted(np.arange(count).reshape(-1, samples), axis=1)
        drawn = rng.permutation(groups).reshape(minibatches, -1)
    else:
        drawn = rng.permutation(count).reshape(minibatches, -1)

    def num_rows(dealt: np.ndarray) -> int:
        of_part = _place(rollout, dealt.reshape(microbatches, -1), row_length, share_prompts)
        return padded_rows(_needed_rows(of_part), len(dealt) // microbatches, row_divisor)

    def deal(minibatch: np.ndarray) -> np.ndarray:
        singly = _deal(rollout, minibatch.reshape(1, -1, 1), microbatches)
        if microbatches == 1 or not share_prompts:
            return singly
        in_groups = _deal_groups(rollout, minibatch, microbatches)
        return min(in_groups, singly, key=num_rows)  # groups, if both take as many

    return np.concatenate([deal(minibatch) for minibatch in drawn])


def _groups(rollout: Rollout) -> np.ndarray:
    """Returns the group of each completion, [N] int."""
    groups = len(rollout.prompts.lengths)
    return np.repeat(np.arange(groups), len(rollout.lengths) // groups)


def _place(
    rollout: Rollout, parts: np.ndarray, row_length: int, share_prompts: bool
) -> list[segments.Segments]:
    """Returns the segments of each microbatch, the completions `parts` [microbatches, n]."""
    group = _groups(rollout)
    return [
        segments.place(
            rollout.prompts.lengths[group[part]],
            rollout.lengths[part],
            group[part] if share_prompts else part,
            row_length,
        )
        for part in parts
    ]


def _needed_rows(of_part: list[segments.Segments]) -> int:
    return max(int(placed.row.max()) + 1 for placed in of_part)


def _deal_groups(rollout: Rollout, minibatch: np.ndarray, microbatches: int) -> np.ndarray:
    """Returns the completions of a minibatch, a line of groups, dealt to its microbatches.

    Groups stay whole where microbatches hold a multiple of a group, and are dealt. Where a
    microbatch holds less, a group has several microbatches, over which its completions are dealt.
    Where neither divides the other, the line is cut into microbatches: no other way cuts fewer.
    """
    samples = len(rollout.lengths) // len(rollout.prompts.lengths)
    size = len(minibatch) // microbatches
    if size % samples == 0:
        return _deal(rollout, minibatch.reshape(1, -1, samples), microbatches)
    if samples % size == 0 and len(minibatch) % samples == 0:
        return _deal(rollout, minibatch.reshape(-1, samples, 1), samples // size)
    return minibatch


def _deal(rollout: Rollout, units: np.ndarray, parts: int) -> np.ndarray:
    """Returns the completions [N] of `units`, dealt to and fro over `parts` in each pool, the
    longest first.

    Args:
        units: [pools, units, completions of one prompt], which have the prompt in common.
    """
    if parts == 1:
        return units.reshape(-1)
    prompt_lengths = rollout.prompts.lengths[_groups(rollout)]
    lengths = prompt_lengths[units[..., 0]] - 1 + (1 + rollout.lengths[units]).sum(axis=-1)
    longest_first = np.argsort(-lengths, axis=1, kind="stable")
    pools, _, size = units.shape
    rounds = np.take_along_axis(units, longest_first[..., None], axis=1)
    rounds = rounds.reshape(pools, -1, parts, size)
    rounds[:, 1::2] = rounds[:, 1::2, ::-1]
    return rounds.swapaxes(1, 2).reshape(-1)


def _fill_rows(
    placed: segments.Segments,
    prompts: np.ndarray,
    prompt_lengths: np.ndarray,
    completions: np.ndarray,
    shape: tuple[int, ...],
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns a batch's tokens, positions, segment_ids and prefix_ids, of `shape` [M, A, R, S].

    Args:
        placed: the segments of all microbatches.
        prompts, prompt_lengths, completions: [N, P], [N] and [N, T], in their order.
    """
    # for each token of all segments: its segment, and its number there
    owner = np.repeat(np.arange(len(placed.length)), placed.length)
    begins = placed.length.cumsum() - placed.length
    offset = np.arange(len(owner)) - begins[owner]
    place = (placed.row * shape[-1] + placed.column)[owner] + offset
    position = placed.first[owner] + offset
    completion = placed.completion[owner]
    generated = position - prompt_lengths[completion]  # before the completion: negative
    column = np.where(generated < 0, position, prompts.shape[1] + generated)
    source = np.concatenate([prompts, completions], axis=1)

    def scatter(values: np.ndarray, fill: int) -> np.ndarray:
        flat = np.full(np.prod(shape), fill, np.int32)
        flat[place] = values
        return flat.reshape(shape)

    return (
        scatter(source[completion, column], pad_id),
        scatter(position, 0),
        scatter(placed.id[owner], 0),
        scatter(placed.prefix_id[owner], 0),
    )


def _last_of_prompts(
    placed: segments.Segments, prompt_lengths: np.ndarray, row_length: int
) -> np.ndarray:
    """Returns the place of each prompt's last token before its completion, [N], counted over the
    rows of all microbatches: it predicts the completion's first token.
    """
    own = ~placed.is_prefix
    zero = placed.row * row_length + placed.column - placed.first  # of position 0
    last = np.zeros(len(prompt_lengths), np.int64)
    last[placed.completion[own]] = zero[own]
    return last + prompt_lengths - 1


def full_vocab_logp(rollout: Rollout) -> np.ndarray:
    """Returns the engine's log-probs [N, T] under softmax(logits / temperature), as the trainer
    scores: over the full vocabulary instead of the support sampled from.

    Formula: rollout_logp + log support_mass. Equal to rollout_logp past the length, and if the
    support is the full vocabulary.
    """
    if rollout.support_mass is None:
        return rollout.rollout_logp
    mask = np.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    log_mass = np.log(np.where(mask, rollout.support_mass, 1))
    return rollout.rollout_logp + log_mass.astype(np.float32)


def power_of_two(size: int, largest: int) -> int:
    """Returns the smallest power of two that is at least `size`, or `largest` if that is less.

    Arrays are padded to such sizes, so that few shapes are compiled.
    """
    return min(1 << (size - 1).bit_length(), largest)


def row_count(needed: int) -> int:
    """Returns the smallest number of 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, ... that is at least
    `needed`: four in each doubling, so that less than a fifth of the rows is padding.
    """
    step = 1 << max(0, (needed - 1).bit_length() - 3)
    return -(-needed // step) * step


def padded_rows(needed: int, completions: int, row_divisor: int) -> int:
    """Returns R, for a microbatch of so many completions that needs `needed` rows at most."""
    most = -(-completions // row_divisor)
    return row_divisor * min(row_count(-(-needed // row_divisor)), most)


def most_rows(
    *,
    count: int,
    samples: int,
    parts: int,
    prompt_tokens: int,
    completion_tokens: int,
    row_length: int,
    row_divisor: int,
    share_prompts: bool,
) -> int:
    """Returns a bound on R: no batch with lengths up to `prompt_tokens` and `completion_tokens` has
    more rows. Longest prompts and completions need fewer where a row holds those of two groups.

    Of N = `count` completions, `samples` have each prompt. No two of a microbatch are assumed to
    share a row if prompts are not shared, and otherwise no two of other groups.
    """
    if not share_prompts:
        return padded_rows(count // parts, count // parts, row_divisor)
    together = segments.branches_in_row(prompt_tokens, completion_tokens, row_length)
    group = np.arange(count).reshape(parts, -1) // samples
    families = (sum(-(-np.bincount(of_part) // together)) for of_part in group)
    return padded_rows(int(max(families)), count // parts, row_divisor)
