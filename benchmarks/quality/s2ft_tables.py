"""The tables on S2FT and LoRA: rates that were tried, what was learned and forgotten, what is left of two fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean

from readings import Reading
from s2ft_plan import (
    CONTENT,
    FUSED,
    FUSIONS,
    LORA,
    METHODS,
    S2FT,
    SELECTIONS,
    SKILLS,
    Fusion,
    Lesson,
    Trial,
    chosen_rate,
    rates_of,
)
from tables import loss, number, percent, spread, table

KNOWN: dict[str, Callable[[float], str]] = {"known_loss": loss, "known_right": percent, "prose_loss": loss}
LEARNED: dict[str, Callable[[float], str]] = {"loss": loss, "right": percent}
LEARNED_HEAD = ("loss", "right answers", "loss of known skills", "right", "loss of prose")
FUSED_HEAD = ("fused", "channels of both", "skill", "loss alone", "fused", "right alone", "fused", "known skills right")


def way_name(way: str) -> str:
    """Name a way of training beside others."""
    return f"S2FT, {way}" if way in SELECTIONS else way


def fusion_name(fusion: Fusion) -> str:
    """Name two adapters that were trained alike."""
    if fusion.way == LORA:
        return LORA
    return f"S2FT, {'disjoint channels' if fusion.is_disjoint else 'the same channels'}"


def num_parameters(reading: Reading, way: str) -> str:
    """Write how many numbers a way trains."""
    return number(fmean(reading.figures(Lesson(way), "parameters")))


def rate(reading: Reading, way: str, skill: str) -> str:
    """Write the learning rate that was chosen."""
    return f"{chosen_rate(reading['trials'], way, skill):g}"


def rates_table(reading: Reading) -> str:
    """Write the loss of a skill, and of those that the base knows, at every rate tried; the chosen one in bold."""
    rows = []
    for way, skill in (*((way, skill) for skill in SKILLS for way in METHODS), *_selections()):
        row = [f"`{skill}`", way_name(way)]
        for tried in rates_of(way):
            trial = Trial(way, skill, tried)
            learned, known = (reading.figures(trial, name, part="trials", num=1)[0] for name in ("loss", "known_loss"))
            text = f"{loss(learned)} / {loss(known)} at {tried:g}"
            row.append(f"**{text}**" if f"{tried:g}" == rate(reading, way, skill) else text)
        rows.append(row)
    return table(("skill", "way", "loss / of known skills, at the least rate", "between", "at the greatest"), rows)


def methods_table(reading: Reading) -> str:
    """Write what both methods learned and forgot, the base first."""
    rows = [["", "none: the base", "", "", *_told(reading, Lesson(), KNOWN)]]
    for skill in SKILLS:
        for way in METHODS:
            known = _told(reading, Lesson(way, skill), LEARNED | KNOWN)
            rows.append([f"`{skill}`", way_name(way), *known])
    return table(("trained on", "way", *LEARNED_HEAD), rows)


def selections_table(reading: Reading) -> str:
    """Write what every choice of channels came to."""
    rows = [[way, rate(reading, way, CONTENT), *_told(reading, Lesson(way), LEARNED | KNOWN)] for way in SELECTIONS]
    return table(("channels", "learning rate", *LEARNED_HEAD), rows)


def fusions_table(reading: Reading) -> str:
    """Write what two adapters do together, beside each alone."""
    rows = []
    for fusion in FUSIONS:
        shared = number(fmean(reading.figures(fusion, "shared", part="fusions")))
        for skill in FUSED:
            row = [fusion_name(fusion), "" if fusion.way == LORA else shared, f"`{skill}`"]
            for figure, form in LEARNED.items():
                for told in ("alone_", ""):
                    row.append(spread(reading.figures(fusion, f"{told}{figure}_{skill}", part="fusions"), form))
            rows.append([*row, spread(reading.figures(fusion, "known_right", part="fusions"), percent)])
    return table(FUSED_HEAD, rows)


def _told(reading: Reading, lesson: Lesson, forms: dict[str, Callable[[float], str]]) -> list[str]:
    return [spread(reading.figures(lesson, figure), form) for figure, form in forms.items()]


def _selections() -> Iterable[tuple[str, str]]:
    return ((way, CONTENT) for way in SELECTIONS if way != S2FT)
