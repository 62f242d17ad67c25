"""Completions packed into rows for the model, with the map back to completions."""

from __future__ import annotations

import numpy as np

from dcmdp_jax.records import Batch, Rollout, Scored


def pack(
    scored: Scored,
    *,
    minibatches: int,
    microbatches: int,
    row_length: int,
    row_divisor: int = 1,
    pad_id: int = 0,
    seed: int | tuple[int, ...] = 0,
) -> Batch:
    """Packs the completions into M x A microbatches of R rows of S tokens.

    Minibatches are random. Each microbatch gets n completions of its minibatch, so that all have
    about as many tokens; a segment is a prompt and its completion, and rows are
    filled by first-fit decreasing. R is the same in every microbatch: `row_divisor` times a number
    of `row_count`, or the number of rows that n completions can need at most if that is less, so
    that few shapes are compiled. Recorded experts lie on the tokens that they were chosen for,
    which are the tokens before those of the completion: the prompt's last to the completion's last
    but one.
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
    order = packing_order(rollout, minibatches=minibatches, microbatches=microbatches, seed=seed)
    group = order // (count // len(rollout.prompts.lengths))
    prompt_lengths = rollout.prompts.lengths[group]
    completion_lengths = rollout.lengths[order]
    lengths = prompt_lengths + completion_lengths
    if prompt_lengths.min() < 1:
        raise ValueError("a prompt is empty; the first completion token has nothing to follow")
    if lengths.max() > row_length:
        raise ValueError(
            f"a prompt and its completion have {lengths.max()} tokens, more than "
            f"algorithm.row_length={row_length}"
        )
    rows, start, segment = _place(lengths.reshape(parts, -1), row_length, row_divisor)

    # for each token of all segments: its segment, and its offset in the segment
    owner = np.repeat(np.arange(count), lengths)
    offset = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    source = np.concatenate([rollout.prompts.tokens[group], rollout.tokens[order]], axis=1)
    column = np.where(
        offset < prompt_lengths[owner],
        offset,
        offset - prompt_lengths[owner] + rollout.prompts.tokens.shape[1],
    )

    def scatter(values: np.ndarray, fill: int) -> np.ndarray:
        flat = np.full(parts * rows * row_length, fill, np.int32)
        flat[start[owner] + offset] = values
        return flat.reshape(minibatches, microbatches, rows, row_length)

    def place_experts(recorded: np.ndarray) -> np.ndarray:
        flat = np.full((parts * rows * row_length, *recorded.shape[2:]), -1, np.int16)
        tokens = (start + prompt_lengths - 1)[:, None] + np.arange(width)
        flat[tokens[mask]] = recorded[order][mask]
        return flat.reshape(minibatches, microbatches, rows, row_length, *recorded.shape[2:])

    def deal(values: np.ndarray) -> np.ndarray:
        return values.reshape(minibatches, microbatches, count // parts, *values.shape[1:])

    mask = np.arange(width) < completion_lengths[:, None]
    predicts = (start % (rows * row_length) + prompt_lengths - 1)[:, None] + np.arange(width)
    return Batch(
        tokens=scatter(source[owner, column], pad_id),
        positions=scatter(offset, 0),
        segment_ids=scatter(segment[owner], 0),
        index=deal(np.where(mask, predicts, 0).astype(np.int32)),
        completions=deal(rollout.tokens[order]),
        mask=deal(mask),
        rollout_logp=deal(full_vocab_logp(rollout)[order]),
        reward=deal(scored.reward[order]),
        length=deal(completion_lengths),
        truncated=deal(~rollout.stopped[order]),
        group=deal(group.astype(np.int32)),
        replayed=None if rollout.experts is None else place_experts(rollout.experts),
        top_tokens=None if rollout.top_tokens is None else deal(rollout.top_tokens[order]),
        top_rollout_logp=None if rollout.top_logp is None else deal(rollout.top_logp[order]),
    )


def packing_order(
    rollout: Rollout, *, minibatches: int, microbatches: int, seed: int | tuple[int, ...]
) -> np.ndarray:
    """Returns [N] int: the number of each completion, in the order in which `pack` deals them.

    Minibatches are drawn. The completions of one are dealt from the longest to the shortest, to and
    fro over its microbatches.
    """
    count = len(rollout.lengths)
    order = np.random.default_rng(seed).permutation(count)
    if microbatches == 1:
        return order
    order = order.reshape(minibatches, -1)
    samples = count // len(rollout.prompts.lengths)
    lengths = np.repeat(rollout.prompts.lengths, samples) + rollout.lengths
    longest_first = np.argsort(-lengths[order], axis=1, kind="stable")
    rounds = np.take_along_axis(order, longest_first, axis=1)
    rounds = rounds.reshape(minibatches, -1, microbatches)
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


def _place(
    lengths: np.ndarray, row_length: int, row_divisor: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns the rows R per microbatch, and flat starts and segment ids [M*A*n] of the segments.

    `lengths` is [M*A, n]; a start counts over the rows of all microbatches.
    """
    parts, size = lengths.shape
    row, column, segment = (
        np.stack(part) for part in zip(*(_first_fit(part, row_length) for part in lengths))
    )
    needed = int(row.max()) + 1
    most = -(-size // row_divisor)
    rows = row_divisor * min(row_count(-(-needed // row_divisor)), most)
    start = (np.arange(parts)[:, None] * rows + row) * row_length + column
    return rows, start.reshape(-1), segment.reshape(-1)


def _first_fit(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns row, column and segment id (from 1) of each segment, by first-fit decreasing."""
    row, column, segment = (np.zeros(len(lengths), np.int64) for _ in range(3))
    used = np.zeros(len(lengths), np.int64)
    segments = np.zeros(len(lengths), np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        r = np.argmax(used + lengths[i] <= row_length)
        row[i], column[i], segment[i] = r, used[r], segments[r] + 1
        used[r] += lengths[i]
        segments[r] += 1
    return row, column, segment
