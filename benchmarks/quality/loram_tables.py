"""The tables on LoRAM: rates that were tried, and what factors do on their copy and on the base."""

from __future__ import annotations

from statistics import fmean

from loram_plan import (
    ALIGNMENT_RATES,
    ALIGNMENTS,
    BASE,
    LORA,
    NF4,
    PLAIN,
    RATES,
    RATIOS,
    WHOLE,
    Lesson,
    Trial,
    chosen_alignment_rate,
    chosen_rate,
    list_alignment_trials,
    list_cuts,
    list_lessons,
)
from readings import Reading
from tables import loss, number, percent, spread, table

UNTUNED = Lesson(BASE)


def lesson_name(lesson: Lesson) -> str:
    """Name a training beside others."""
    if not lesson.is_cut:
        return "LoRA" if lesson.way == LORA else "the base alone"
    return ", ".join([lesson.way, *([lesson.ratio] if lesson.ratio else []), *_more(lesson)])


def gone(reading: Reading, lesson: Lesson) -> str:
    """Write which share of the base's parameters a copy lacks."""
    left, whole = (fmean(reading.figures(one, "base_parameters")) for one in (lesson, UNTUNED))
    return f"{1 - left / whole:.0%}"


def trained(reading: Reading, lesson: Lesson) -> str:
    """Write how many numbers are trained."""
    return number(fmean(reading.figures(lesson, "trained")))


def trial_losses(reading: Reading, trial: Trial, part: str) -> str:
    """Write the losses that a rate came to, on the copy and on the base."""
    names = ("copy_loss", "loss") if trial.lesson.is_cut else ("loss",)
    return " / ".join(loss(reading.figures(trial, name, part=part, num=1)[0]) for name in names)


def alignments_table(reading: Reading) -> str:
    """Write the losses at every rate of alignment tried; the chosen one in bold."""
    rows = []
    for alignment in ALIGNMENTS:
        row, chosen = [f"{alignment} alignment"], chosen_alignment_rate(reading["aligned"], alignment)
        for trial in list_alignment_trials():
            if trial.alignment == alignment:
                assert trial.alignment_rate is not None
                row.append(_tried(trial_losses(reading, trial, "aligned"), trial.alignment_rate, chosen))
        rows.append(row)
    return table(("", *_rates_head(len(ALIGNMENT_RATES[PLAIN]))), rows)


def rates_table(reading: Reading) -> str:
    """Write the losses at every rate tried; the chosen one in bold."""
    rows = {}
    for lesson in list_lessons():
        key = (lesson.way, lesson.alignment, lesson.quantization)
        if key in rows:
            continue
        aligned_at = chosen_alignment_rate(reading["aligned"], lesson.alignment)
        chosen = chosen_rate(reading["trials"], lesson)
        tried = [Trial(*key, rate, aligned_at) for rate in RATES]
        name = lesson_name(tried[0].lesson)
        rows[key] = [name, *(_tried(trial_losses(reading, one, "trials"), one.rate, chosen) for one in tried)]
    return table(("", *_rates_head(len(RATES))), rows.values())


def lessons_table(reading: Reading) -> str:
    """Write what every training came to, on its copy and recovered, the base and a LoRA on it first."""
    rows = []
    for lesson in (UNTUNED, *list_lessons()):
        is_base = lesson == UNTUNED
        sizes = ["", ""] if is_base else [f"{chosen_rate(reading['trials'], lesson):g}", trained(reading, lesson)]
        row = [lesson_name(lesson), gone(reading, lesson) if lesson.is_cut else "", *sizes]
        row.append("" if lesson == WHOLE else spread(reading.figures(lesson, "prose_loss"), loss))
        for name, form in (("loss", loss), ("right", percent)):
            copy = spread(reading.figures(lesson, f"copy_{name}"), form) if lesson.is_cut else ""
            row += [copy, spread(reading.figures(lesson, name), form)]
        rows.append(row)
    sizes = ("parameters gone", "learning rate", "P", "loss of prose, before training")
    return table(("trained on", *sizes, "loss on the copy", "on the base", "right on the copy", "on the base"), rows)


def at_ratios(way: str, alignment: str | None) -> list[Lesson]:
    """Return the trainings of a curve, the least ratio first."""
    found = {lesson.ratio: lesson for lesson in list_cuts() if _is_on(lesson, way, alignment)}
    return [found[ratio] for ratio in RATIOS]


def _is_on(lesson: Lesson, way: str, alignment: str | None) -> bool:
    return (lesson.way, lesson.alignment, lesson.quantization) == (way, alignment, "none")


def _more(lesson: Lesson) -> list[str]:
    told = [] if lesson.alignment is None else [f"{lesson.alignment} alignment"]
    return [*told, "NF4"] if lesson.quantization == NF4 else told


def _rates_head(num: int) -> list[str]:
    return ["loss on the copy / on the base, at the least rate", *[""] * (num - 2), "at the greatest"]


def _tried(found: str, at: float, chosen: float | None) -> str:
    text = f"{found} at {at:g}"
    return f"**{text}**" if at == chosen else text
