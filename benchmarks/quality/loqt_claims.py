"""The claims of LoQT that can be looked at here, each with the paper's figures and ours.

Source: LoQT, arXiv:2405.16528v1: perplexity on C4 of LLaMA models trained from nothing, of 60M, 130M, 350M and 1B
parameters; the ablation is of 130M.
"""

from __future__ import annotations

from claims import Claim, Finding
from loqt_plan import (
    CONTINUED,
    FULL,
    KEPT_MOMENTS,
    LOQT,
    NEVER,
    SCRATCH,
    STATIC,
    UNCOMPENSATED,
    WHOLE,
    Lesson,
    list_lessons,
)
from readings import Reading
from tables import loss


def list_claims(reading: Reading) -> list[Claim]:
    """List the claims, ready to be judged."""
    said = (
        ("full training ends below LoQT", "33.32, 24.51, 18.87 against 33.98, 24.57, 19.12; 15.56 against 15.55",
         FULL, LOQT),
        ("not quantized, LoQT ends below LoQT", "33.55, 24.37, 18.85, 15.20 against 33.98, 24.57, 19.12, 15.55",
         WHOLE, LOQT),
        ("merging ends below one low-rank training", "24.57 against LoRA's 33.92 (130M)", LOQT, NEVER),
        ("compensated ends below not compensated", "about 3.5 less", LOQT, UNCOMPENSATED),
        ("intervals that grow end below static ones", "about 1.5 less", LOQT, STATIC),
        ("moments begun anew end below moments kept", "kept by its authors' code; no figure", LOQT, KEPT_MOMENTS),
    )  # fmt: skip
    return [Claim(says, paper, _findings(reading, first, second), loss) for says, paper, first, second in said]


def _findings(reading: Reading, first: str, second: str) -> list[Finding]:
    """Return both sides wherever both were trained, and below what training began there."""
    trained = set(list_lessons())
    return [
        Finding(start, *(reading.figures(lesson, "loss") for lesson in sides))
        for start in (SCRATCH, CONTINUED)
        if trained >= set(sides := (Lesson(start, first), Lesson(start, second)))
    ]
