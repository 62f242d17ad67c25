"""What the log-probs that an engine reports are log-probs of, decided by testing hypotheses.

A *reading* is one explanation of the reported numbers: which distribution they are of (temperature
and support), after which prompt, of which token, in which unit. The trainer's log-probs under each
reading are compared with the reported numbers; `judge` names the reading that explains them.

The rule. d(reading) is the mean over tokens of |reported - trainer's|, in nats, each token counted
with at most 4, so that single placeholders decide nothing. Tokens whose reported value is a
placeholder are left out: -1000 or less, or a least value under -1e-4 that tokens in three contexts
or more share. (Equal completions of one prompt repeat their contexts, and their values.) Readings
are tried in the order of how many mistakes they take; one replaces the best so far if
    1. its d is at most 2/3 of the other's on the tokens that both have (1/2 if its temperature is
       fitted: weights that were trained on are sharper, which looks like one), and
    2. the mean of the differences between the two is over 4 of its standard errors, and
    3. the best so far is above 1e-4 nats, which float32 round-off explains.
Raw log-probs are "temperature not sent" if the tokens are likelier under them than under the stated
distribution, by 3 standard errors of the mean log-ratio: then they were drawn so, too.
The verdict is then the first of these that holds:
    - the name of the reading that replaced the stated one, if its d is at most 0.2 nats;
    - "other prompt" if the first 4 tokens of completions differ by over 0.4 nats in the mean, and
      by over 4 times as much as those from the 17th on: what is sampled makes up for the prompt;
    - "clipped values" or "rounded values" if d is at most 0.2 nats, and there are placeholders, or
      a rounding that all values share makes half of d;
    - "as stated" if d is at most 0.2 nats, a bound that leaves room for int8 and float8;
    - "other weights" if half of the tokens differ by more than 0.1 nats;
    - "cannot tell" for the rest, and for fewer than 32 tokens.
Weights that are a few updates old differ as little as kernels do: "as stated" does not exclude
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dcmdp_jax.models import decoder
from dcmdp_jax.models.model_config import ModelConfig
from dcmdp_jax.records import Sampling
from dcmdp_jax.rollout import log_prob_readings
from dcmdp_jax.rollout import sampling as draw
from dcmdp_jax.rollout.log_prob_readings import Distribution, Prompt, Reading

Ids = Sequence[Sequence[int]]
# (prompts, completions, fields [H]) -> [H, tokens] float, the model's log-prob of every completion
# token, one completion after the other, in each of H distributions; no prompt is empty
Score = Callable[[Ids, Ids, Sampling], np.ndarray]

MARGIN = 2 / 3  # a better reading has at most this share of the other's d
FITTED_MARGIN = 1 / 2  # likewise, where a temperature is fitted
STANDARD_ERRORS = 4.0
LIKELIER = 3.0  # standard errors of the mean log-ratio of two distributions
ROUND_OFF = 1e-4  # nats that float32 arithmetic explains
NUMERICAL = 0.2  # nats that an engine's number formats explain
CAP = 4.0  # nats that one token counts at most
BROAD = 0.1  # nats; other weights move half of the tokens by more
PLACEHOLDER = -1000.0  # no log-prob of a sampled token is as low
LEAST_TOKENS = 32
LEAST_CONTEXTS = 3  # that share a floor
FIRST = 4  # tokens of a completion that another prompt shows in
LATER = 16  # tokens after which it shows less
EARLY = 0.4  # nats
DECAY = 4.0
ROWS = 32  # positions whose log-probs are computed together
TEMPERATURES = np.geomspace(0.25, 4.0, 17)  # where a fitted one is searched


class Tried(NamedTuple):
    """A reading, and how far the trainer is from the reported numbers under it."""

    reading: Reading
    error: float  # d, nats


UNEXPLAINED = ("other prompt", "other weights", "cannot tell")  # names of verdicts


class Verdict(NamedTuple):
    """What `judge` found."""

    name: str  # "as stated", "other weights", or the faults of the reading that is left
    sentence: str  # what is wrong, with the figures
    remedy: str
    tokens: int  # that the decision rests on
    stated: Tried
    best: Tried  # the reading that is left; the stated one if none replaced it
    tried: tuple[Tried, ...]  # all readings, least d first

    @property
    def is_explained(self) -> bool:
        """Whether `best` says what the numbers are; otherwise it is the nearest that was tried."""
        return self.name not in UNEXPLAINED


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
      score: the model's log-probs; `scorer` makes it from parameters.
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
    place = np.concatenate([np.arange(length) for length in lengths])
    clipped = placeholders(prompts, tokens, values)
    known = np.where(clipped, np.nan, values)
    differences: list[tuple[Reading, np.ndarray]] = []

    def compare(fault, prompt, wanted):
        rows = [prompt(list(row)) for row in prompts]
        if fault and rows == [list(row) for row in prompts]:
            return
        for distribution, logp in zip(wanted, _trainer(rows, tokens, score, wanted), strict=True):
            for reading in log_prob_readings.readings(distribution, fault, prompt, known):
                trainer = np.concatenate([shifted(part, reading.shift) for part in logp])
                difference = np.clip(reading.nats(known) - trainer, -CAP, CAP)
                differences.append((reading, difference))

    distributions = log_prob_readings.distributions(sampling, reported, other_samplings or {})
    compare(None, _recorded, distributions)
    if _mean(differences[0][1]) <= ROUND_OFF:  # there is nothing to explain
        return _decide(differences, values, clipped, place)
    others = log_prob_readings.cuts(reported)
    compare(None, _recorded, others + log_prob_readings.temperatures(TEMPERATURES, reported))
    step = TEMPERATURES[1] / TEMPERATURES[0]
    for _ in range(2):
        closest = min(differences, key=lambda item: _mean(item[1]))[0]
        if not log_prob_readings.is_fitted(closest):
            break
        finer = closest.sampling.temperature * np.geomspace(1 / step, step, 17)
        compare(None, _recorded, log_prob_readings.temperatures(finer, reported))
        step = finer[1] / finer[0]
    for fault, prompt in log_prob_readings.prompts(bos_id, other_prompts or {}):
        compare(fault, prompt, distributions[:2])
    return _decide(differences, values, clipped, place)


def scorer(params: Any, model: ModelConfig, batch_tokens: int = 4096) -> Score:
    """Returns the decoder's log-probs as `judge` takes them.

    Sequences of a like length are scored together, `batch_tokens` positions at a time or one
    sequence, and logits are held for `ROWS` positions: memory does not grow with their number.
    Lengths are padded to powers of two, so that few shapes are compiled.
    """

    @jax.jit
    def hidden(params, rows):
        return decoder.hidden(params, rows, model)

    @jax.jit
    def block(params, hidden, ids, samplings):
        return log_probs(decoder.head(params, hidden, model), ids, samplings)

    def score(prompts: Ids, tokens: Ids, samplings: Sampling) -> np.ndarray:
        lengths = [len(row) for row in tokens]
        ends = np.cumsum([0, *lengths])
        out = np.zeros((len(samplings.temperature), ends[-1]))
        sizes = [len(p) + len(t) for p, t in zip(prompts, tokens, strict=True)]
        widths = [max(16, 1 << (size - 1).bit_length()) for size in sizes]
        for width in sorted(set(widths)):
            members = [i for i, w in enumerate(widths) if w == width and lengths[i]]
            # a whole batch of a few short sequences would be padding for the most part
            count = max(1, min(batch_tokens // width, 1 << (len(members) - 1).bit_length()))
            for start in range(0, len(members), count):
                group = members[start : start + count]
                rows = np.zeros((count, width), np.int32)
                for row, i in zip(rows, group):
                    row[: sizes[i]] = [*prompts[i], *tokens[i]]
                x = hidden(params, rows)
                row = np.repeat(np.arange(len(group)), [lengths[i] for i in group])
                column = np.concatenate([len(prompts[i]) + np.arange(lengths[i]) for i in group])
                place = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in group])
                for first in range(0, len(row), ROWS):
                    r = np.resize(row[first : first + ROWS], ROWS)
                    c = np.resize(column[first : first + ROWS], ROWS)
                    part = block(params, x[r, c - 1], rows[r, c], samplings)
                    at = place[first : first + ROWS]
                    out[:, at] = part[:, : len(at)]
        return out

    return score


def log_probs(
    logits: jax.Array, ids: jax.Array, samplings: Sampling, likeliest: int = 1024
) -> jax.Array:
    """Returns the log-probs of `ids` [R] in H distributions, `samplings` with fields [H] -> [H, R].

    Args:
      logits: [R, V] float32.
      likeliest: tokens in which the end of a support is looked for first.
    """
    is_cut = (samplings.top_k > 0) | (samplings.top_p < 1) | (samplings.min_p > 0)
    size = min(likeliest, logits.shape[1])
    head = jax.lax.cond(
        jnp.any(is_cut),
        lambda: jax.lax.top_k(logits, size)[0],
        lambda: jnp.zeros((len(logits), size)),
    )

    def one(arguments):
        sampling, cut = arguments
        logp = draw.log_prob(logits, ids, sampling.temperature)
        mass = jax.lax.cond(
            cut, lambda: _support_mass(logits, head, sampling), lambda: jnp.ones(len(logits))
        )
        return logp - jnp.log(mass)

    return jax.lax.map(one, (samplings, is_cut))


def _support_mass(logits: jax.Array, head: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the mass of the support, as `sampling.sample` does, from the likeliest tokens' logits
    `head`, sorted, if it ends among them: it is many times faster.
    """
    z = (head - head[:, :1]) / sampling.temperature
    total = jnp.sum(jnp.exp((logits - head[:, :1]) / sampling.temperature), axis=1)
    p = jnp.exp(z) / total[:, None]
    number = jnp.arange(head.shape[1])
    last = jnp.clip(sampling.top_k.astype(jnp.int32), 1, head.shape[1]) - 1
    by_k = jnp.where(sampling.top_k > 0, jnp.take(head, last, axis=1), -jnp.inf)
    p_k = jnp.where(head >= by_k[:, None], p, 0)
    goal = sampling.top_p * jnp.where(sampling.top_k > 0, jnp.sum(p_k, axis=1), 1)
    short = jnp.sum(jnp.cumsum(p_k, axis=1) < goal[:, None], axis=1)
    nucleus = jnp.take_along_axis(head, jnp.minimum(short, number[-1])[:, None], axis=1)[:, 0]
    by_p = jnp.where(sampling.top_p < 1, nucleus, -jnp.inf)
    by_min = jnp.where(
        sampling.min_p > 0, head[:, 0] + sampling.temperature * jnp.log(sampling.min_p), -jnp.inf
    )
    lowest = jnp.maximum(jnp.maximum(by_k, by_p), by_min)
    complete = head.shape[1] == logits.shape[1]

    def slowly():
        each = Sampling(*(jnp.full(len(logits), value) for value in sampling))
        return draw.sample(logits, jnp.zeros((len(logits), 2), jnp.uint32), each).support_mass

    return jax.lax.cond(
        complete | ((sampling.top_k <= head.shape[1]) & jnp.all(lowest > head[:, -1])),
        lambda: jnp.sum(jnp.where(head >= lowest[:, None], p, 0), axis=1),
        slowly,
    )


