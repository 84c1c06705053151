"""Write docs/quality.md, and its plots, from the committed result files alone.

A subject is a script beside this one, which measures and writes `benchmarks/results/NAME.json`, and a function that
makes a section of what it reads there; another that draws it, if there is something to see. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from claims import RULE
from goat_plot import draw_goat
from goat_section import goat_section
from pruning_plot import draw_pruning
from pruning_section import pruning_section
from readings import Reading
from s2ft_section import s2ft_section
from tables import paragraph
from training_memory_section import training_memory_section

HOUSE = Path(__file__).parents[2]
PAGE = HOUSE / "docs" / "quality.md"
RESULTS = HOUSE / "benchmarks" / "results"

SECTIONS: dict[str, Callable[[Reading], str]] = {
    "quality_pruning": pruning_section,
    "quality_s2ft": s2ft_section,
    "quality_goat": goat_section,
    "quality_training_memory": training_memory_section,
}
PLOTS: dict[str, Callable[[Reading, Path], None]] = {"quality_pruning": draw_pruning, "quality_goat": draw_goat}

HEAD = (
    "# Quality",
    paragraph(
        """What papers claim of the methods in this repository, and what came of each claim here. This page is written
        by `make quality-page` from the result files in `benchmarks/results`, and by no hand; `make quality` measures
        all of them anew first."""
    ),
    paragraph(
        """Everything was measured on the small language model that is a part of this repository, trained from nothing
        on text that a script generates. What was seen there is true of that model and that text, and says nothing of a
        larger one. A paper's figures stand beside it for what they claim; no number is to be held against theirs."""
    ),
    paragraph(RULE),
)


def render(results: Path = RESULTS) -> str:
    """Return the page. Raises: IncompleteResultError where a figure is not there."""
    readings = {name: Reading.open(results, name) for name in SECTIONS}
    sections = (section(readings[name]) for name, section in SECTIONS.items())
    return "\n\n".join([*HEAD, _time(readings), *sections]) + "\n"


def _time(readings: Mapping[str, Reading]) -> str:
    """Write what the measurements took, as far as the result files say."""
    minutes = {name: reading["setting"].get("minutes") for name, reading in readings.items()}
    told = [f"`{name}` {taken:.0f} minutes" for name, taken in minutes.items() if taken is not None]
    told += [f"`{name}` a time that was not recorded" for name, taken in minutes.items() if taken is None]
    return paragraph(f"Each file took, on the machine that its section names: {'; '.join(told)}.")


def main() -> None:
    """Write the page and the plots."""
    PAGE.write_text(render())
    for name, draw in PLOTS.items():
        draw(Reading.open(RESULTS, name), RESULTS / f"{name}.png")
    print(f"wrote {PAGE.relative_to(HOUSE)}")


if __name__ == "__main__":
    main()
