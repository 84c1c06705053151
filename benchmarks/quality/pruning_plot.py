"""The plot on structural pruning: what is left of perplexity and skills, by criterion and cut."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from pruning_plan import CRITERIA, LOCAL, Cell
from pruning_tables import title
from readings import Reading

TICKS = (1, 2, 5, 10, 20, 50)


def draw_pruning(reading: Reading, path: Path) -> None:
    """Draw perplexity over the whole base's on the same text, and the share of right answers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    base = reading.figures(Cell(), "perplexity")
    for place, cut in enumerate(LOCAL):
        cells = [Cell(cut, criterion) for criterion in CRITERIA]
        lost = [
            [own / whole for own, whole in zip(reading.figures(cell, "perplexity"), base, strict=True)]
            for cell in cells
        ]
        at = [index + 0.16 * (place - 1.5) for index in range(len(CRITERIA))]
        _dots(left, at, lost, title(reading, cut))
        _dots(right, at, [list(reading.figures(cell, "skills")) for cell in cells], title(reading, cut))
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(yscale="log", ylabel="perplexity over the whole base's")
    left.set_yticks(TICKS, map(str, TICKS))
    left.minorticks_off()
    right.set(ylim=(-0.03, 1.03), ylabel="answers that are right")
    for axes in (left, right):
        axes.set_xticks(range(len(CRITERIA)), CRITERIA, rotation=30, ha="right")
        axes.grid(axis="y", linewidth=0.3)
    left.legend(title="parameters gone", fontsize="small", loc="center left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _dots(axes: Any, at: list[float], values: list[list[float]], label: str) -> None:
    """Draw a mean for each place, with the reach of the seeds."""
    means = [fmean(seeds) for seeds in values]
    below = [mean - min(seeds) for mean, seeds in zip(means, values, strict=True)]
    above = [max(seeds) - mean for mean, seeds in zip(means, values, strict=True)]
    axes.errorbar(at, means, yerr=[below, above], fmt="o", markersize=4, capsize=2, label=label)
