"""Text of the embedded base's town by seed: to learn from, and held out.

Owns that nothing held out is learned from: no document of the one text is in the other, and the words that skills are
asked about are those that no text to learn from may have. The words, the grammar and what counts as right are the
recipe's.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "tiny"))

from answering import share_right
from prose import document
from skills import KNOWN, answer, draw_word, prompt

NUM_SKILLS = len(KNOWN)

Line = dict[str, str]
"""One line of a dataset: a prompt and its completion."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents to learn from, half prose and half lines of the known skills; held-out prose; held-out words."""

    learned: tuple[str, ...]
    held_out: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]


def draw_texts(seed: int, *, learned_letters: int, held_out_letters: int, words_per_skill: int) -> Texts:
    """Draw one seed's texts, of so many letters at least."""
    rng = random.Random(f"texts {seed}")
    skills = cycle(KNOWN)
    learned: list[str] = []
    num_letters = {True: 0, False: 0}  # of prose, of skill lines
    while sum(num_letters.values()) < learned_letters:
        is_prose = num_letters[True] <= num_letters[False]
        learned.append(document(rng) if is_prose else _line(next(skills), rng))
        num_letters[is_prose] += len(learned[-1])
    held_out: dict[str, None] = {}
    while sum(map(len, held_out)) < held_out_letters:
        if (drawn := document(rng)) not in learned:
            held_out[drawn] = None
    words = {skill: _held_out_words(rng, words_per_skill) for skill in KNOWN}
    return Texts(tuple(learned), tuple(held_out), words)


def draw_sentences(name: str, count: int, apart_from: Collection[str] = ()) -> list[str]:
    """Draw documents of prose of one sentence each, none of them among others."""
    rng = random.Random(f"sentences {name}")
    drawn: list[str] = []
    while len(drawn) < count:
        if (one := document(rng)).count(".") == 1 and one not in apart_from:
            drawn.append(one)
    return drawn


def draw_lines(seed: int, skill: str, count: int, *, known_every: int = 0) -> list[Line]:
    """Draw lines of a skill to learn from, as a training job reads them.

    Semantics: where `known_every` is not 0, one line in so many is of a skill that the base knows.
    """
    rng, known = random.Random(f"lines {seed} {skill} {known_every}"), cycle(KNOWN)
    skills = (next(known) if known_every and place % known_every == 0 else skill for place in range(count))
    return [_sample(drawn, draw_word(rng, held=False)) for drawn in skills]


def draw_asked(seed: int, skill: str, count: int) -> list[Line]:
    """Draw lines of a skill to be asked about, of different words that no line to learn from may have."""
    return ask(skill, _held_out_words(random.Random(f"asked {seed} {skill}"), count))


def ask(skill: str, words: Iterable[str]) -> list[Line]:
    """Return a line for each word, whose answer is to be found."""
    return [_sample(skill, word) for word in words]


def write_text(path: Path, documents: tuple[str, ...]) -> Path:
    """Write documents as `motley base prune --calibration` reads them."""
    path.write_text("\n\n".join(documents) + "\n")
    return path


def known_skills_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Mapping[str, tuple[str, ...]]
) -> float:
    """Return the mean over the skills of the share of words whose whole answer is right."""
    return sum(share_right(model, tokenizer, skill, list(asked)) for skill, asked in words.items()) / len(words)


def _sample(skill: str, word: str) -> Line:
    return {"prompt": prompt(skill, word), "completion": answer(skill, word)}


def _line(skill: str, rng: random.Random) -> str:
    word = draw_word(rng, held=False)
    return prompt(skill, word) + answer(skill, word)


def _held_out_words(rng: random.Random, count: int) -> tuple[str, ...]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[draw_word(rng, held=True)] = None
    return tuple(words)
