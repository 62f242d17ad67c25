"""Where completions and their prompts stand in the rows of a microbatch.

A segment is a prompt with its completion. Where the completions of a group share their prompt, the
prompt without its last token is a segment, and behind it each completion has one, a *branch*: the
prompt's last token and the completion. The last token is repeated because every branch predicts
its first token there, with experts of its own if they are replayed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Segments(NamedTuple):
    """The segments of n completions, [n, ...] of each of them, and those of shared prompts."""

    completion: np.ndarray  # whose tokens it holds; of a shared prompt, its first branch
    is_prompt: np.ndarray  # bool: a shared prompt
    row: np.ndarray
    column: np.ndarray  # of its first token
    first: np.ndarray  # position of its first token, counted from the prompt's first
    length: np.ndarray  # tokens
    id: np.ndarray  # from 1 in its row
    prefix_id: np.ndarray  # id of the shared prompt that it continues, or 0


class Piece(NamedTuple):
    """Completions of one group that stand in a row one after the other, and share their prompt."""

    row: int
    completions: list[int]


def place(
    prompt_lengths: np.ndarray, completion_lengths: np.ndarray, group: np.ndarray, row_length: int
) -> Segments:
    """Returns the segments of n completions in as few rows as are found.

    Completions of equal `group` have one prompt, which is shared where several of them stand in a
    row. Where that takes more rows than if none were shared, none is.
    """
    head = prompt_lengths - 1
    branch = 1 + completion_lengths
    alone = _pieces(head, branch, np.arange(len(group)), row_length)
    together = _pieces(head, branch, group, row_length)
    pieces = min(together, alone, key=lambda pieces: max(piece.row for piece in pieces))
    return _segments(pieces, head, branch)


def join(of_part: list[Segments], rows: int) -> Segments:
    """Returns the segments of all microbatches, of `rows` rows each, with completions and rows
    counted over all of them.
    """
    completions = 0
    moved = []
    for part, placed in enumerate(of_part):
        moved.append(
            placed._replace(
                completion=placed.completion + completions, row=placed.row + part * rows
            )
        )
        completions += int(np.sum(~placed.is_prompt))
    return Segments(*(np.concatenate(field) for field in zip(*moved)))


def _pieces(
    head: np.ndarray, branch: np.ndarray, group: np.ndarray, row_length: int
) -> list[Piece]:
    """Returns the completions in pieces of `head` tokens and `branch` more for each completion.

    First-fit decreasing of whole groups. One that fits in no row that is begun is cut: each row
    takes of the longest completions left those that fit.
    """
    groups: dict[int, list[int]] = {}
    for i, number in enumerate(group):
        groups.setdefault(int(number), []).append(i)

    def length(members: list[int]) -> int:
        return head[members[0]] + branch[members].sum()

    pieces = []
    used = np.zeros(len(group), np.int64)  # tokens of each row; more rows are never needed
    for members in sorted(groups.values(), key=length, reverse=True):
        takes_all = (used > 0) & (used + length(members) <= row_length)
        left = sorted(members, key=lambda i: branch[i], reverse=True)
        while left:
            takes_one = used + length(left[-1:]) <= row_length
            row = int(np.argmax(takes_all if takes_all.any() else takes_one))
            taken = []
            for i in left:
                if used[row] + length([*taken, i]) <= row_length:
                    taken.append(i)
            used[row] += length(taken)
            pieces.append(Piece(row, taken))
            left = [i for i in left if i not in taken]
    return pieces


def _segments(pieces: list[Piece], head: np.ndarray, branch: np.ndarray) -> Segments:
    segments = []
    columns = np.zeros(len(head), np.int64)
    ids = np.zeros(len(head), np.int64)

    def add(i: int, is_prompt: bool, row: int, first: int, length: int, prefix_id: int) -> None:
        ids[row] += 1
        segments.append((i, is_prompt, row, columns[row], first, length, ids[row], prefix_id))
        columns[row] += length

    for row, members in pieces:
        shared = head[members[0]] if len(members) > 1 else 0
        prefix_id = 0
        if shared:
            add(members[0], True, row, 0, shared, 0)
            prefix_id = ids[row]
        for i in members:
            add(i, False, row, shared, head[i] - shared + branch[i], prefix_id)
    found = Segments(*np.array(segments, np.int64).T)
    return found._replace(is_prompt=found.is_prompt > 0)