def fields(samplings: Sequence[Sampling]) -> Sampling:
    """Returns H distributions as one, with fields [H] float32."""
    return Sampling(*np.array(samplings, np.float32).T)


# Comparing


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
    clipped: np.ndarray,
    place: np.ndarray,
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
    error = np.abs(stated_difference)
    name, sentence, remedy = _sentence(first, last, error, values, clipped, place)
    return Verdict(name, sentence, remedy, count, first, last, tuple(tried))


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


def _sentence(
    stated: Tried,
    best: Tried,
    error: np.ndarray,
    values: np.ndarray,
    clipped: np.ndarray,
    place: np.ndarray,
) -> tuple[str, str, str]:
    """Returns name, sentence and remedy of the verdict; `error` [tokens] is the stated one's."""
    finite = np.isfinite(error)
    figures = f"mean |difference| {stated.error:.2g} nats"
    if finite.sum() < LEAST_TOKENS and not clipped.sum() >= LEAST_TOKENS:
        return (
            "cannot tell",
            f"{finite.sum()} tokens with a log-prob are too few to tell; {LEAST_TOKENS} are needed",
            "record more completions",
        )
    if best.reading.faults:
        sentence = "; and ".join(fault.sentence for fault in best.reading.faults)
        remedy = "; and ".join(fault.remedy for fault in best.reading.faults)
        if best.error <= NUMERICAL:
            figures = f"{figures} as stated, {best.error:.2g} when read so"
            return best.reading.name, f"{sentence} ({figures})", remedy
    early = error[finite & (place < FIRST)]
    late = error[finite & (place >= LATER)]
    enough = min(len(early), len(late)) >= LEAST_TOKENS
    if enough and early.mean() > max(EARLY, DECAY * late.mean()):
        return (
            "other prompt",
            f"the engine had another prompt: the first {FIRST} tokens differ by {early.mean():.2g} "
            f"nats, those after {LATER} by {late.mean():.2g}",
            "compare the ids that the engine received with the recorded prompt: chat template, "
            "system message, truncation",
        )
    if best.error <= NUMERICAL:
        return _as_stated(stated, values, clipped, finite)
    broad = np.mean(error[finite] > BROAD)
    nearest = (
        f"; the nearest reading, {best.reading.name}, leaves {best.error:.2g}"
        if best.reading.faults
        else ""
    )
    if broad >= 0.5:
        return (
            "other weights",
            f"the engine has other weights than the model's folder, or a prompt of which nothing "
            f"is recorded: {broad:.0%} of the tokens differ by more than {BROAD:g} nats ({figures}"
            f"{nearest})",
            "load the folder that the engine loads, check that the last weight update reached it "
            "(and that its prefix cache was cleared), and compare the prompts",
        )
    return (
        "cannot tell",
        f"the gap is too large for number formats, and no reading explains it ({figures}; "
        f"{broad:.0%} of the tokens differ by more than {BROAD:g} nats{nearest})",
        "look at the worst tokens; a coarse quantization (int4) of the engine looks so, too",
    )


