"""Can the model write one sentence that contains two given words?

The task of the language studies. A prompt has one example and two nouns; many sentences are right:

    Words: dog, rain. Sentence: The dog ran home in the rain.
    Words: lamp, river. Sentence:

Import it from an experiment of this folder: `from two_words import TwoWords`.
"""

import re
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dcmdp_jax.records import Example

NOUNS = tuple(
    """
    apple arm bag ball banana bank basket bear bed bee bell bench bike bird boat book bottle
    bowl box boy bread bridge brother brush bus butter button cake camera candle car carpet
    cat chair cheese chicken child church circle city clock cloud coat coffee coin cow cup
    curtain desk doctor door dress drum duck egg elephant engine farm farmer father feather
    fence field finger fire fish flag floor flower forest fork fox friend frog garden gate
    ghost girl glass goat gold grass guitar hammer hand hat hen hill horse hospital house
    island jacket judge key king kitchen kite knife ladder lake lamp leaf lemon letter lion
    lock map market mirror money monkey moon mother mountain mouse museum nail nest newspaper
    nurse ocean office onion orange oven owl painter palace paper park pencil piano picture
    pig pillow pilot pipe plane plate pocket pond potato prince queen rabbit radio river road
    robot rocket roof rope rose sailor salt sand school sea sheep shelf ship shirt shoe shop
    sister snake snow soap sock soldier song soup spider spoon square stairs star station
    stone storm street sugar sun table teacher telephone tent tiger tower town train tree
    truck umbrella uncle village wall watch water whale wheel wind window wolf woman wood yard
    zebra
    """.split()
)
PAIRS = tuple(combinations(NOUNS, 2))  # in the alphabet's order
SHUFFLED = np.random.default_rng(0).permutation(len(PAIRS))
HELD_OUT = 2048  # pairs, the first of the shuffled ones, that are never trained on, in either order
WORDS = range(3, 15)  # of a right sentence


@dataclass(frozen=True)
class TwoWords:
    """A `tasks.Task`: one sentence with both words, from 3 to 14 words, between a capital letter
    and a full stop.
    """

    def example(self, index: int, seed: int) -> Example:
        """Returns training problem `index` of stream `seed`."""
        rng = np.random.default_rng((seed, index))
        pair = PAIRS[SHUFFLED[rng.integers(HELD_OUT, len(PAIRS))]]
        return _problem(pair if rng.integers(2) else pair[::-1])

    def held_out(self, count: int) -> list[Example]:
        """Returns the first `count` held-out problems. Raises ValueError if there are too few."""
        if count > HELD_OUT:
            raise ValueError(f"TwoWords holds out {HELD_OUT} problems; set a smaller eval.prompts")
        return [_problem(PAIRS[number]) for number in SHUFFLED[:count]]

    def reward(self, example: Example, text: str) -> float:
        """Returns 1.0 for a right sentence, else 0.0."""
        sentence = text.strip()
        words = re.findall(r"[a-z]+", sentence.lower())
        right = (
            re.fullmatch(r"[A-Z][^.!?:\n]*\.", sentence) is not None
            and len(words) in WORDS
            and all(_forms(noun) & set(words) for noun in example.answer.split())
        )
        return float(right)


def _problem(pair: tuple[str, str]) -> Example:
    prompt = (
        "Words: dog, rain. Sentence: The dog ran home in the rain.\n"
        f"Words: {pair[0]}, {pair[1]}. Sentence:"
    )
    return Example(prompt, " ".join(pair), "two words")


def _forms(noun: str) -> set[str]:
    """Returns a noun and its regular plurals."""
    return {noun, noun + "s", noun + "es", noun.removesuffix("y") + "ies"}
