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
from larger_part import TITLE, larger_part, name_larger, open_larger
from loqt_section import loqt_section
from loram_memory_section import loram_memory_section
from loram_plot import draw_loram
from loram_section import loram_section
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
    "quality_loram": loram_section,
    "quality_loqt": loqt_section,
    "quality_training_memory": training_memory_section,
    "quality_loram_memory": loram_memory_section,
}
PLOTS: dict[str, Callable[[Reading, Path], None]] = {
    "quality_pruning": draw_pruning,
    "quality_goat": draw_goat,
    "quality_loram": draw_loram,
}

HEAD = (
    "# Quality",
    paragraph(
        """What papers claim of the methods in this repository, and what came of each claim here. This page is written
        by `make quality-page` from the result files in `benchmarks/results`, and by no hand; `make quality` measures
        all of them anew first."""
    ),
)


def render(results: Path = RESULTS) -> str:
    """Return the page. Raises: IncompleteResultError where a figure is not there."""
    readings = {name: Reading.open(results, name) for name in SECTIONS}
    larger = open_larger(results, SECTIONS)
    time = _time(readings | {name_larger(name): reading for name, reading in larger.items()})
    sections = (section(readings[name]) for name, section in SECTIONS.items())
    whole = [*HEAD, _scope(bool(larger)), paragraph(RULE), time, *sections, *larger_part(SECTIONS, larger)]
    return "\n\n".join(whole) + "\n"


def _scope(has_larger: bool) -> str:
    """Write what was seen is true of."""
    everything = f'Everything but what stands under "{TITLE}"' if has_larger else "Everything"
    return paragraph(
        f"""{everything} was measured on the small language model that is a part of this repository, trained from
        nothing on text that a script generates. What was seen there is true of that model and that text, and says
        nothing of a larger one. A paper's figures stand beside it for what they claim; no number is to be held against
        theirs."""
    )


def _time(readings: Mapping[str, Reading]) -> str:
    """Write what the measurements took, as far as the result files say."""
    minutes = {name: reading["setting"].get("minutes") for name, reading in readings.items()}
    told = [f"`{name}` {taken:.0f} minutes" for name, taken in minutes.items() if taken is not None]
    told += [f"`{name}` a time that was not recorded" for name, taken in minutes.items() if taken is None]
    return paragraph(f"Each file took, on the machine that its section names: {'; '.join(told)}.")


def main() -> None:
    """Write the page and the plots."""
    PAGE.write_text(render())
    larger = open_larger(RESULTS, PLOTS)
    for name, draw in PLOTS.items():
        for reading in (Reading.open(RESULTS, name), *([larger[name]] if name in larger else [])):
            draw(reading, RESULTS / f"{reading.name}.png")
    print(f"wrote {PAGE.relative_to(HOUSE)}")


if __name__ == "__main__":
    main()
