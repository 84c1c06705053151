"""What is measured of LoRAM: ways of cutting, ratios, alignments, learning rates, and the cells of the page.

Owns names and numbers alone, for the script that measures and for the section that tells; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SKILL = "next"
RANK = 8
STEPS, ROWS = 160, 8
MAX_LENGTH = 128  # tokens, of a window to align on too
NUM_ASKED = 64
PROSE_LETTERS = 4096

CALIBRATION_SAMPLES = 64
RATIOS = ("1/4", "1/2", "3/4")
MIDDLE = RATIOS[1]  # of what is measured at one ratio alone, and of what learning rates are chosen by
PATTERN = "4:8"

ALIGNMENT_LETTERS = 60_000
ALIGNMENT_STEPS, ALIGNMENT_ROWS = 60, 8
PLAIN, BY_LOQT = "plain", "LoQT"
ALIGNMENTS: dict[str, dict[str, Any]] = {  # by name, what is set of one beside text, steps and rate
    PLAIN: {},
    BY_LOQT: {"loqt": {"merge_interval": 15}},  # steps
}
ALIGNMENT_RATES = {PLAIN: (1e-4, 3e-4, 1e-3), BY_LOQT: (1e-3, 3e-3, 1e-2)}

RATES = (2e-3, 4e-3, 8e-3)

BASE, LORA = "none", "LoRA"
STRUCTURED, RANDOM, UNSTRUCTURED, SEMI_STRUCTURED = "structured", "random", "unstructured", "4:8"
PRUNINGS = {
    STRUCTURED: "STRUCTURED",
    RANDOM: "RANDOM",
    UNSTRUCTURED: "UNSTRUCTURED",
    SEMI_STRUCTURED: "SEMI_STRUCTURED",
}
NF4 = "nf4"


@dataclass(frozen=True, slots=True)
class Lesson:
    """One training at the rate that was chosen.

    Semantics: `way` is BASE for the base alone, LORA, or what LoRAM leaves out; a ratio goes with each of these but the
    pattern. `alignment` is one of ALIGNMENTS; `quantization` how what is trained on is held.
    """

    way: str
    ratio: str | None = None
    alignment: str | None = None
    quantization: str = "none"

    @property
    def is_cut(self) -> bool:
        """Tell whether it is trained on a copy."""
        return self.way in PRUNINGS


@dataclass(frozen=True, slots=True)
class Trial:
    """One training under the seed that learning rates are chosen by.

    Semantics: without an `alignment_rate`, nothing is aligned.
    """

    way: str
    alignment: str | None
    quantization: str
    rate: float
    alignment_rate: float | None = None

    @property
    def lesson(self) -> Lesson:
        """Return what is trained."""
        ratio = MIDDLE if self.way in PRUNINGS and self.way != SEMI_STRUCTURED else None
        return Lesson(self.way, ratio, self.alignment, self.quantization)


WHOLE = Lesson(LORA)
AT_ONE_RATIO = (Lesson(STRUCTURED, MIDDLE, BY_LOQT), Lesson(UNSTRUCTURED, MIDDLE), Lesson(SEMI_STRUCTURED))
QLORAM = Lesson(STRUCTURED, MIDDLE, quantization=NF4)


def cut_layers(num_layers: int) -> str:
    """Return which of a base's layers are cut: the ends stay whole, as in the paper."""
    return f"1:{num_layers - 1}"


def list_curves() -> tuple[tuple[str, str | None], ...]:
    """List what is measured over all ratios: what goes, and how the copy is aligned."""
    return ((STRUCTURED, None), (RANDOM, None), (STRUCTURED, PLAIN))


def list_cuts() -> tuple[Lesson, ...]:
    """List every training on a copy, in the order of the page."""
    curves = (Lesson(way, ratio, alignment) for way, alignment in list_curves() for ratio in RATIOS)
    return (*curves, *AT_ONE_RATIO, QLORAM)


def list_lessons() -> tuple[Lesson, ...]:
    """List what is trained, that on the whole base first."""
    return (WHOLE, *list_cuts())


def list_alignment_trials() -> tuple[Trial, ...]:
    """List what is tried first: every rate of every alignment, at one rate of what follows it."""
    return tuple(
        Trial(STRUCTURED, alignment, "none", RATES[1], rate)
        for alignment, rates in ALIGNMENT_RATES.items()
        for rate in rates
    )


def list_trials(aligned: Sequence[Mapping[str, Any]]) -> tuple[Trial, ...]:
    """List what is tried then: every rate of every way, at one ratio, aligned at the rate that was chosen."""
    ways = dict.fromkeys((lesson.way, lesson.alignment, lesson.quantization) for lesson in list_lessons())
    return tuple(
        Trial(way, alignment, quantization, rate, chosen_alignment_rate(aligned, alignment))
        for way, alignment, quantization in ways
        for rate in RATES
    )


def chosen_alignment_rate(aligned: Sequence[Mapping[str, Any]], alignment: str | None) -> float | None:
    """Return the rate of an alignment with the least loss on the base."""
    if alignment is None:
        return None
    tried = [row for row in aligned if row["alignment"] == alignment]
    best: float = min(tried, key=lambda row: row["loss"])["alignment_rate"]
    return best


def chosen_rate(trials: Sequence[Mapping[str, Any]], lesson: Lesson) -> float:
    """Return the rate with the least loss on the base, of those that were tried on the same kind of copy."""
    wanted = {"way": lesson.way, "alignment": lesson.alignment, "quantization": lesson.quantization}
    tried = [row for row in trials if wanted.items() <= row.items()]
    best: float = min(tried, key=lambda row: row["loss"])["rate"]
    return best
