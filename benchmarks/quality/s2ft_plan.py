"""What is measured of S2FT beside LoRA: ways of training, their sizes, their learning rates, and the cells of the page.

Owns names and numbers alone, for the script that measures and for the section that tells; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of two of six heads and 77 of 512 channels in each layer, 216,576 numbers are trained: about half for attention and
# half for the FFN, as S2FT's authors advise. A rank of 8 on all Linears is 217,088, and one of 25 on those two 217,600.
# On a wider base of the same proportions as many channels of more are as many numbers as the same ranks are.
RANK, RANK_THERE = 8, 25
O_SHARE, DOWN_SHARE = 0.34, 0.151  # rounded down to whole heads and channels
HIDDEN = 192  # of the base whose shares these are

STEPS, ROWS = 120, 16
KNOWN_EVERY = 4  # lines, where what the base knows is mixed in
NUM_ASKED = 64
NUM_KNOWN_ASKED = 10  # of each skill that the base knows
PROSE_LETTERS = 4096

LORA_RATES, S2FT_RATES = (2e-3, 5e-3, 1.25e-2), (8e-3, 2e-2, 5e-2)  # around what did best in a first look

LORA, LORA_THERE = "LoRA", "LoRA on `o_proj` and `down_proj`"
S2FT = "random"  # S2FT chooses at random where nothing else is said, and so does its authors' code
SELECTIONS = {
    S2FT: ("RANDOM", "SMALL"),
    **{
        f"{order} {score}": (score.upper().replace("-", "_"), order.upper())
        for score in ("weight", "activation", "weight-activation", "gradient")
        for order in ("small", "large")
    },
}

METHODS = (LORA, LORA_THERE, S2FT)

CONTENT = "next"  # the skill that every selection is tried on
SKILLS = (CONTENT, "reverse")
FUSED = (CONTENT, "previous")


@dataclass(frozen=True, slots=True)
class Trial:
    """One training under the seed that learning rates are chosen by."""

    way: str
    skill: str
    rate: float


@dataclass(frozen=True, slots=True)
class Lesson:
    """One training at the rate that was chosen; without a way, the base alone.

    Semantics: `is_mixed` is whether some of the lines are of what the base knows, so that the skill comes where it is
    asked for and nowhere else.
    """

    way: str | None = None
    skill: str = CONTENT
    is_mixed: bool = False


@dataclass(frozen=True, slots=True)
class Fusion:
    """The adapters of two mixed lessons on the base at once, each with weight 1.

    Semantics: S2FT's second is trained on the first one's channels, or on none of them.
    """

    way: str
    is_disjoint: bool = False


FUSIONS = (Fusion(LORA), Fusion(S2FT), Fusion(S2FT, is_disjoint=True))


def list_lessons() -> tuple[Lesson, ...]:
    """List what is trained: every method on every skill, every selection on one, and what is fused."""
    return (
        *(Lesson(way, skill) for skill in SKILLS for way in METHODS),
        *(Lesson(way) for way in SELECTIONS if way != S2FT),
        *(Lesson(way, skill, is_mixed=True) for skill in FUSED for way in (LORA, S2FT)),
    )


def list_trials() -> tuple[Trial, ...]:
    """List what is tried before: three rates for each way and skill."""
    alone = [lesson for lesson in list_lessons() if not lesson.is_mixed]
    return tuple(Trial(str(lesson.way), lesson.skill, rate) for lesson in alone for rate in rates_of(str(lesson.way)))


def shares(hidden: int) -> tuple[float, float]:
    """Return which shares of the heads and of the FFN channels are trained on a base of a hidden size."""
    return O_SHARE * HIDDEN / hidden, DOWN_SHARE * HIDDEN / hidden


def rates_of(way: str) -> tuple[float, ...]:
    """Return the rates that are tried."""
    return S2FT_RATES if way in SELECTIONS else LORA_RATES


def chosen_rate(trials: Sequence[Mapping[str, Any]], way: str, skill: str) -> float:
    """Return the rate with the least loss on held-out words.

    Semantics: what is mixed is trained at the rate of the skill that everything is tried on.
    """
    tried = [row for row in trials if row["way"] == way and row["skill"] == (skill if skill in SKILLS else CONTENT)]
    best: float = min(tried, key=lambda row: row["loss"])["rate"]
    return best
