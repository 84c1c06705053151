"""The claims of GOAT that can be looked at here, each with the paper's figures and ours.

Source: GOAT, arXiv:2502.16894: the mean over seven sets of images (CLIP ViT-B/32), GSM8K (LLaMA-2-7B), the mean over
eight sets of commonsense questions (LLaMA-2-7B) and over seven of GLUE (RoBERTa-large), in this order.
"""

from __future__ import annotations

from collections.abc import Callable

from claims import Claim, Finding
from goat_plan import (
    GOAT,
    GOAT_PLAIN,
    LORA,
    LORA_LARGE,
    MIXTURE,
    MIXTURE_PLAIN,
    SEGMENTS,
    SKILL,
    SWEPT_RATES,
    UNBALANCED,
    Cell,
)
from goat_tables import figures_of
from readings import Reading
from tables import loss, percent

NO_FIGURE = "no figure"
SIDES = (
    (
        "GOAT {} LoRA, with as many numbers in A and B",
        (GOAT, LORA),
        "81.49 against 77.09; 60.20 against 52.84; 82.73 against 77.61; 89.76 against 88.46",
    ),
    ("GOAT {} a LoRA that has as many numbers as its routers too", (GOAT, LORA_LARGE), "81.49 against 80.44 (rank 32)"),
    ("GOAT {} a mixture from zero, with the theoretical scale", (GOAT, MIXTURE), "81.49 against 81.06"),
    ("GOAT {} a mixture from zero, with the plain scale", (GOAT_PLAIN, MIXTURE_PLAIN), "80.35 against 80.26"),
    ("a mixture from zero {} LoRA, with the plain scale", (MIXTURE_PLAIN, LORA), "80.26 against 77.09"),
    ("GOAT {} GOAT with the plain scale", (GOAT, GOAT_PLAIN), "81.49 against 80.35"),
    ("a mixture from zero {} one with the plain scale", (MIXTURE, MIXTURE_PLAIN), "81.06 against 80.26"),
    ("GOAT {} GOAT without the balance loss", (GOAT, UNBALANCED), "53.50 against 49.85 (one set of images)"),
)
"""What is said to answer more and have less loss than another, each at its own rate, and by how much in the paper."""


def list_claims(reading: Reading) -> list[Claim]:
    """List the claims, ready to be judged."""
    return [*_side_claims(reading), *_scale_claims(reading), *_share_claims(reading), *_segment_claims(reading)]


def _side_claims(reading: Reading) -> list[Claim]:
    claims = []
    for says, sides, paper in SIDES:
        right, held_out = (_finding(reading, sides, figure) for figure in ("right", "loss"))
        claims.append(Claim(says.format("answers more than"), paper, [right], percent, is_below=False))
        claims.append(Claim(says.format("has less held-out loss than"), NO_FIGURE, [held_out], loss))
    return claims


def _scale_claims(reading: Reading) -> list[Claim]:
    at_rates = [
        Finding(f"{rate:g}", *(reading.figures(Cell(way, rate), "loss") for way in (GOAT, GOAT_PLAIN)))
        for rate in SWEPT_RATES
    ]
    return [
        Claim("at one learning rate, the theoretical scale has less loss than the plain one", NO_FIGURE, at_rates, loss)
    ]


def _share_claims(reading: Reading) -> list[Claim]:
    sides = (GOAT, UNBALANCED)
    paper = "without it, shares from 10.4% to 14.1%"

    def claim(says: str, figure: str, *, is_below: bool, form: Callable[[float], str] = percent) -> Claim:
        return Claim(says, paper, [_finding(reading, sides, figure)], form, is_below=is_below)

    return [
        claim("with the balance loss, an expert's greatest share is smaller", "greatest", is_below=True),
        claim("with the balance loss, an expert's least share is larger", "least", is_below=False),
    ]


def _segment_claims(reading: Reading) -> list[Claim]:
    return [
        Claim(
            f"segments: `head` fits better than `{name}`",
            "said to; not quoted here",
            [_finding(reading, (GOAT, name), "loss")],
            loss,
        )
        for name in SEGMENTS
    ]


def _finding(reading: Reading, sides: tuple[str, str], figure: str) -> Finding:
    return Finding(f"`{SKILL}`", *(figures_of(reading, way, figure) for way in sides))
