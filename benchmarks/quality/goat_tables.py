"""The tables on GOAT: rates that were tried, ways beside each other, two scales over rates, and where tokens went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from goat_plan import (
    GOAT,
    GOAT_PLAIN,
    METHODS,
    MIXTURE,
    MIXTURE_PLAIN,
    RATES,
    SEGMENTS,
    SWEPT,
    SWEPT_RATES,
    UNBALANCED,
    Cell,
    chosen_cell,
    chosen_rate,
)
from readings import Reading
from tables import loss, number, percent, spread, table

LEARNED: dict[str, Callable[[float], str]] = {"loss": loss, "right": percent}
SHARES: dict[str, Callable[[float], str]] = {
    "least": percent,
    "greatest": percent,
    "least_of_all": percent,
    "greatest_of_all": percent,
    "effective": lambda value: f"{value:.2f}",
    "idle": number,
}
SHARES_HEAD = ("least share", "greatest", "least of all", "greatest of all", "effective experts", "idle experts")


def figures_of(reading: Reading, way: str, figure: str) -> Sequence[float]:
    """Return what a way gave at the rate that was chosen, seed by seed."""
    return reading.figures(chosen_cell(reading["trials"], way), figure)


def count(reading: Reading, way: str, figure: str = "parameters") -> str:
    """Write how many numbers a way trains, those of the routers apart."""
    return number(fmean(figures_of(reading, way, figure)))


def rates_table(reading: Reading) -> str:
    """Write the loss at every rate tried under the tuning seed; the chosen one in bold."""
    rows = []
    for way, tried in RATES.items():
        texts = []
        for rate in tried:
            text = f"{loss(reading.figures(Cell(way, rate), 'loss', part='trials', num=1)[0])} at {rate:g}"
            texts.append(f"**{text}**" if rate == chosen_rate(reading["trials"], way) else text)
        rows.append([way, ", ".join(texts)])
    return table(("way", "loss"), rows)


def methods_table(reading: Reading) -> str:
    """Write what every way learned at its rate, and with how many numbers."""
    return table(
        ("way", "numbers in A and B", "in routers", "learning rate", "loss", "right answers"),
        [
            [
                way,
                count(reading, way),
                count(reading, way, "router_parameters"),
                _rate(reading, way),
                *_told(reading, way, LEARNED),
            ]
            for way in METHODS
        ],
    )


def sweep_table(reading: Reading) -> str:
    """Write what both scales come to at every rate."""
    rows = [
        [
            f"{rate:g}",
            *(spread(reading.figures(Cell(way, rate), "loss"), loss) for way in SWEPT),
            *_right(reading, rate),
        ]
        for rate in SWEPT_RATES
    ]
    head = ("learning rate", "loss, theoretical scale", "plain scale", "right, theoretical scale", "plain scale")
    return table(head, rows)


def balance_table(reading: Reading) -> str:
    """Write where tokens went, with the balance loss and without, and in what else has experts."""
    ways = (GOAT, UNBALANCED, GOAT_PLAIN, MIXTURE, MIXTURE_PLAIN)
    return table(
        ("way", "loss", *SHARES_HEAD),
        [[way, *_told(reading, way, {"loss": loss} | SHARES)] for way in ways],
    )


def segments_table(reading: Reading) -> str:
    """Write what experts from other slices of the spectrum learned."""
    names = {GOAT: "`head`: the first of each eighth", **{name: f"`{name}`" for name in SEGMENTS}}
    return table(
        ("directions", "learning rate", "loss", "right answers"),
        [[name, _rate(reading, way), *_told(reading, way, LEARNED)] for way, name in names.items()],
    )


def _right(reading: Reading, rate: float) -> list[str]:
    return [spread(reading.figures(Cell(way, rate), "right"), percent) for way in SWEPT]


def _rate(reading: Reading, way: str) -> str:
    return f"{chosen_rate(reading['trials'], way):g}"


def _told(reading: Reading, way: str, forms: dict[str, Callable[[float], str]]) -> list[str]:
    return [spread(figures_of(reading, way, figure), form) for figure, form in forms.items()]
