"""The claims of S2FT that can be looked at here, each with the paper's figures and ours.

Source: S2FT, arXiv:2412.06289, and the page of its authors: LLaMA-3-8B, mean over eight sets of commonsense questions,
then over seven of arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from claims import Claim, Finding
from readings import Reading
from s2ft_plan import CONTENT, FUSED, LORA, S2FT, SKILLS, Fusion, Lesson
from tables import loss, percent

OWN = Fusion(S2FT, is_disjoint=True)
SELECTION_ORDERS = (
    ("small activation", S2FT, "87.3 against 86.6; 80.0 against 79.6"),
    ("small weight-activation", S2FT, "87.2 against 86.6; 79.8 against 79.6"),
    (S2FT, "small gradient", "86.6 against 86.2; 79.6 against 79.5"),
    (S2FT, "large weight", "86.6 against 85.9; 79.6 against 78.4"),
    ("small activation", "large activation", "87.3 against 84.7; 80.0 against 77.1"),
    ("small weight-activation", "large weight-activation", "87.2 against 85.1; 79.8 against 76.8"),
    ("small gradient", "large gradient", "86.2 against 85.4; 79.5 against 77.8"),
    ("large weight", "small weight", "85.9 against 85.3; 78.4 against 78.4"),
)


def list_claims(reading: Reading) -> list[Claim]:
    """List the claims, ready to be judged."""
    return [*_method_claims(reading), *_selection_claims(reading), *_fusion_claims(reading)]


def _method_claims(reading: Reading) -> list[Claim]:
    return [
        Claim(
            "S2FT answers more than LoRA",
            "86.6 against 82.5; 79.6 against 77.2",
            _beside_lora(reading, "right", "`{}`"),
            percent,
            is_below=False,
        ),
        Claim("S2FT's held-out loss is below LoRA's", "no figure", _beside_lora(reading, "loss", "`{}`"), loss),
        Claim(
            "S2FT forgets less than LoRA",
            "beside full fine-tuning alone",
            [
                *_beside_lora(reading, "known_loss", "skills, after `{}`"),
                *_beside_lora(reading, "prose_loss", "prose, after `{}`"),
            ],
            loss,
        ),
    ]


def _selection_claims(reading: Reading) -> list[Claim]:
    return [
        Claim(
            f"channels: {first} fits better than {second}",
            paper,
            [Finding(f"`{CONTENT}`", *(reading.figures(Lesson(way), "loss") for way in (first, second)))],
            loss,
        )
        for first, second, paper in SELECTION_ORDERS
    ]


def _fusion_claims(reading: Reading) -> list[Claim]:
    def sides(figure: str, one: Fusion, other: Fusion) -> list[Finding]:
        return [
            Finding(
                f"`{skill}`", *(reading.figures(which, f"{figure}_{skill}", part="fusions") for which in (one, other))
            )
            for skill in FUSED
        ]

    lost = [Finding(f"`{skill}`", *(_lost(reading, which, skill) for which in (OWN, Fusion(LORA)))) for skill in FUSED]
    return [
        Claim(
            "fused, disjoint channels answer more than the same channels",
            "said to; no figure",
            sides("right", OWN, Fusion(S2FT)),
            percent,
            is_below=False,
        ),
        Claim(
            "fused, disjoint channels have less loss than the same channels",
            "no figure",
            sides("loss", OWN, Fusion(S2FT)),
            loss,
        ),
        Claim(
            "fused, S2FT answers more than LoRA",
            "84.0 against 79.8; 75.3 against 71.6",
            sides("right", OWN, Fusion(LORA)),
            percent,
            is_below=False,
        ),
        Claim("by fusion, S2FT loses fewer answers than LoRA", "2.6 against 3.3; 4.3 against 5.6", lost, percent),
    ]


def _beside_lora(reading: Reading, figure: str, where: str) -> list[Finding]:
    return [
        Finding(where.format(skill), *(reading.figures(Lesson(way, skill), figure) for way in (S2FT, LORA)))
        for skill in SKILLS
    ]


def _lost(reading: Reading, fusion: Fusion, skill: str) -> Sequence[float]:
    """Return, seed by seed, which share of the answers was right alone and is no longer."""
    alone, fused = (reading.figures(fusion, f"{told}right_{skill}", part="fusions") for told in ("alone_", ""))
    return [before - after for before, after in zip(alone, fused, strict=True)]
