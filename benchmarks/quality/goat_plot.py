"""The plot on GOAT: what two scales come to over learning rates."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from goat_plan import SWEPT, SWEPT_RATES, Cell
from readings import Reading


def draw_goat(reading: Reading, path: Path) -> None:
    """Draw the held-out loss and the share of right answers over the rates, with the reach of the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axes, name in ((left, "loss"), (right, "right")):
        for way in SWEPT:
            seeds = [reading.figures(Cell(way, rate), name) for rate in SWEPT_RATES]
            (line,) = axes.plot(SWEPT_RATES, list(map(fmean, seeds)), marker="o", markersize=4, label=way)
            reach = list(map(min, seeds)), list(map(max, seeds))
            axes.fill_between(SWEPT_RATES, *reach, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xscale="log", xlabel="learning rate")
        axes.set_xticks(SWEPT_RATES, [f"{rate:g}" for rate in SWEPT_RATES])
        axes.minorticks_off()
        axes.grid(axis="y", linewidth=0.3)
    left.set(yscale="log", ylabel="held-out loss")
    right.set(ylim=(-0.03, 1.03), ylabel="answers that are right")
    left.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
