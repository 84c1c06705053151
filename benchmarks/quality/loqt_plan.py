"""What is measured of LoQT: ways of training a whole base, their learning rates, and the cells of the page.

Owns names and numbers alone, for the script that measures and for the section that tells; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCRATCH, CONTINUED = "scratch", "continued"

FULL, LOQT = "full", "LoQT"
WHOLE, STATIC, NEVER = "LoQT, not quantized", "LoQT, static", "LoQT, never merged"
UNCOMPENSATED = "LoQT, not compensated"
KEPT_MOMENTS = "LoQT, moments kept"

GROWTH = {"growth": 1.5}  # at 1.2, the authors' own, so few merges come no later than static ones

SETTINGS: dict[str, dict[str, Any]] = {
    LOQT: GROWTH,
    WHOLE: GROWTH,
    STATIC: {"schedule": "LOQT_SCHEDULE_STATIC"},
    NEVER: {"schedule": "LOQT_SCHEDULE_NEVER"},
    UNCOMPENSATED: GROWTH | {"compensation_steps": 0},
    KEPT_MOMENTS: GROWTH | {"keep_moments": True},
}

STEPS = {SCRATCH: 300, CONTINUED: 50}
INTERVALS = {SCRATCH: 30, CONTINUED: 10}  # steps
ROWS = 8
NUM_HELD_OUT = 160

RATES = {
    (SCRATCH, FULL): (2e-3, 4e-3, 8e-3),
    (SCRATCH, LOQT): (5e-3, 1e-2, 2e-2),
    (CONTINUED, FULL): (2e-5, 1e-4, 5e-4),
    (CONTINUED, LOQT): (2e-4, 1e-3, 5e-3),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One training under the seed that learning rates are chosen by."""

    start: str
    way: str
    rate: float


@dataclass(frozen=True, slots=True)
class Lesson:
    """One training at the rate that was chosen."""

    start: str
    way: str


def rank_of(hidden: int) -> int:
    """Return the rank on a base of a hidden size: a quarter of that."""
    return hidden // 4


def list_lessons() -> tuple[Lesson, ...]:
    """List what is trained: from drawn weights by every way, on from the base by those that can differ there."""
    continued = (FULL, LOQT, NEVER)
    return (
        *(Lesson(SCRATCH, way) for way in (FULL, *SETTINGS)),
        *(Lesson(CONTINUED, way) for way in continued),
    )


def list_trials() -> tuple[Trial, ...]:
    """List what is tried before."""
    return tuple(Trial(start, way, rate) for (start, way), rates in RATES.items() for rate in rates)


def chosen_rate(trials: Sequence[Mapping[str, Any]], start: str, way: str) -> float:
    """Return the rate with the least held-out loss. Semantics: all that is LoQT learns at LoQT's."""
    tuned = FULL if way == FULL else LOQT
    tried = [row for row in trials if row["start"] == start and row["way"] == tuned]
    best: float = min(tried, key=lambda row: row["loss"])["rate"]
    return best
