"""What is wrong between an engine and a trainer: what `dcmdp doctor` finds out.

Recorded completions are scored by the model of a folder. `log_prob_meaning.judge` says what the
reported log-probs are log-probs of; then come the gap's figures, once as the file states its
numbers and, if they are to be read otherwise, once read so.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax import constraint, files
from dcmdp_jax.losses import corrections, tails
from dcmdp_jax.models import weights
from dcmdp_jax.models.model_config import Compute
from dcmdp_jax.monitoring import gaps
from dcmdp_jax.monitoring.phases import phase
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import log_prob_meaning, log_prob_scorer, log_prob_values
from dcmdp_jax.rollout.log_prob_meaning import Verdict
from dcmdp_jax.rollout.log_prob_readings import Prompt, Reading
from dcmdp_jax.rollout.log_prob_scorer import Score
from dcmdp_jax.tokens import tokenizer as tokenizers
from dcmdp_jax.tokens.tokenizer import Tokenizer
from dcmdp_jax.tools import parity
from dcmdp_jax.tools.parity import GapStatistics
from dcmdp_jax.tools.rollout_records import Record

JUDGED_COMPLETIONS = 32  # that `judge` reads, from all over the file, at most
JUDGED_TOKENS = 24  # of each, its first
JUDGED_POSITIONS = 8192  # of all, prompts included, unless fewer than 8 completions are so long
BATCHES = 8  # parts of the file, whose differences give the floor's standard error
CHUNK = 64  # completions scored between two reports of progress
PROBABILITIES = (0.1, 0.5, 0.9, 0.99)  # edges of the engine's probability

# the corrections of the trainers that people use, at their usual bounds
CORRECTIONS = (
    ("TIS, ratio up to 2", "truncated tokens", corrections.tis(2.0)),
    ("MIS, ratio in 0.5 to 2", "dropped tokens", corrections.mis(0.5, 2.0)),
    ("IcePop, ratio in 0.5 to 5", "dropped tokens", corrections.icepop(0.5, 5.0)),
    ("MIS of the sequence, ratio up to 3", "dropped completions", corrections.sequence_mis()),
    (
        "geometric mask, ratio in 0.99 to 1.01",
        "dropped completions",
        corrections.geometric_mask(),
    ),
)


class Model(NamedTuple):
    """The trainer's side: a model folder."""

    folder: pathlib.Path
    score: Score
    vocab_size: int
    tokenizer: Tokenizer | None  # None where the folder has none: ids stand for texts


class Figures(NamedTuple):
    """The gap under one reading."""

    by_context: dict[str, GapStatistics]  # "all" last
    by_probability: dict[str, GapStatistics]  # of the engine's probability of the token
    calibration: constraint.Calibration | None  # None of a single completion
    dropped: int  # tokens without a finite log-prob, in no figure
    corrected: tuple[float, ...]  # share that each of CORRECTIONS truncates or drops
    gaps: dict[str, Any]  # `gaps.record`: by position in the completion, and the worst tokens


class RecordedTrainer(NamedTuple):
    """Mean |difference| of the log-probs that the file's own trainer recorded."""

    engine: float  # from the engine's
    model: float  # from the model folder's


class Diagnosis(NamedTuple):
    """What `examine` found."""

    verdict: Verdict
    completions: int
    stated: Figures
    read: Figures | None  # once what the verdict names is fixed; None if it names no reading
    recorded_trainer: RecordedTrainer | None  # None if the file has no trainer's log-probs
    odd: tuple[int, ...]  # numbers, from 1, of the completions that the verdict calls odd


def check(folder: str, tokenizer_path: str) -> tuple[int, int]:
    """Returns the vocabulary's size and the number of positions of a model folder, whose weights
    are not read.

    Raises ValueError, in one sentence, for a folder that is missing, damaged or not supported.
    """
    config = weights.read_config(folder)
    weights.check(folder)
    if tokenizer_path:
        tokenizers.load(tokenizer_path, folder)
    return config.vocab_size, config.max_position


