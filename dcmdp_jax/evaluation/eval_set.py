"""A set of an evaluation, and the file of its samples: a JSON line each, written as they finish."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dcmdp_jax import files, rewards
from dcmdp_jax.answers import judge
from dcmdp_jax.evaluation import scores
from dcmdp_jax.records import Prompts

JUDGED = {"answer", "right", "stopped", "tokens"}  # the fields that figures are computed from

Key = tuple[int, int]  # a problem's place in its set, from 0, and the sample's number


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """A set of problems, tokenized, with the file that holds its samples."""

    name: str
    prompts: Prompts
    samples: int  # k, of each problem
    file: pathlib.Path

    def keys(self) -> list[Key]:
        """Returns the keys of all samples, in order."""
        problems = len(self.prompts.lengths)
        return [(problem, i) for problem in range(problems) for i in range(self.samples)]

    def read(self) -> dict[Key, dict[str, Any]]:
        """Returns the samples in the file. What follows its last newline was cut short, and is left
        out.

        Raises ValueError on a line that is not a sample of this set, or is there twice.
        """
        samples: dict[Key, dict[str, Any]] = {}
        keys = set(self.keys())
        lines = self.file.read_bytes().split(b"\n")[:-1] if self.file.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                sample = files.parse_json(line, str(self.file))
                key = sample["problem"], sample["sample"]
                new = key in keys and key not in samples
                valid = new and sample["set"] == self.name and sample.keys() >= JUDGED
            except (ValueError, KeyError, TypeError):
                valid = False
            if not valid:
                raise ValueError(
                    f"line {number} of {self.file} is no sample of this evaluation, or one that is "
                    "there already; take it out, or give another --workdir"
                )
            samples[key] = sample
        return samples

    def write(self, samples: Iterable[dict[str, Any]]) -> None:
        """Replaces the file by one with these samples."""
        files.write_atomic(self.file, to_lines(samples))

    def judge(self, key: Key, text: str, tokens: int, stopped: bool) -> dict[str, Any]:
        """Returns the sample of a completion, as the file holds it.

        A completion that was cut off is judged by the answer it states, as is usual for avg@k; in
        training its verifier gets an empty text instead (`rewards.score`).
        """
        problem, number = key
        example = self.prompts.examples[problem]
        return {
            "set": self.name,
            "problem": problem,
            "sample": number,
            "gold": example.answer,
            "answer": rewards.final_answer(text),
            "right": rewards.math_answer(example, text) == 1.0,
            "stopped": stopped,
            "tokens": tokens,
            "text": text,
        }

    def figures(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns `scores.summary` of all samples, given in order, with their number."""
        shape = len(self.prompts.lengths), self.samples
        right, stopped, tokens = (
            np.array([sample[field] for sample in samples]).reshape(shape)
            for field in ("right", "stopped", "tokens")
        )
        answers = np.array([sample["answer"] for sample in samples], object).reshape(shape)
        vote = np.stack(
            [scores.votes(row, row_right, judge.equal) for row, row_right in zip(answers, right)]
        )
        return {
            "problems": shape[0],
            "samples": shape[1],
            **scores.summary(scores.Samples(right, stopped, tokens, vote)),
        }


def to_lines(samples: Iterable[dict[str, Any]]) -> str:
    """Returns the samples as lines of JSON."""
    return "".join(json.dumps(sample) + "\n" for sample in samples)
