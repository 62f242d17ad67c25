"""Where completions and their prompts stand in the rows of a microbatch.

A segment is a prompt with its completion. Where several completions of a group stand in one row, a
*family* holds them instead: the *prefix*, the prompt without its last token, is a segment, and
behind it each completion has one, a *branch*: the prompt's last token and the completion. The last
token is repeated because every branch predicts its first token there, with experts of its own if
they are replayed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Segments(NamedTuple):
    """One entry a segment: n of completions, and one of each prefix."""

    completion: np.ndarray  # whose tokens it holds; of a prefix, its first branch
    is_prefix: np.ndarray  # bool
    row: np.ndarray
    column: np.ndarray  # of its first token
    first: np.ndarray  # position of its first token, counted from the prompt's first
    length: np.ndarray  # tokens
    id: np.ndarray  # from 1 in its row
    prefix_id: np.ndarray  # id of the prefix that it continues, or 0


class Family(NamedTuple):
    """Completions of one group that stand in a row one after the other; one alone has no prefix."""

    row: int
    completions: list[int]


def place(
    prompt_lengths: np.ndarray, completion_lengths: np.ndarray, group: np.ndarray, row_length: int
) -> Segments:
    """Returns the segments of n completions in as few rows as are found.

    Completions of equal `group` have one prompt, which is shared where several of them stand in a
    row. Where that takes more rows than if none were shared, none is.
    """
    prefix = prompt_lengths - 1
    branch = 1 + completion_lengths
    families = _families(prefix, branch, np.arange(len(group)), row_length)
    if len(np.unique(group)) < len(group):
        together = _families(prefix, branch, group, row_length)
        families = min(together, families, key=_num_rows)
    return _segments(families, prefix, branch)


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
        completions += int(np.sum(~placed.is_prefix))
    return Segments(*(np.concatenate(field) for field in zip(*moved)))


def branches_in_row(prompt_tokens: int, completion_tokens: int, row_length: int) -> int:
    """Returns the number of completions of these lengths that share a prompt in one row."""
    return (row_length - prompt_tokens + 1) // (completion_tokens + 1)


def _num_rows(families: list[Family]) -> int:
    return max(family.row for family in families) + 1


def _families(
    prefix: np.ndarray, branch: np.ndarray, group: np.ndarray, row_length: int
) -> list[Family]:
    """Returns the completions in families of `prefix` tokens and `branch` more for each completion.

    First-fit decreasing of whole groups. One that fits in no row that is begun is cut: each row
    takes of the longest completions left those that fit.
    """
    groups: dict[int, list[int]] = {}
    for i, number in enumerate(group):
        groups.setdefault(int(number), []).append(i)

    def length(members: list[int]) -> int:
        return prefix[members[0]] + branch[members].sum()

    families = []
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
            families.append(Family(row, taken))
            left = [i for i in left if i not in taken]
    return families


def _segments(families: list[Family], prefix: np.ndarray, branch: np.ndarray) -> Segments:
    segments = []
    columns = np.zeros(len(prefix), np.int64)
    ids = np.zeros(len(prefix), np.int64)

    def add(i: int, is_prefix: bool, row: int, first: int, length: int, prefix_id: int) -> None:
        ids[row] += 1
        segments.append((i, is_prefix, row, columns[row], first, length, ids[row], prefix_id))
        columns[row] += length

    for row, members in families:
        shared = prefix[members[0]] if len(members) > 1 else 0
        prefix_id = 0
        if shared:
            add(members[0], True, row, 0, shared, 0)
            prefix_id = ids[row]
        for i in members:
            add(i, False, row, shared, prefix[i] - shared + branch[i], prefix_id)
    found = Segments(*np.array(segments, np.int64).T)
    return found._replace(is_prefix=found.is_prefix > 0)
