"""The tables on LoQT: rates that were tried, and what every way of training came to."""

from __future__ import annotations

from collections.abc import Sequence

from loqt_plan import CONTINUED, FULL, LOQT, RATES, SCRATCH, Lesson, Trial, chosen_rate, list_lessons
from readings import Reading
from tables import loss, number, spread, table

STARTS = {SCRATCH: "from scratch", CONTINUED: "on from the base"}


def rates_table(reading: Reading) -> str:
    """Write the held-out loss at every rate tried; the chosen one in bold."""
    rows = []
    for (start, way), rates in RATES.items():
        row = [STARTS[start], way]
        for tried in rates:
            found = reading.figures(Trial(start, way, tried), "loss", part="trials", num=1)[0]
            text = f"{loss(found)} at {tried:g}"
            row.append(f"**{text}**" if tried == chosen_rate(reading["trials"], start, way) else text)
        rows.append(row)
    return table(("training", "way", "loss at the least rate", "between", "at the greatest"), rows)


def ways_table(reading: Reading) -> str:
    """Write what every way came to, what it began from first."""
    rows = []
    for start, named in STARTS.items():
        before = reading.figures(Lesson(start, FULL), "loss_before")
        rows.append([named, "before", spread(before, loss), "", ""])
        for lesson in list_lessons():
            if lesson.start == start:
                after = reading.figures(lesson, "loss")
                rows.append(
                    [
                        named,
                        lesson.way,
                        spread(after, loss),
                        _over_full(reading, lesson, after),
                        _merges(reading, lesson),
                    ]
                )
    return table(("training", "way", "held-out loss", "over full training's", "merges"), rows)


def _over_full(reading: Reading, lesson: Lesson, after: Sequence[float]) -> str:
    if lesson.way == FULL:
        return ""
    full = reading.figures(Lesson(lesson.start, FULL), "loss")
    return spread([own / of_full for own, of_full in zip(after, full, strict=True)], "{:.3f}".format)


def _merges(reading: Reading, lesson: Lesson) -> str:
    return "" if lesson.way == FULL else spread(reading.figures(lesson, "merges"), number)


def rate(reading: Reading, start: str, way: str = LOQT) -> str:
    """Write the learning rate that was chosen."""
    return f"{chosen_rate(reading['trials'], start, way):g}"
