"""The plot on LoRAM: losses over ratios, of factors on the copy they were trained on and recovered on the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loram_plan import RATIOS, WHOLE, list_curves
from loram_tables import UNTUNED, at_ratios
from readings import Reading


def draw_loram(reading: Reading, path: Path) -> None:
    """Draw the loss of the skill's answers: a panel for each curve, the untuned base and a LoRA on it as lines."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves = list_curves()
    figure, panels = pyplot.subplots(1, len(curves), figsize=(3.7 * len(curves), 3.8), sharey=True)
    for axes, (way, alignment) in zip(panels, curves, strict=True):
        lessons = at_ratios(way, alignment)
        for name, told, color in (("copy_loss", "on the copy", "tab:orange"), ("loss", "recovered", "tab:blue")):
            _dots(axes, [reading.figures(lesson, name) for lesson in lessons], told, color)
        axes.axhline(fmean(reading.figures(UNTUNED, "loss")), color="grey", linestyle=":", label="the untuned base")
        axes.axhline(fmean(reading.figures(WHOLE, "loss")), color="grey", linestyle="--", label="LoRA on the base")
        axes.set(yscale="log", xlabel="left out", title=way if alignment is None else f"{way}, {alignment} alignment")
        axes.set_xticks(range(len(RATIOS)), RATIOS)
        axes.grid(axis="y", linewidth=0.3)
    panels[0].set_ylabel("loss of the skill's answers")
    panels[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _dots(axes: Any, values: Sequence[Sequence[float]], label: str, color: str) -> None:
    """Draw a mean for each ratio, with the reach of the seeds."""
    means = [fmean(seeds) for seeds in values]
    below = [mean - min(seeds) for mean, seeds in zip(means, values, strict=True)]
    above = [max(seeds) - mean for mean, seeds in zip(means, values, strict=True)]
    axes.errorbar(range(len(values)), means, yerr=[below, above], marker="o", capsize=3, label=label, color=color)