def _as_stated(
    stated: Tried, values: np.ndarray, clipped: np.ndarray, finite: np.ndarray
) -> tuple[str, str, str]:
    """Returns the verdict on numbers that are read rightly: placeholders, rounding, or neither."""
    figures = f"mean |difference| {stated.error:.2g} nats"
    if clipped.any():
        least = values[clipped].min()
        return (
            "clipped values",
            f"{clipped.sum()} of {len(values)} reported log-probs are a floor or a "
            f"placeholder ({least:g}); the others are as stated ({figures})",
            "leave these tokens out of the ratio and of delta (NaN in their place), or have the "
            "engine report the sampled token's log-prob whatever its rank",
        )
    step, name = _grid(values[finite])
    if stated.error > ROUND_OFF and step / 4 > stated.error / 2:
        return (
            "rounded values",
            f"the reported log-probs are rounded to {name}: most of the gap ({figures})",
            "record them in float32 with all their digits",
        )
    sizes = ((ROUND_OFF, "float32 round-off"), (0.05, "bfloat16"), (NUMERICAL, "int8 or float8"))
    size = next(text for bound, text in sizes if stated.error <= bound)
    return (
        "as stated",
        f"as stated: the gap is numerical, of the size of {size} ({figures})",
        "none is needed; weights that are a few updates old look the same",
    )


