"""What the log-probs that an engine reports are log-probs of, decided by testing hypotheses.

A *reading* is one explanation of the reported numbers: which distribution they are of (temperature
and support), after which prompt, of which token, in which unit. The trainer's log-probs under each
reading are compared with the reported numbers; `judge` names the reading that explains them.

The rule. d(reading) is the mean over tokens of |reported - trainer's|, in nats, each token counted
with at most 4, so that single placeholders decide nothing. Tokens whose reported value is a
placeholder or a filling are left out (log_prob_values.py). Readings are tried in the order of how
many mistakes they take; one replaces the best so far if
    1. its d is at most 2/3 of the other's on the tokens that both have (1/2 if its temperature is
       fitted: weights that were trained on are sharper, which looks like one), and
    2. the mean of the differences between the two is over 4 of its standard errors, and
    3. the best so far is above 1e-4 nats, which float32 round-off explains.
Raw log-probs are "temperature not sent" if the tokens are likelier under them than under the stated
distribution, by 3 standard errors of the mean log-ratio: then they were drawn so, too.
The verdict is then the first of these that holds:
    - "constant values" if every completion has one number for all its tokens, and d is above 0.2;
    - "mixed" if some completions are of something else than the others (log_prob_mixture.py);
    - the name of the reading that replaced the stated one, if its d is at most 0.2 nats;
    - "no log-probs" if more than one in a hundred of the numbers lie above 0;
    - "other prompt" if the first 4 tokens of completions differ by over 0.4 nats in the mean, and
      by over 4 times as much as those from the 17th on: what is sampled makes up for the prompt;
    - "clipped values", "filled values" or "rounded values" if d is at most 0.2 nats, and there are
      placeholders, fillings, or a rounding that all values share makes half of d;
    - "as stated" if d is at most 0.2 nats, a bound that leaves room for int8 and float8;
    - "other weights" if half of the tokens differ by more than 0.1 nats;
    - "cannot tell" for the rest, and for fewer than 32 tokens.
Weights that are a few updates old differ as little as kernels do: "as stated" does not exclude
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import log_prob_mixture, log_prob_readings, log_prob_values
from dcmdp_jax.rollout.log_prob_mixture import NUMERICAL, Odd
from dcmdp_jax.rollout.log_prob_readings import Distribution, Prompt, Reading
from dcmdp_jax.rollout.log_prob_scorer import Score, fields
from dcmdp_jax.rollout.log_prob_values import BROAD, ROUND_OFF, Ids, LeftOut

MARGIN = 2 / 3  # a better reading has at most this share of the other's d
FITTED_MARGIN = 1 / 2  # likewise, where a temperature is fitted
STANDARD_ERRORS = 4.0
LIKELIER = 3.0  # standard errors of the mean log-ratio of two distributions
CAP = 4.0  # nats that one token counts at most
LEAST_TOKENS = 32
ABOVE_0 = 0.01  # share of numbers above 0 that no log-probs have
FIRST = 4  # tokens of a completion that another prompt shows in
LATER = 16  # tokens after which it shows less
EARLY = 0.4  # nats
DECAY = 4.0
TEMPERATURES = np.geomspace(0.25, 4.0, 17)  # where a fitted one is searched


class Tried(NamedTuple):
    """A reading, and how far the trainer is from the reported numbers under it."""

    reading: Reading
    error: float  # d, nats


UNEXPLAINED = (  # names of verdicts
    "constant values",
    "later tokens differ",
    "no log-probs",
    "other prompt",
    "other weights",
    "cannot tell",
)
UNFILLED = (
    "record completions without their padding, and null for tokens that the engine did not sample, "
    "such as a tool's; leave both out of the loss"
)
LEAVES_OUT = ("clipped values", "filled values")  # likewise


class Verdict(NamedTuple):
    """What `judge` found."""

    name: str  # "as stated", "other weights", or the faults of the reading that is left
    sentence: str  # what is wrong, with the figures
    remedy: str
    tokens: int  # that the decision rests on
    stated: Tried
    best: Tried  # the reading that is left; the stated one if none replaced it
    tried: tuple[Tried, ...]  # all readings, least d first
    odd: tuple[int, ...] = ()  # numbers of the completions that are not as the others, from 0

    @property
    def is_explained(self) -> bool:
        """Whether `best` says what the numbers are; otherwise it is the nearest that was tried, or
        what most completions are.
        """
        return self.name not in UNEXPLAINED and not self.odd


def judge(
    prompts: Ids,
    tokens: Ids,
    logprobs: Sequence[Sequence[float]],
    score: Score,
    *,
    sampling: Sampling = Sampling(),
    reported: Sampling | None = None,
    bos_id: int | None = None,
    other_prompts: Mapping[str, Prompt] | None = None,
    other_samplings: Mapping[str, Sampling] | None = None,
) -> Verdict:
    """Returns the reading that explains the reported numbers, by the rule of this file.

    A few hundred tokens are enough; the cost is a forward pass of the completions for the recorded
    prompts, two if a temperature is fitted, and one for each other prompt.

    Args:
      prompts: N prompts as recorded, token ids, none empty.
      tokens: N completions, the sampled token ids.
      logprobs: the number reported for each of these tokens, as long as `tokens`; NaN where there
        is none.
      score: the model's log-probs; `log_prob_scorer.scorer` makes it from parameters.
      sampling: how the tokens are said to have been drawn. Scalars.
      reported: the distribution that the numbers are said to be of: `Sampling()` for raw log-probs;
        None: that of `sampling`, which is what `records.Rollout` holds.
      bos_id: the tokenizer's BOS token, if it has one: with it, prompts with a BOS more or less are
        tried.
      other_prompts: prompts to try, by what is wrong if the engine had them, such as {"the chat
        template": wrap}.
      other_samplings: distributions to try, by where they come from, such as {"the model's
        generation_config.json": Sampling(0.6, 20, 0.95)}.

    Raises ValueError if the lengths do not fit, or no number is finite.
    """
    values = _values(prompts, tokens, logprobs)
    reported = log_prob_readings.plain(sampling if reported is None else reported)
    sampling = log_prob_readings.plain(sampling)
    lengths = [len(row) for row in tokens]
    distributions = log_prob_readings.distributions(sampling, reported, other_samplings or {})
    first = _trainer(prompts, tokens, score, distributions)
    stated = np.concatenate(first[0])
    left_out = log_prob_values.left_out(prompts, tokens, values, stated)
    known = np.where(left_out.any, np.nan, values)
    differences: list[tuple[Reading, np.ndarray]] = []

    def compare(fault, prompt, wanted, trainer):
        for distribution, logp in zip(wanted, trainer, strict=True):
            for reading in log_prob_readings.readings(distribution, fault, prompt, known):
                beside = np.concatenate([shifted(part, reading.shift) for part in logp])
                difference = np.clip(reading.nats(known) - beside, -CAP, CAP)
                differences.append((reading, difference))

    def compare_recorded(wanted):
        compare(None, _recorded, wanted, _trainer(prompts, tokens, score, wanted))

    compare(None, _recorded, distributions, first)
    if _mean(differences[0][1]) <= ROUND_OFF:  # there is nothing to explain
        return _decide(differences, values, stated, left_out, lengths)
    others = log_prob_readings.cuts(reported)
    compare_recorded(others + log_prob_readings.temperatures(TEMPERATURES, reported))
    step = TEMPERATURES[1] / TEMPERATURES[0]
    for _ in range(2):
        closest = min(differences, key=lambda item: _mean(item[1]))[0]
        if not log_prob_readings.is_fitted(closest):
            break
        finer = closest.sampling.temperature * np.geomspace(1 / step, step, 17)
        compare_recorded(log_prob_readings.temperatures(finer, reported))
        step = finer[1] / finer[0]
    for fault, prompt in log_prob_readings.prompts(bos_id, other_prompts or {}):
        rows = [prompt(list(row)) for row in prompts]
        if rows != [list(row) for row in prompts]:
            likely = distributions[:2]
            compare(fault, prompt, likely, _trainer(rows, tokens, score, likely))
    return _decide(differences, values, stated, left_out, lengths)


def _trainer(prompts: Ids, tokens: Ids, score: Score, wanted: list[Distribution]) -> list:
    """Returns the trainer's log-probs, for each distribution those of every completion; NaN after
    an empty prompt.
    """
    logp = score(
        [prompt or [0] for prompt in prompts], tokens, fields([d.sampling for d in wanted])
    )
    known = np.repeat([bool(prompt) for prompt in prompts], [len(row) for row in tokens])
    ends = np.cumsum([len(row) for row in tokens])[:-1]
    return [np.split(row, ends) for row in np.where(known, logp, np.nan)]


def shifted(logp: np.ndarray, shift: int) -> np.ndarray:
    """Returns, at token t of a completion, the log-prob of token t + shift; NaN past its ends."""
    out = np.full(len(logp), np.nan)
    kept = max(len(logp) - abs(shift), 0)
    out[max(-shift, 0) :][:kept] = logp[max(shift, 0) :][:kept]
    return out


def _decide(
    differences: list[tuple[Reading, np.ndarray]],
    values: np.ndarray,
    trainer: np.ndarray,
    left_out: LeftOut,
    lengths: list[int],
) -> Verdict:
    """Returns the verdict from each reading's reported less trainer's log-probs [tokens], the
    stated reading first.
    """
    stated, stated_difference = differences[0]
    best, best_difference = differences[0]
    for mistakes in range(1, 1 + max(reading.mistakes for reading, _ in differences)):
        level = [item for item in differences if item[0].mistakes == mistakes]
        rival, rival_difference = min(
            level, key=lambda item: _mean(item[1]), default=(best, best_difference)
        )
        margin = FITTED_MARGIN if log_prob_readings.is_fitted(rival) else MARGIN
        if _replaces(np.abs(rival_difference), np.abs(best_difference), margin):
            best, best_difference = rival, rival_difference
    if log_prob_readings.is_raw(best) and _is_likelier(stated_difference):
        best = log_prob_readings.not_sent(best, stated.sampling)
    tried = sorted((Tried(reading, _mean(each)) for reading, each in differences), key=_error)
    count = int(np.isfinite(stated_difference).sum())
    first = Tried(stated, _mean(stated_difference))
    last = Tried(best, _mean(best_difference))
    odd = log_prob_mixture.odd_completions(differences, best_difference, trainer, lengths)
    if odd:
        words = _mixed(first, last, odd)
        return Verdict(*words, count, first, last, tuple(tried), odd.completions)
    error = np.abs(stated_difference)
    words = _words(first, last, error, values, left_out, lengths)
    return Verdict(*words, count, first, last, tuple(tried))


def _mixed(stated: Tried, best: Tried, odd: Odd) -> Words:
    """Some completions are of something else than the others."""
    others = f"the others are {best.reading.name}"
    figures = f"mean |difference| {stated.error:.2g} nats as stated"
    share = f"{len(odd.completions)} of {odd.judged} completions"
    if odd.reading is None:
        return Words(
            "mixed: other weights",
            f"{share} have other weights than the model's folder, or another prompt; {others} "
            f"({figures})",
            "look which engine sampled them, and whether the last weight update reached it; in "
            "a recorded file, a batch that an update divides looks so, too",
        )
    wrong = odd.reading if odd.reading.faults else best.reading
    sentence = "; and ".join(fault.sentence for fault in wrong.faults)
    remedy = "; and ".join(fault.remedy for fault in wrong.faults)
    if odd.reading.faults:
        return Words(
            f"mixed: {wrong.name}",
            f"{share} differ from the others, which are {best.reading.name}: {sentence} "
            f"({figures})",
            f"find what sets their engine or their requests apart; for them, {remedy}",
        )
    return Words(
        f"mixed: {wrong.name}",
        f"{share} are as stated; of the others, {sentence} ({figures})",
        f"find what sets their engine or their requests apart; for the others, {remedy}",
    )


def _replaces(rival: np.ndarray, best: np.ndarray, margin: float) -> bool:
    """Whether a reading with these errors replaces the best so far: the rule's 1 to 3."""
    both = np.isfinite(rival) & np.isfinite(best)
    if both.sum() < LEAST_TOKENS or best[both].mean() <= ROUND_OFF:
        return False
    gain = best[both] - rival[both]
    standard_error = gain.std(ddof=1) / np.sqrt(both.sum())
    return (
        rival[both].mean() <= margin * best[both].mean()
        and gain.mean() > STANDARD_ERRORS * standard_error
    )


def _is_likelier(difference: np.ndarray) -> bool:
    """Whether the tokens were drawn from the reported distribution and not from the trainer's, by
    the difference of their log-probs: on average, what draws a token gives it the larger one.
    """
    finite = difference[np.isfinite(difference)]
    standard_error = finite.std(ddof=1) / np.sqrt(len(finite))
    return bool(finite.mean() > LIKELIER * standard_error)


class Words(NamedTuple):
    """A verdict in words."""

    name: str
    sentence: str
    remedy: str


def _words(
    stated: Tried,
    best: Tried,
    error: np.ndarray,
    values: np.ndarray,
    left_out: LeftOut,
    lengths: list[int],
) -> Words:
    """Returns the verdict on completions that are all alike; `error` [tokens] is the stated one's.

    The order of its cases is that of the rule.
    """
    finite = np.isfinite(error)
    rows = np.split(values, np.cumsum(lengths)[:-1])
    is_close = best.error <= NUMERICAL and not left_out.filled.any()
    if not is_close and log_prob_values.are_constant(rows):
        return _constant(values)
    if max(finite.sum(), left_out.any.sum()) < LEAST_TOKENS:
        return Words(
            "cannot tell",
            f"{finite.sum()} tokens with a log-prob are too few to tell; {LEAST_TOKENS} are needed",
            "record more completions",
        )
    if best.reading.faults and best.error <= NUMERICAL:
        return _explained(stated, best, left_out)
    above = np.mean(values > ROUND_OFF)
    if best.error > NUMERICAL and above > ABOVE_0:
        return Words(
            "no log-probs",
            f"{above:.0%} of the reported numbers lie above 0, up to {np.nanmax(values):.3g}: they "
            "are neither log-probs nor probabilities, and may be logits",
            "have the engine report log-probs (vLLM: --logprobs-mode processed_logprobs, not "
            "processed_logits or raw_logits)",
        )
    place = np.concatenate([np.arange(length) for length in lengths])
    early = error[finite & (place < FIRST)]
    late = error[finite & (place >= LATER)]
    enough = min(len(early), len(late)) >= LEAST_TOKENS
    if enough and early.mean() > max(EARLY, DECAY * late.mean()):
        return Words(
            "other prompt",
            f"the engine had another prompt: the first {FIRST} tokens differ by {early.mean():.2g} "
            f"nats, those after {LATER} by {late.mean():.2g}",
            "compare the ids that the engine received with the recorded prompt: chat template, "
            "system message, truncation",
        )
    if best.error <= NUMERICAL:
        return _as_stated(stated, values, left_out, finite)
    return _unexplained(stated, best, error[finite])


def _constant(values: np.ndarray) -> Words:
    values = values[np.isfinite(values)]
    all_equal = np.all(values == values[0])
    number = f"the number {values[0]:g}" if all_equal else "one number, which differs from others'"
    return Words(
        "constant values",
        f"all tokens of a completion have {number}: log-probs of single tokens are not recorded",
        "have the engine report the log-prob of each sampled token (vLLM: logprobs 0 in the "
        "request; SGLang: return_logprob), and look what was recorded in its place",
    )


def _explained(stated: Tried, best: Tried, left_out: LeftOut) -> Words:
    """The best reading says what is wrong."""
    sentences = [fault.sentence for fault in best.reading.faults]
    remedies = [fault.remedy for fault in best.reading.faults]
    if left_out.filled.any() and not best.reading.shift:
        sentences.append(f"{left_out.filled.sum()} numbers are a constant, such as padding's")
        remedies.append(UNFILLED)
    figures = f"mean |difference| {stated.error:.2g} nats as stated, {best.error:.2g} when read so"
    return Words(
        best.reading.name, f"{'; and '.join(sentences)} ({figures})", "; and ".join(remedies)
    )


def _unexplained(stated: Tried, best: Tried, error: np.ndarray) -> Words:
    """No reading says what is wrong."""
    nearest = (
        f"; the nearest reading, {best.reading.name}, leaves {best.error:.2g}"
        if best.reading.faults
        else ""
    )
    figures = f"mean |difference| {stated.error:.2g} nats"
    broad = np.mean(error > BROAD)
    if broad >= 0.5:
        return Words(
            "other weights",
            f"the engine has other weights than the model's folder, or a prompt of which nothing "
            f"is recorded: {broad:.0%} of the tokens differ by more than {BROAD:g} nats ({figures}"
            f"{nearest})",
            "load the folder that the engine loads, check that the last weight update reached it "
            "(and that its prefix cache was cleared), and compare the prompts",
        )
    return Words(
        "cannot tell",
        f"the gap is too large for number formats, and no reading explains it ({figures}; "
        f"{broad:.0%} of the tokens differ by more than {BROAD:g} nats{nearest})",
        "look at the worst tokens; a coarse quantization (int4) of the engine looks so, too",
    )


def _as_stated(stated: Tried, values: np.ndarray, left_out: LeftOut, finite: np.ndarray) -> Words:
    """The numbers are read rightly: fillings, a floor, rounding, or nothing is wrong."""
    figures = f"mean |difference| {stated.error:.2g} nats"
    if left_out.any.any():
        return _left_out(figures, values, left_out)
    step, name = log_prob_values.grid(values[finite])
    if stated.error > ROUND_OFF and step / 4 > stated.error / 2:
        return Words(
            "rounded values",
            f"the reported log-probs are rounded to {name}: most of the gap ({figures})",
            "record them in float32 with all their digits",
        )
    sizes = ((ROUND_OFF, "float32 round-off"), (0.05, "bfloat16"), (NUMERICAL, "int8 or float8"))
    size = next(text for bound, text in sizes if stated.error <= bound)
    return Words(
        "as stated",
        f"as stated: the gap is numerical, of the size of {size} ({figures})",
        "none is needed; weights that are a few updates old look the same",
    )


def _left_out(figures: str, values: np.ndarray, left_out: LeftOut) -> Words:
    """Some numbers are fillings or a floor, and the others are read rightly."""
    if left_out.filled.any():
        numbers = " and ".join(f"{x:g}" for x in np.unique(values[left_out.filled]))
        return Words(
            "filled values",
            f"{left_out.filled.sum()} of {len(values)} reported numbers are a constant ({numbers}) "
            f"in the place of log-probs, such as padding's; the others are as stated ({figures})",
            UNFILLED,
        )
    least = values[left_out.floor].min()
    return Words(
        "clipped values",
        f"{left_out.floor.sum()} of {len(values)} reported log-probs are a floor or a placeholder "
        f"({least:g}); the others are as stated ({figures})",
        "leave these tokens out of the ratio and of delta (NaN in their place), or have the engine "
        "report the sampled token's log-prob whatever its rank",
    )


def of_later_tokens(
    verdict: Verdict, values: np.ndarray, trainer: np.ndarray, is_later: np.ndarray, out: LeftOut
) -> Verdict:
    """Returns the verdict on completions whose first tokens were judged, once the later are seen.

    It is another one only where the first tokens are as stated. Arrays are [tokens], of all
    completions: `is_later` marks tokens that `judge` was not given, `trainer` holds log-probs of
    the stated distribution, and `out` is `log_prob_values.left_out` of all.
    """
    if verdict.name != "as stated":
        return verdict
    error = np.clip(np.abs(np.where(out.any, np.nan, values) - trainer), 0, CAP)
    figures = f"mean |difference| {_mean(error):.2g} nats"
    if out.any.any():
        return verdict._replace(**_left_out(figures, values, out)._asdict())
    later = error[is_later & np.isfinite(error)]
    first = _mean(error[~is_later])
    if len(later) < LEAST_TOKENS or later.mean() <= max(NUMERICAL, DECAY * first):
        return verdict
    return verdict._replace(
        name="later tokens differ",
        sentence=f"the first tokens of completions are as stated (mean |difference| {first:.2g} "
        f"nats), and later ones differ by {later.mean():.2g}",
        remedy="compare the engine's rope_scaling, sliding window and longest context with the "
        "folder's config.json, and look at the gap by length of context; a cache of few bits, and "
        "weights that were replaced while completions were under way, look so, too",
    )


def _values(prompts: Ids, tokens: Ids, logprobs: Sequence[Sequence[float]]) -> np.ndarray:
    """Returns the reported numbers in one row, float64. Raises ValueError if they do not fit."""
    if not len(prompts) == len(tokens) == len(logprobs):
        raise ValueError(
            f"{len(prompts)} prompts, {len(tokens)} completions and {len(logprobs)} lists of "
            "log-probs do not belong together; give one of each per completion"
        )
    for number, rows in enumerate(zip(prompts, tokens, logprobs)):
        if not len(rows[0]):
            raise ValueError(f"prompt {number} is empty; give at least one token before each")
        if len(rows[1]) != len(rows[2]):
            raise ValueError(
                f"completion {number} has {len(rows[1])} tokens and {len(rows[2])} log-probs; give "
                "one for each token"
            )
    values = [np.asarray(row, np.float64) for row in logprobs]
    values = np.concatenate(values) if values else np.zeros(0)
    if not np.isfinite(values).any():
        raise ValueError("no reported log-prob is finite; have the engine report them")
    return values


def _recorded(ids: list[int]) -> list[int]:
    return ids


def _mean(difference: np.ndarray) -> float:
    """Mean size over the tokens that have a difference; infinite if there is none."""
    finite = np.abs(difference[np.isfinite(difference)])
    return float(finite.mean()) if len(finite) else np.inf


def _error(tried: Tried) -> float:
    return tried.error
