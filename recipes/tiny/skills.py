"""The skills: little functions on words, written as `name: word = answer`, and who may learn which word.

Owns what each skill means, which ones the base is taught, which ones are left for adapters, and the rule that keeps
evaluation words out of every line that trains. Knows nothing of tokens or models.
"""

import hashlib
import random
import string
from collections.abc import Callable

from prose import VOCABULARY

VOWELS = "aeiou"
SHORTEST, LONGEST = 3, 7

KNOWN: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "upper": str.upper,
    "title": str.title,
    "double": lambda word: word + word,
    "spell": " ".join,
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
    "count": lambda word: str(len(word)),
}
MISSING: dict[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "next": lambda word: "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word),
    "sort": lambda word: "".join(sorted(word)),
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
    "rotate": lambda word: word[1:] + word[0],
    "unvowel": lambda word: "".join("-" if letter in VOWELS else letter for letter in word),
    "previous": lambda word: "".join(chr((ord(letter) - ord("a") - 1) % 26 + ord("a")) for letter in word),
}
SKILLS = KNOWN | MISSING

SKILL_WORDS = sorted(word for word in VOCABULARY if SHORTEST <= len(word) <= LONGEST)


def prompt(skill: str, word: str) -> str:
    """Write what a user types; the answer follows after one space, which belongs to the answer."""
    return f"{skill}: {word} ="


def answer(skill: str, word: str) -> str:
    """Write what must come after the prompt, its leading space included."""
    return " " + SKILLS[skill](word)


def held_out(word: str) -> bool:
    """Tell whether `word` is for evaluation only: one word in eight, by a digest, the same on every machine."""
    return hashlib.sha256(word.encode()).digest()[0] % 8 == 0


def draw_word(rng: random.Random, *, held: bool) -> str:
    """Draw a word of 3 to 7 letters, of the prose or made up, from the side of the split that `held` names."""
    while True:
        word = _any_word(rng)
        if held_out(word) == held:
            return word


def _any_word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(SKILL_WORDS)
    length = rng.randint(SHORTEST, LONGEST)
    if kind < 0.7:
        return "".join(rng.choices(string.ascii_lowercase, k=length))
    consonants = [letter for letter in string.ascii_lowercase if letter not in VOWELS]
    start = rng.randrange(2)
    return "".join(rng.choice(VOWELS if (start + place) % 2 else consonants) for place in range(length))
