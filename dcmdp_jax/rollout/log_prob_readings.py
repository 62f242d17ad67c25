"""The readings of reported log-probs that `log_prob_meaning.judge` tries.

A reading says of which distribution the numbers are, after which prompt, in which unit, and beside
which token; each fault in it has a remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dcmdp_jax.records import Sampling

FITTED = "another temperature"
RAW = "raw log-probs"
Prompt = Callable[[list[int]], list[int]]  # the recorded ids -> those that the engine may have had


class Fault(NamedTuple):
    """One thing that is wrong in a reading."""

    name: str  # a few words
    sentence: str  # what is wrong, without a full stop
    remedy: str  # what to do about it, likewise


class Distribution(NamedTuple):
    """What the reported numbers may be log-probs of; `fault` is None for what is stated."""

    fault: Fault | None
    sampling: Sampling  # renormalised over its support
    mistakes: int = 1  # what it takes to believe it: a fitted number counts as one more


class Reading(NamedTuple):
    """An explanation of the reported numbers; it has no faults if all is as stated."""

    faults: tuple[Fault, ...]
    mistakes: int
    sampling: Sampling
    prompt: Prompt  # the recorded prompt -> the one that the engine had
    nats: Callable[[np.ndarray], np.ndarray]  # the reported numbers -> log-probs
    shift: int  # the number beside token t is of token t + shift

    @property
    def name(self) -> str:
        """Its faults in a few words."""
        return ", ".join(fault.name for fault in self.faults) or "as stated"


def distributions(
    sampling: Sampling, reported: Sampling, others: Mapping[str, Sampling]
) -> list[Distribution]:
    """Returns the stated distribution and the likely wrong ones, each once, the likeliest first."""
    temperature = reported.temperature
    uncut = Sampling(temperature)
    said = f"temperature {temperature:g}{cut_text(reported)}"
    found = [Distribution(None, reported)]

    def add(distribution):
        if all(distribution.sampling != other.sampling for other in found):
            found.append(distribution)

    add(
        Distribution(
            Fault(
                RAW,
                f"the reported log-probs are raw, of softmax(logits): {said} was not applied",
                "have the engine report processed log-probs (vLLM: --logprobs-mode "
                "processed_logprobs; SGLang: without SGLANG_RETURN_ORIGINAL_LOGPROB; llama.cpp: "
                "post_sampling_probs), or sample at temperature 1 with no cut",
            ),
            Sampling(),
        )
    )
    add(
        Distribution(
            Fault(
                "processed log-probs",
                f"raw log-probs are stated, but those reported are processed, of temperature "
                f"{sampling.temperature:g}{cut_text(sampling)}",
                "score with the temperature that sampled, or have the engine report raw log-probs",
            ),
            sampling,
        )
    )
    add(
        Distribution(
            Fault(
                "support not renormalised",
                f"the temperature is applied, but the log-probs are of the whole vocabulary: not "
                f"renormalised over the support{cut_text(reported)}",
                "score over the whole vocabulary, as most trainers do; or have the engine report "
                "processed log-probs",
            ),
            uncut,
        )
    )
    add(
        Distribution(
            Fault(
                "temperature not applied",
                f"the support is cut, but temperature {temperature:g} was not applied",
                "have the engine report log-probs after the temperature",
            ),
            reported._replace(temperature=1.0),
        )
    )
    twice = Fault(
        "temperature applied twice",
        f"the reported log-probs are of temperature {temperature**2:g}: {temperature:g} was "
        "applied twice",
        "divide the logits by the temperature once, in the engine or in the code around it",
    )
    add(Distribution(twice, reported._replace(temperature=temperature**2)))
    add(Distribution(twice, Sampling(temperature**2)))
    add(
        Distribution(
            Fault(
                "temperature inverted",
                f"the logits are multiplied by temperature {temperature:g}, not divided",
                "divide the logits by the temperature",
            ),
            Sampling(1 / temperature),
        )
    )
    for origin, other in others.items():
        other = plain(other)
        add(
            Distribution(
                Fault(
                    "other sampling settings",
                    f"the reported log-probs are of temperature {other.temperature:g}"
                    f"{cut_text(other)}, as {origin} says, not of {said}",
                    "name temperature, top_p, top_k and min_p in every request",
                ),
                other,
            )
        )
    return found


def cuts(reported: Sampling) -> list[Distribution]:
    """Returns supports that an engine may have cut though none is stated."""
    uncut = Sampling(reported.temperature)
    if reported != uncut:
        return []
    tried = [uncut._replace(top_p=p) for p in (0.8, 0.9, 0.95)]
    tried += [uncut._replace(top_k=k) for k in (20, 40, 50)] + [uncut._replace(min_p=0.05)]
    return [
        Distribution(
            Fault(
                "support cut",
                "the reported log-probs are renormalised over a cut support, about"
                f"{cut_text(cut)[1:]}, and none is stated",
                "send top_p 1, top_k 0 (or -1) and min_p 0 with every request, or state the cut",
            ),
            cut,
            2,
        )
        for cut in tried
    ]


def temperatures(temperatures: np.ndarray, reported: Sampling) -> list[Distribution]:
    """Returns distributions of other temperatures, whose value is fitted."""
    return [
        Distribution(
            Fault(
                FITTED,
                f"the reported log-probs are of temperature {temperature:.2f}, not "
                f"{reported.temperature:g}{cut_text(reported)}",
                "send the temperature with every request, or state the one that the engine used",
            ),
            Sampling(temperature),
            2,
        )
        for temperature in temperatures
    ]


def is_fitted(reading: Reading) -> bool:
    """Whether its temperature is one of `temperatures`."""
    return any(fault.name == FITTED for fault in reading.faults)


def is_raw(reading: Reading) -> bool:
    """Whether its one fault is that the log-probs are raw."""
    return [fault.name for fault in reading.faults] == [RAW]


def not_sent(raw: Reading, stated: Sampling) -> Reading:
    """Returns the reading that the tokens were drawn from the raw distribution, too."""
    fault = Fault(
        "temperature not sent",
        "the reported log-probs are of temperature 1, and the tokens were drawn so, not at "
        f"temperature {stated.temperature:g}{cut_text(stated)}",
        "name temperature, top_p, top_k and min_p in every request, or state temperature 1",
    )
    return raw._replace(faults=(fault,))


def prompts(bos_id: int | None, others: Mapping[str, Prompt]) -> Iterator[tuple[Fault, Prompt]]:
    """Returns prompts that the engine may have had, beside the recorded one."""
    if bos_id is not None:
        yield (
            Fault(
                "BOS added",
                "the engine's prompt has one BOS token more than the recorded prompt",
                "send token ids, not text, or set add_special_tokens to false: the chat template "
                "writes a BOS of its own",
            ),
            lambda ids: [bos_id, *ids],
        )
        yield (
            Fault(
                "BOS missing",
                "the engine's prompt lacks the BOS token of the recorded prompt",
                "send token ids, not text, or set add_special_tokens to true",
            ),
            lambda ids: ids[1:] if ids[0] == bos_id and len(ids) > 1 else ids,
        )
    yield (
        Fault(
            "last prompt token missing",
            "the engine's prompt lacks the last token of the recorded prompt",
            "send the recorded token ids, and look for a token that is taken off at their end",
        ),
        lambda ids: ids[:-1] if len(ids) > 1 else ids,
    )
    yield (
        Fault(
            "first prompt token missing",
            "the engine's prompt lacks the first token of the recorded prompt",
            "send the recorded token ids, and look for a truncation on the left",
        ),
        lambda ids: ids[1:] if len(ids) > 1 else ids,
    )
    yield (
        Fault(
            "padding recorded",
            "the recorded prompt begins with padding, which the engine's had not",
            "record prompts without the padding that makes them equally long",
        ),
        _without_padding,
    )
    for origin, prompt in others.items():
        yield (
            Fault(
                f"other prompt: {origin}",
                f"the engine had another prompt than the recorded one: {origin}",
                "send the token ids that the trainer scores, and record the ones that were sent",
            ),
            prompt,
        )


def _without_padding(ids: list[int]) -> list[int]:
    """Returns the prompt without its first token if that is repeated."""
    start = next((i for i, id in enumerate(ids) if id != ids[0]), 0)
    return ids[start:] if start > 1 else ids


def readings(
    distribution: Distribution,
    prompt_fault: Fault | None,
    prompt: Prompt,
    values: np.ndarray,
) -> Iterator[Reading]:
    """Returns the readings of one distribution after one prompt: units, and shifts by one token.

    No more than two faults are put together.
    """
    for unit_fault, nats in _units(values):
        for shift_fault, shift in _SHIFTS:
            faults = (distribution.fault, prompt_fault, unit_fault, shift_fault)
            faults = tuple(fault for fault in faults if fault)
            mistakes = len(faults) + (distribution.mistakes - 1)
            if len(faults) <= 2:
                yield Reading(faults, mistakes, distribution.sampling, prompt, nats, shift)


_SHIFTS = (
    (None, 0),
    (
        Fault(
            "shifted: next token",
            "the number beside each token is the log-prob of the token after it",
            "the list of log-probs begins one entry too late: take it from one entry earlier",
        ),
        1,
    ),
    (
        Fault(
            "shifted: previous token",
            "the number beside each token is the log-prob of the token before it",
            "the list of log-probs begins one entry too early: leave out its first entry",
        ),
        -1,
    ),
)


def _units(values: np.ndarray) -> list[tuple[Fault | None, Callable]]:
    """Returns the units that numbers of these signs can have."""
    largest = np.nanmax(values, initial=-np.inf)
    if largest <= 0 or np.nanmin(values) < 0:
        return [
            (None, _unchanged),
            (
                Fault(
                    "log of base 10",
                    "the reported numbers are logarithms of base 10",
                    "multiply them by ln 10 = 2.3026",
                ),
                lambda x: x * np.log(10),
            ),
            (
                Fault(
                    "log of base 2",
                    "the reported numbers are logarithms of base 2",
                    "multiply them by ln 2 = 0.6931",
                ),
                lambda x: x * np.log(2),
            ),
        ]
    negated = (
        Fault(
            "sign",
            "the reported numbers are negative log-probs: their sign is turned",
            "negate them",
        ),
        np.negative,
    )
    if largest > 1:
        return [(None, _unchanged), negated]
    probability = Fault(
        "probabilities",
        "the reported numbers are probabilities, not log-probs",
        "take their natural logarithm",
    )
    return [
        (None, _unchanged),
        (probability, lambda x: np.log(np.maximum(x, 1e-38))),
        negated,
    ]


def plain(sampling: Sampling) -> Sampling:
    """Returns the same with plain numbers; greedy sampling reports plain softmax log-probs."""
    temperature = float(sampling.temperature) or 1.0
    top_k = max(int(sampling.top_k), 0)
    return Sampling(temperature, top_k, float(sampling.top_p), float(sampling.min_p))


def cut_text(sampling: Sampling) -> str:
    """Returns ", top_p 0.9" and the like; "" if nothing is cut."""
    cuts = (
        ("top_k", sampling.top_k, 0),
        ("top_p", sampling.top_p, 1),
        ("min_p", sampling.min_p, 0),
    )
    return "".join(f", {name} {value:g}" for name, value, none in cuts if value != none)


def _unchanged(values: np.ndarray) -> np.ndarray:
    return values
