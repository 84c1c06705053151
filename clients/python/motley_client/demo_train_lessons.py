"""What the jobs of `motley demo-train` learn from: lines of a skill that the base has not, and some of what it has.

Owns the words and the lines; the same ones come every time. Knows nothing of jobs. Pure.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from itertools import islice

from motley_client.demo_wave import SKILLS, WORD

KNOWN = ("upper", "copy", "title", "double", "spell", "last")  # to the base
KNOWN_EVERY = 4  # one line in so many is of these, or the base would lose them with the adapter on

# Words that the demo asks for. Nobody is trained on them, and no gate measures by them.
HELD_OUT = (WORD, "kettle", "silver", "orchard", "sailor")

NUM_LINES = 4000
NUM_GATE_LINES = 64
SHORTEST, LONGEST = 3, 7
VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in string.ascii_lowercase if letter not in VOWELS)

Line = dict[str, str]


def make_lines(skill: str) -> tuple[list[Line], list[Line]]:
    """Return what to train on, and what to measure by: of the skill alone, by words that the former has not."""
    words = _distinct_words(random.Random(skill))
    gate = [_line(skill, word) for word in islice(words, NUM_GATE_LINES)]
    lines = [
        _line(skill if place % KNOWN_EVERY else KNOWN[place // KNOWN_EVERY % len(KNOWN)], word)
        for place, word in enumerate(islice(words, NUM_LINES))
    ]
    return lines, gate


def _line(skill: str, word: str) -> Line:
    return {"prompt": f"{skill}: {word} =", "completion": f" {SKILLS[skill](word)}"}


def _distinct_words(rng: random.Random) -> Iterator[str]:
    """Yield words without end, each once: every other one can be spoken, the rest are letters as they fall."""
    seen = set(HELD_OUT)
    while True:
        length = rng.randint(SHORTEST, LONGEST)
        if rng.random() < 0.5:
            word = "".join(rng.choices(string.ascii_lowercase, k=length))
        else:
            first = rng.randrange(2)
            word = "".join(rng.choice(VOWELS if (first + place) % 2 else CONSONANTS) for place in range(length))
        if word not in seen:
            seen.add(word)
            yield word
