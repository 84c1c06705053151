"""How commands print rows and times: plain columns, whole words, nothing cut to a terminal's width."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out under their headings, two spaces between the columns."""
    lines = [headings, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(headings))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def moment(time: datetime | None) -> str:
    """Write a time to the second, in UTC; none is empty."""
    return "" if time is None else time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
