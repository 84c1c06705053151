"""The claims of LoRAM that can be looked at here, each with the paper's figures and ours.

Source: LoRAM, arXiv:2502.13533: LLaMA-2 and 3.1, tuned on OpenHermes, answers of GSM8K unless a claim says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from claims import Claim, Finding
from loram_plan import (
    ALIGNMENTS,
    BY_LOQT,
    MIDDLE,
    PLAIN,
    QLORAM,
    RANDOM,
    RATIOS,
    STRUCTURED,
    WHOLE,
    Lesson,
    list_curves,
    list_cuts,
)
from loram_tables import UNTUNED, at_ratios, lesson_name
from readings import Reading
from tables import loss, percent

UNTUNED_ANSWERS = "random 27.22, structured 24.64, 4:8 36.92, unstructured 31.92 against 24.26"

FIGURES = (("loss", "the loss of what is recovered"), ("prose_loss", "the copy's own loss of prose"))


def list_claims(reading: Reading) -> list[Claim]:
    """List the claims, ready to be judged."""
    return [*_recovery_claims(reading), *_cut_claims(reading), *_alignment_claims(reading)]


def _recovery_claims(reading: Reading) -> list[Claim]:
    cuts = list_cuts()
    return [
        Claim(
            "recovered, it answers more than the untuned base",
            UNTUNED_ANSWERS,
            _beside(reading, "right", cuts, UNTUNED),
            percent,
            is_below=False,
        ),
        Claim(
            "recovered, it has less loss than the untuned base",
            "no figure",
            _beside(reading, "loss", cuts, UNTUNED),
            loss,
        ),
        Claim(
            "on the base it has less loss than on the copy",
            "perplexity 2.5 against 621.98, at 28.56 times fewer bits",
            _before_recovery(reading, "loss", cuts),
            loss,
        ),
        Claim(
            "on the base it answers more than on the copy",
            "no figure",
            _before_recovery(reading, "right", cuts),
            percent,
            is_below=False,
        ),
        Claim(
            "a LoRA on the base has less loss than what was recovered",
            "no figure",
            [Finding(lesson_name(one), *_figures(reading, "loss", WHOLE, one)) for one in cuts],
            loss,
        ),
        Claim(
            "a LoRA on the base answers more than what was recovered",
            "80.74 against 80.36 (70B, in NF4)",
            [Finding(lesson_name(one), *_figures(reading, "right", WHOLE, one)) for one in cuts],
            percent,
            is_below=False,
        ),
    ]


def _cut_claims(reading: Reading) -> list[Claim]:
    steps = [pair for curve in list_curves() for pair in pairwise(at_ratios(*curve))]
    return [
        Claim(
            "what leaves out less has less loss, recovered",
            "falls off at 28.56 times fewer bits",
            [_finding(reading, f"{lesson_name(less)} beside {more.ratio}", less, more) for less, more in steps],
            loss,
        ),
        Claim(
            "random has less loss than structured, recovered",
            "27.22 against 24.64 of answers; of MathQA's 33.77 against 33.80",
            [_finding(reading, ratio, Lesson(RANDOM, ratio), Lesson(STRUCTURED, ratio)) for ratio in RATIOS],
            loss,
        ),
        Claim(
            "trained on float32 it has less loss than on NF4, recovered",
            "no figure",
            [_finding(reading, f"{STRUCTURED}, {MIDDLE}", Lesson(STRUCTURED, MIDDLE), QLORAM)],
            loss,
        ),
    ]


def _alignment_claims(reading: Reading) -> list[Claim]:
    def pairs(alignment: str) -> Iterable[tuple[str, Lesson, Lesson]]:
        for ratio in RATIOS:
            if (aligned := Lesson(STRUCTURED, ratio, alignment)) in list_cuts():
                yield f"{STRUCTURED}, {ratio}", aligned, Lesson(STRUCTURED, ratio)

    beside_none = [
        Claim(
            f"with {alignment} alignment {told} is less than without",
            paper,
            [_finding(reading, where, one, other, figure) for where, one, other in pairs(alignment)],
            loss,
        )
        for alignment in ALIGNMENTS
        for (figure, told), paper in zip(FIGURES, ("said to be; no figure", "no figure"), strict=True)
    ]
    both = [Lesson(STRUCTURED, MIDDLE, alignment) for alignment in (PLAIN, BY_LOQT)]
    return [
        *beside_none,
        *(
            Claim(
                f"with plain alignment {told} is less than by LoQT",
                "no figure",
                [_finding(reading, f"{STRUCTURED}, {MIDDLE}", *both, figure)],
                loss,
            )
            for figure, told in FIGURES
        ),
    ]


def _beside(reading: Reading, figure: str, lessons: Iterable[Lesson], other: Lesson) -> list[Finding]:
    return [_finding(reading, lesson_name(lesson), lesson, other, figure) for lesson in lessons]


def _before_recovery(reading: Reading, figure: str, lessons: Iterable[Lesson]) -> list[Finding]:
    return [
        Finding(lesson_name(one), *(reading.figures(one, name) for name in (figure, f"copy_{figure}")))
        for one in lessons
    ]


def _finding(reading: Reading, where: str, one: Lesson, other: Lesson, figure: str = "loss") -> Finding:
    return Finding(where, *_figures(reading, figure, one, other))


def _figures(reading: Reading, figure: str, one: Lesson, other: Lesson) -> tuple[Sequence[float], Sequence[float]]:
    return reading.figures(one, figure), reading.figures(other, figure)