def load(folder: str, tokenizer_path: str = "", *, bfloat16: bool = False) -> Model:
    """Returns the model of a Hugging Face folder, in float32 or bfloat16.

    Raises ValueError as `check` does; a folder without a tokenizer is no error.
    """
    config, params = weights.load(folder, jnp.bfloat16 if bfloat16 else jnp.float32)
    config = dataclasses.replace(config, compute=Compute(bfloat16=bfloat16))
    tokenizer = None
    if tokenizer_path or _holds_tokenizer(folder):
        tokenizer = tokenizers.load(tokenizer_path or folder, folder)
    score = log_prob_scorer.scorer(params, config)
    return Model(pathlib.Path(folder), score, config.vocab_size, tokenizer)


def _holds_tokenizer(folder: str) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "characters.json")
    return any((pathlib.Path(folder) / name).is_file() for name in names)


def examine(
    model: Model,
    records: Sequence[Record],
    sampling: Sampling,
    reported: Sampling,
    progress: Callable[[str], None] = lambda line: None,
) -> Diagnosis:
    """Judges the reported log-probs and measures the gap.

    Args:
      records: one or more, each with a prompt and a token of the model's vocabulary.
      sampling: how the tokens were drawn.
      reported: the distribution that the log-probs are said to be of.
      progress: called with a line now and then.

    Raises ValueError if no log-prob is finite.
    """
    places = _judged(records)
    judged = [records[place] for place in places]
    progress(f"testing what the log-probs are of on {len(judged)} completions")
    settings = _settings(model.folder)
    with phase("trying interpretations of the log-probs"):
        verdict = log_prob_meaning.judge(
            [record.prompt for record in judged],
            [record.tokens[:JUDGED_TOKENS] for record in judged],
            [record.logp[:JUDGED_TOKENS] for record in judged],
            model.score,
            sampling=sampling,
            reported=reported,
            bos_id=_bos_id(settings, model.vocab_size),
            other_prompts=other_prompts(model.tokenizer),
            other_samplings=_other_samplings(settings),
        )
    progress(f"{len(verdict.tried)} interpretations (readings) of the log-probs tried")
    stated = verdict.stated.reading
    readings = [stated]
    if verdict.is_explained and verdict.best.reading.faults:
        readings.append(verdict.best.reading)
    trainer = _trainer_logp(model.score, records, readings, progress)
    values = np.concatenate([record.logp for record in records])
    beside = np.concatenate(trainer[0])
    left_out = log_prob_values.left_out(
        [record.prompt for record in records],
        [record.tokens for record in records],
        values,
        beside,
    )
    place = np.concatenate([np.arange(len(record.tokens)) for record in records])
    verdict = log_prob_meaning.of_later_tokens(
        verdict, values, beside, place >= JUDGED_TOKENS, left_out
    )
    if verdict.name in log_prob_meaning.LEAVES_OUT:
        readings.append(stated)
        trainer.append(trainer[0])
    figures = [
        _figures(model.tokenizer, records, reading, logp, left_out.any & bool(i))
        for i, (reading, logp) in enumerate(zip(readings, trainer, strict=True))
    ]
    return Diagnosis(
        verdict,
        len(records),
        figures[0],
        figures[1] if len(figures) > 1 else None,
        _recorded_trainer(records, trainer[0]),
        tuple(places[i] + 1 for i in verdict.odd),
    )


