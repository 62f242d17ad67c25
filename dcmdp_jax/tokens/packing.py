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
    share_prompts: bool = False,
) -> Batch:
    """Packs the completions into M x A microbatches of R rows of S tokens.

    Completions are dealt as `packing_order` says, and rows filled as `segments.place` says. With
    `share_prompts` the completions of a group that stand in one row share their prompt.

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
    if count % parts:
        raise ValueError(
            f"{count} completions do not divide into algorithm.minibatches * "
            f"algorithm.microbatches = {parts} parts"
        )
    order = packing_order(
        rollout,
        minibatches=minibatches,
        microbatches=microbatches,
        seed=seed,
        share_prompts=share_prompts,
    )
    group = order // (count // len(rollout.prompts.lengths))
    prompt_lengths = rollout.prompts.lengths[group]
    completion_lengths = rollout.lengths[order]
    longest = (prompt_lengths + completion_lengths).max()
    if prompt_lengths.min() < 1:
        raise ValueError("a prompt is empty; the first completion token has nothing to follow")
    if longest > row_length:
        raise ValueError(
            f"a prompt and its completion have {longest} tokens, more than "
            f"algorithm.row_length={row_length}"
        )
    of_part = [
        segments.place(
            prompt_lengths[part],
            completion_lengths[part],
            group[part] if share_prompts else part,
            row_length,
        )
        for part in np.arange(count).reshape(parts, -1)
    ]
    needed = max(int(placed.row.max()) + 1 for placed in of_part)
    rows = padded_rows(needed, count // parts, row_divisor)
    placed = segments.join(of_part, rows)
    start = placed.row * row_length + placed.column

    # for each token of all segments: its segment, and its position
    owner = np.repeat(np.arange(len(start)), placed.length)
    offset = np.arange(len(owner)) - np.repeat(
        placed.length.cumsum() - placed.length, placed.length
    )
    position = placed.first[owner] + offset
    completion = placed.completion[owner]
    source = np.concatenate([rollout.prompts.tokens[group], rollout.tokens[order]], axis=1)
    column = np.where(
        position < prompt_lengths[completion],
        position,
        position - prompt_lengths[completion] + rollout.prompts.tokens.shape[1],
    )

    def scatter(values: np.ndarray, fill: int) -> np.ndarray:
        flat = np.full(parts * rows * row_length, fill, np.int32)
        flat[start[owner] + offset] = values
        return flat.reshape(minibatches, microbatches, rows, row_length)

    def place_experts(recorded: np.ndarray) -> np.ndarray:
        flat = np.full((parts * rows * row_length, *recorded.shape[2:]), -1, np.int16)
        flat[predicts[mask]] = recorded[order][mask]
        return flat.reshape(minibatches, microbatches, rows, row_length, *recorded.shape[2:])

    def deal(values: np.ndarray) -> np.ndarray:
        return values.reshape(minibatches, microbatches, count // parts, *values.shape[1:])

    # the place that predicts each completion token, over the rows of all microbatches
    last = np.zeros(count, np.int64)  # of the prompt's last token
    own = ~placed.is_prompt
    last[placed.completion[own]] = (start - placed.first)[own]
    last += prompt_lengths - 1
    predicts = last[:, None] + np.arange(width)
    mask = np.arange(width) < completion_lengths[:, None]
    return Batch(
        tokens=scatter(source[completion, column], pad_id),
        positions=scatter(position, 0),
        segment_ids=scatter(placed.id[owner], 0),
        index=deal(np.where(mask, predicts % (rows * row_length), 0).astype(np.int32)),
        completions=deal(rollout.tokens[order]),
        mask=deal(mask),
        rollout_logp=deal(full_vocab_logp(rollout)[order]),
        reward=deal(scored.reward[order]),
        length=deal(completion_lengths),
        truncated=deal(~rollout.stopped[order]),
        group=deal(group.astype(np.int32)),
        prefix_ids=scatter(placed.prefix_id[owner], 0) if share_prompts else None,
        replayed=None if rollout.experts is None else place_experts(rollout.experts),
        top_tokens=None if rollout.top_tokens is None else deal(rollout.top_tokens[order]),
        top_rollout_logp=None if rollout.top_logp is None else deal(rollout.top_logp[order]),
    )


def packing_order(
    rollout: Rollout,
    *,
    minibatches: int,
    microbatches: int,
    seed: int | tuple[int, ...],
    share_prompts: bool = False,
) -> np.ndarray:
    """Returns [N] int: the number of each completion, in the order in which `pack` deals them.

    Minibatches are drawn. The completions of one are dealt from the longest to the shortest, to and
    fro over its microbatches.

    With `share_prompts`, groups are drawn and dealt so. They stay whole where microbatches hold a
    multiple of a group. Where a microbatch holds less, a group has several microbatches, over which
    its completions are dealt. Where neither divides the other, the groups of all minibatches stand
    in one line, which is cut into microbatches: no other way cuts fewer.
    """
    count = len(rollout.lengths)
    samples = count // len(rollout.prompts.lengths)
    size = count // (minibatches * microbatches)
    rng = np.random.default_rng(seed)
    head = np.repeat(rollout.prompts.lengths, samples) - 1
    branch = 1 + rollout.lengths
    if not share_prompts:
        completions = rng.permutation(count).reshape(minibatches, -1, 1)
        return _deal(completions, microbatches, head, branch)
    groups = rng.permuted(np.arange(count).reshape(-1, samples), axis=1)
    groups = rng.permutation(groups)
    if size % samples == 0:
        return _deal(groups.reshape(minibatches, -1, samples), microbatches, head, branch)
    if samples % size == 0 and count // minibatches % samples == 0:
        return _deal(groups.reshape(-1, samples, 1), samples // size, head, branch)
    return groups.reshape(-1)


def _deal(units: np.ndarray, parts: int, head: np.ndarray, branch: np.ndarray) -> np.ndarray:
    """Returns the completions [N] of `units`, dealt to and fro over `parts` in each pool.

    Args:
        units: [pools, units, completions of one prompt].
        head, branch: [N], tokens of a completion's prompt without its last, and of its branch.
    """
    if parts == 1:
        return units.reshape(-1)
    lengths = head[units[..., 0]] + branch[units].sum(axis=-1)
    longest_first = np.argsort(-lengths, axis=1, kind="stable")
    pools, _, size = units.shape
    rounds = np.take_along_axis(units, longest_first[..., None], axis=1)
    rounds = rounds.reshape(pools, -1, parts, size)
    rounds[:, 1::2] = rounds[:, 1::2, ::-1]
    return rounds.swapaxes(1, 2).reshape(-1)


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
    """Returns the largest R of a batch, with lengths up to `prompt_tokens` and `completion_tokens`.

    Of N = `count` completions, `samples` have each prompt. No two of a microbatch share a row if
    prompts are not shared, and otherwise no two of other groups.
    """
    if not share_prompts:
        return padded_rows(count // parts, count // parts, row_divisor)
    together = branches_in_row(prompt_tokens, completion_tokens, row_length)
    group = np.arange(count).reshape(parts, -1) // samples
    pieces = (sum(-(-np.bincount(of_part) // together)) for of_part in group)
    return padded_rows(int(max(pieces)), count // parts, row_divisor)


def branches_in_row(prompt_tokens: int, completion_tokens: int, row_length: int) -> int:
    """Returns the number of completions of these lengths that share a prompt in one row."""
    return (row_length - prompt_tokens + 1) // (completion_tokens + 1)
