"""The part of the page on a larger base: the same sections, of the result files that were measured on one.

Owns its heading, and that all of them are of the same base. Pure; no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from readings import IncompleteResultError, Reading
from subject import LARGER
from tables import number, paragraph

TITLE = "On a larger base"


def name_larger(name: str) -> str:
    """Return the name of the result file of a larger base, beside that of the embedded one."""
    return f"{name}_{LARGER}"


def open_larger(folder: Path, names: Iterable[str]) -> dict[str, Reading]:
    """Read those files of a larger base that are there, by the names of the embedded one's.

    Raises: IncompleteResultError if one does not say which base it was measured on, or says another than the first.
    """
    found = {
        name: Reading.open(folder, name_larger(name))
        for name in names
        if (folder / f"{name_larger(name)}.json").exists()
    }
    for reading in found.values():
        first = next(iter(found.values()))
        if _subject(reading) != _subject(first):
            raise IncompleteResultError(f"{reading.name} was measured on another base than {first.name}")
    return found


def larger_part(sections: Mapping[str, Callable[[Reading], str]], found: Mapping[str, Reading]) -> list[str]:
    """Write the heading and every section under it, one level down; nothing, where there are no files."""
    if not found:
        return []
    subject = _subject(next(iter(found.values())))
    opening = paragraph(
        f"""The same on a base of {number(subject["parameters"])} parameters, {subject["layers"]} layers of a hidden
        size of {subject["hidden"]}, which `recipes/tiny/train_base.py` trained from nothing on text of the same
        generator. It is no part of this repository: where torch sees a GPU, `make quality` trains it before it
        measures. What was seen here is true of that base and that text. What is not told here was not measured on
        it."""
    )
    return [f"## {TITLE}", opening, *(_lowered(sections[name](reading)) for name, reading in found.items())]


def _lowered(section: str) -> str:
    return re.sub(r"^#", "##", section, flags=re.MULTILINE)


def _subject(reading: Reading) -> dict[str, Any]:
    if "subject" not in reading["setting"]:
        raise IncompleteResultError(f"{reading.name} does not say which base it was measured on")
    subject: dict[str, Any] = reading["setting"]["subject"]
    return subject