def _grid(values: np.ndarray) -> tuple[float, str]:
    """Returns the mean step of the grid that all values lie on, and its name; 0 if none."""
    if len(np.unique(values)) < 8:
        return 0.0, ""
    for digits in (0, 1, 2, 3):
        if np.all(np.abs(values * 10**digits - np.round(values * 10**digits)) < 1e-4):
            return 10.0**-digits, f"{digits} decimal places"
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 1e-6)))
    for name, dtype, bits in (("bfloat16", jnp.bfloat16, 7), ("float16", np.float16, 10)):
        if np.all(values == values.astype(dtype).astype(np.float64)):
            return float(np.mean(2.0 ** (exponent - bits))), name
    return 0.0, ""


def placeholders(prompts: Ids, tokens: Ids, values: np.ndarray) -> np.ndarray:
    """Returns which values [tokens] are placeholders: -1000 or less, or a least value that tokens
    in three contexts share and that is not rounding's.
    """
    found = values <= PLACEHOLDER
    others = values[np.isfinite(values) & ~found]
    if len(others) and others.min() < -ROUND_OFF and not _grid(others)[0]:
        least = values == others.min()
        ends = np.cumsum([len(row) for row in tokens])
        contexts = set()
        for at in np.flatnonzero(least):
            row = int(np.searchsorted(ends, at, side="right"))
            place = at - ends[row] + len(tokens[row])
            contexts.add((*prompts[row], *tokens[row][: place + 1]))
        if len(contexts) >= LEAST_CONTEXTS:
            found |= least
    return found


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