def _judged(records: Sequence[Record]) -> list[int]:
    """Returns places of completions from all over the file, with no more positions than need be."""
    spread = _spread(len(records), JUDGED_COMPLETIONS)
    judged = [records[place] for place in spread]
    size = sum(len(r.prompt) + min(len(r.tokens), JUDGED_TOKENS) for r in judged)
    if size <= JUDGED_POSITIONS:
        return spread
    count = max(8, len(spread) * JUDGED_POSITIONS // size)
    return [spread[i] for i in _spread(len(spread), count)]


def _spread(size: int, count: int) -> list[int]:
    """Returns `count` of the numbers under `size`, or all, at equal distances."""
    return np.linspace(0, size - 1, min(size, count)).astype(int).tolist()


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what generation_config.json says, and BOS of config.json if it names none."""
    config = files.read_json_object(folder / "config.json")
    path = folder / "generation_config.json"
    found = files.read_json_object(path) if path.is_file() else {}
    return {"bos_token_id": config.get("bos_token_id"), **found}


def _bos_id(settings: dict[str, Any], vocab_size: int) -> int | None:
    named = settings["bos_token_id"]
    return named if type(named) is int and 0 <= named < vocab_size else None


def _other_samplings(settings: dict[str, Any]) -> dict[str, Sampling]:
    """Returns settings that a server uses for a request which names none."""
    defaults = {"llama.cpp's default": Sampling(0.8, 40, 0.95, 0.05)}
    named = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for name in named:
        value = settings.get(name)
        if files.matches(value, files.NUMBER) and value > 0:
            named[name] = value
    return {"the model's generation_config.json": Sampling(**named), **defaults}


def other_prompts(tokenizer: Tokenizer | None) -> dict[str, Prompt]:
    """Returns prompts that an engine makes of the recorded one by way of its text."""
    if tokenizer is None:
        return {}

    def by_text(encode: Callable[[str], list[int]]) -> Prompt:
        def prompt(ids: list[int]) -> list[int]:
            try:
                return encode(tokenizer.decode(ids))
            except ValueError:  # a text that it cannot encode is no way that the prompt went
                return ids

        return prompt

    def in_template(text: str, *, thinking: bool = True) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": text}], enable_thinking=thinking)

    found = {"its text was tokenized again": by_text(tokenizer.encode)}
    try:
        in_template("1")
    except ValueError:
        return found  # there is no chat template
    no_thinking = tokenizer.encode("<think>\n\n</think>\n\n")

    def thinking_toggled(ids: list[int]) -> list[int]:
        if ids[-len(no_thinking) :] == no_thinking:
            return ids[: -len(no_thinking)]
        return [*ids, *no_thinking]

    off = functools.partial(in_template, thinking=False)
    found["it was put into the chat template"] = by_text(in_template)
    found["it was put into the chat template, thinking off"] = by_text(off)
    found["thinking is on in one and off in the other (enable_thinking)"] = thinking_toggled
    return found


def _trainer_logp(
    score: Score,
    records: Sequence[Record],
    readings: list[Reading],
    progress: Callable[[str], None],
) -> list[list[np.ndarray]]:
    """Returns, for each reading, the trainer's log-probs of every completion, shifted as it says.

    Readings of the same prompt share one pass.
    """
    groups: dict[Prompt, list[int]] = {}
    for number, reading in enumerate(readings):
        groups.setdefault(reading.prompt, []).append(number)
    found: list[list[np.ndarray]] = [[] for _ in readings]
    for prompt, numbers in groups.items():
        samplings = log_prob_scorer.fields([readings[i].sampling for i in numbers])
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            tokens = [record.tokens for record in chunk]
            logp = score([prompt(r.prompt) or r.prompt for r in chunk], tokens, samplings)
            ends = np.cumsum([len(row) for row in tokens])[:-1]
            for i, row in zip(numbers, logp, strict=True):
                found[i] += [
                    log_prob_meaning.shifted(part, readings[i].shift)
                    for part in np.split(row, ends)
                ]
            progress(f"scored {min(start + CHUNK, len(records))} of {len(records)} completions")
    return found


def _figures(
    tokenizer: Tokenizer | None,
    records: Sequence[Record],
    reading: Reading,
    trainer: list[np.ndarray],
    left_out: np.ndarray,
) -> Figures:
    """Returns the figures of one reading without the tokens `left_out` [tokens]."""
    shape = (len(records), max(len(record.tokens) for record in records))
    old_logp = np.zeros(shape, np.float32)
    rollout_logp = np.zeros(shape, np.float32)
    tokens = np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    context = np.zeros(shape, np.int32)
    for i, (record, logp) in enumerate(zip(records, trainer, strict=True)):
        length = len(record.tokens)
        mask[i, :length] = True
        tokens[i, :length] = record.tokens
        old_logp[i, :length] = np.nan_to_num(logp)
        rollout_logp[i, :length] = np.where(np.isnan(logp), np.nan, record.logp)
        context[i] = len(record.prompt) + 1 + np.arange(shape[1])
    reported = np.where(left_out, np.nan, rollout_logp[mask])
    rollout_logp[mask] = reading.nats(reported)
    measured = mask & np.isfinite(rollout_logp)
    return Figures(
        parity.by_context(old_logp, rollout_logp, mask, context),
        _by_probability(old_logp, rollout_logp, measured),
        _calibration(old_logp, rollout_logp, mask),
        int(np.sum(mask & ~measured)),
        tuple(_corrected(c, old_logp, rollout_logp, measured) for _, _, c in CORRECTIONS),
        _gaps(tokenizer, old_logp, rollout_logp, tokens, mask),
    )


def _by_probability(
    old_logp: np.ndarray, rollout_logp: np.ndarray, measured: np.ndarray
) -> dict[str, GapStatistics]:
    edges = PROBABILITIES
    names = [f"< {edges[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:])] + [f">= {edges[-1]:g}"]
    bucket = np.asarray(tails.probability_bucket(rollout_logp, measured, edges=edges))
    return {
        name: parity.gap_statistics(old_logp, rollout_logp, inside)
        for number, name in enumerate(names)
        if (inside := measured & (bucket == number)).any()
    }


def _calibration(
    old_logp: np.ndarray, rollout_logp: np.ndarray, mask: np.ndarray
) -> constraint.Calibration | None:
    """Returns the floor of delta, with a standard error over parts of the file."""
    if len(mask) < 2:
        return None
    parts = [
        constraint.measure(old_logp[rows], rollout_logp[rows], mask[rows])
        for rows in np.array_split(np.arange(len(mask)), min(BATCHES, len(mask)))
    ]
    sums = np.array([float(delta_sum) for delta_sum, _ in parts])
    counts = np.array([float(count) for _, count in parts])
    return constraint.calibrate_tolerance(sums, counts)


def _corrected(
    correction: corrections.Correction,
    old_logp: np.ndarray,
    rollout_logp: np.ndarray,
    measured: np.ndarray,
) -> float:
    """Returns the share of tokens, or of completions, that it truncates or gives no weight."""
    weight, _ = correction.weights(old_logp, rollout_logp, measured)
    weight = np.asarray(weight)
    if correction.operator is corrections.truncate:
        changed = measured & (weight >= correction.high)
    else:
        changed = measured & (weight == 0)
    if correction.level is corrections.token:
        return float(changed.sum() / max(measured.sum(), 1))
    return float(changed.any(axis=1).sum() / max(measured.any(axis=1).sum(), 1))


def _gaps(
    tokenizer: Tokenizer | None,
    old_logp: np.ndarray,
    rollout_logp: np.ndarray,
    tokens: np.ndarray,
    mask: np.ndarray,
) -> dict[str, Any]:
    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))

    found = jax.jit(gaps.measure)(
        old_logp, rollout_logp, tokens, mask, np.zeros(len(tokens), np.float32)
    )
    return gaps.record(jax.device_get(found), tokens.shape[1], decode)


def _recorded_trainer(
    records: Sequence[Record], trainer: list[np.ndarray]
) -> RecordedTrainer | None:
    pairs = [
        (np.array(record.trainer_logp), np.array(record.logp), logp)
        for record, logp in zip(records, trainer, strict=True)
        if record.trainer_logp
    ]
    if not pairs:
        return None
    theirs, engine, ours = (np.concatenate(parts) for parts in zip(*pairs))
    usable = np.isfinite(theirs) & np.isfinite(engine)
    if not usable.any():
        return None
    return RecordedTrainer(
        float(np.mean(np.abs(theirs - engine)[usable])),
        float(np.mean(np.abs(theirs - ours)[usable])),
    )
