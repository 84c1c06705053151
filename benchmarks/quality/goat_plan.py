"""What is measured of GOAT: ways of training, their settings, their learning rates, and the cells of the page.

Owns names and numbers alone, for the script that measures and for the section that tells; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A rank of 8 on these Linears is 147,456 numbers, whether eight experts have one each or not. Routers are 81,920 more,
# and a rank of 13 is 239,616: the next that is no less than both.
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # as the paper's for commonsense questions
RANK, RANK_LARGE = 8, 13
EXPERTS, TOP_K, RHO = 8, 2, 10
PLAIN_SCALE = 2  # alpha over the rank of all experts, as the LoRA has

SKILL = "next"
STEPS, ROWS = 100, 16
NUM_ASKED = 48
BALANCE = 1e-3  # the trainer's default
IDLE = 0.1  # of an even share: an expert with less is said to be idle

LORA_RATES, SWEPT_RATES = (2e-3, 5e-3, 1.25e-2), (1e-3, 3e-3, 9e-3, 2.7e-2)  # around what did best in a first look

LORA, LORA_LARGE = "LoRA", f"LoRA of rank {RANK_LARGE}"
GOAT, GOAT_PLAIN = "GOAT", "GOAT with the plain scale"
MIXTURE, MIXTURE_PLAIN = "a mixture from zero", "a mixture from zero with the plain scale"
UNBALANCED = "GOAT without the balance loss"
SEGMENTS = ("principal", "minor", "random")

PLAIN: Mapping[str, Any] = {"scale": "GOAT_SCALE_ALPHA", "alpha": PLAIN_SCALE * RANK / EXPERTS}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    GOAT: {},
    GOAT_PLAIN: PLAIN,
    MIXTURE: {},
    MIXTURE_PLAIN: PLAIN,
    UNBALANCED: {"balance_loss": 0.0},
    **{name: {"segments": f"GOAT_SEGMENTS_{name.upper()}"} for name in SEGMENTS},
}
"""What each way with experts has that the trainer's GOAT has otherwise; MIXTURE and MIXTURE_PLAIN another start too."""

RATES: Mapping[str, tuple[float, ...]] = {
    LORA: LORA_RATES,
    GOAT: SWEPT_RATES,
    GOAT_PLAIN: SWEPT_RATES,
    MIXTURE: SWEPT_RATES[:3],
    MIXTURE_PLAIN: SWEPT_RATES[1:],
}
"""What is tried for the ways that have a rate of their own; the others have that of the one they differ from."""

SWEPT = (GOAT, GOAT_PLAIN)
METHODS = (LORA, LORA_LARGE, GOAT, MIXTURE, GOAT_PLAIN, MIXTURE_PLAIN)


@dataclass(frozen=True, slots=True)
class Cell:
    """One way of training at a rate; without one, at that which was chosen."""

    way: str
    rate: float | None = None


def list_trials() -> tuple[Cell, ...]:
    """List what is tried before, under the seed that learning rates are chosen by."""
    return tuple(Cell(way, rate) for way, rates in RATES.items() for rate in rates)


def list_cells() -> tuple[Cell, ...]:
    """List what is measured: the sweep of both scales, and all other ways at the rate that was chosen."""
    ways = (*METHODS, UNBALANCED, *SEGMENTS)
    return (
        *(Cell(way, rate) for way in SWEPT for rate in RATES[way]),
        *(Cell(way) for way in ways if way not in SWEPT),
    )


def chosen_rate(trials: Sequence[Mapping[str, Any]], way: str) -> float:
    """Return the rate with the least loss on held-out words, of the way whose rate this one has."""
    whose = LORA if way == LORA_LARGE else way if way in RATES else GOAT
    best: float = min((row for row in trials if row["way"] == whose), key=lambda row: row["loss"])["rate"]
    return best


def chosen_cell(trials: Sequence[Mapping[str, Any]], way: str) -> Cell:
    """Return the cell of a way at the rate that was chosen: one of the sweep, where it was swept."""
    return Cell(way, chosen_rate(trials, way) if way in SWEPT else None)
