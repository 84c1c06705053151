"""What is measured of LoQT: ways of training a whole base, their learning rates, and the cells of the page.

Owns names and numbers alone, for the script that measures and for the section that tells; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCRATCH, CONTINUED = "scratch", "continued"

FULL, LOQT = "full", "LoQT"
WHOLE, STATIC, LINEAR, NEVER = "LoQT, not quantized", "LoQT, static", "LoQT, linear", "LoQT, never merged"
UNCOMPENSATED = "LoQT, not compensated"
KEPT_MOMENTS = "LoQT, moments kept"

SETTINGS: dict[str, dict[str, Any]] = {
    LOQT: {},
    WHOLE: {},
    STATIC: {"schedule": "LOQT_SCHEDULE_STATIC"},
    LINEAR: {"schedule": "LOQT_SCHEDULE_LINEAR", "growth": 5.0},
    NEVER: {"schedule": "LOQT_SCHEDULE_NEVER"},
    UNCOMPENSATED: {"compensation_steps": 0},
    KEPT_MOMENTS: {"keep_moments": True},
}

RANK, INTERVAL = 48, 15  # a quarter of the hidden size, and steps
STEPS = {SCRATCH: 160, CONTINUED: 80}
ROWS = 16
NUM_HELD_OUT = 160

RATES = {
    (SCRATCH, FULL): (1e-3, 2e-3, 4e-3),
    (SCRATCH, LOQT): (5e-3, 1e-2, 2e-2),
    (CONTINUED, FULL): (2e-5, 1e-4, 5e-4),
    (CONTINUED, LOQT): (2e-4, 1e-3, 5e-3),
}
TUNING_SEED = 0  # of no other measurement


@dataclass(frozen=True, slots=True)
class Trial:
    """One training under the seed that learning rates are chosen by."""

    start: str
    way: str
    rate: float


@dataclass(frozen=True, slots=True)
class Lesson:
    """One training at the rate that was chosen; without a way, what it starts from."""

    start: str
    way: str | None = None


def list_lessons() -> tuple[Lesson, ...]:
    """List what is trained: from drawn weights by every way, on from the base by those that can differ there."""
    continued = (FULL, LOQT, WHOLE, NEVER, UNCOMPENSATED)
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
