"""A result file as the page reads it: figures by cell, or a refusal where one is not there.

Owns what a complete file is. Knows nothing of any subject; no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cells import SEEDS


class IncompleteResultError(Exception):
    """Say what a result file lacks."""


class Reading:
    """One result file, complete as far as `require` was asked."""

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        self.name = name
        self._content = content

    @classmethod
    def open(cls, folder: Path, name: str) -> Reading:
        """Read a file of a folder. Raises: IncompleteResultError if it is not there, or of other seeds."""
        path = folder / f"{name}.json"
        if not path.exists():
            raise IncompleteResultError(f"{path} is not there: `make quality` writes it")
        reading = cls(name, json.loads(path.read_text()))
        if reading["seeds"] != list(SEEDS):
            raise IncompleteResultError(f"{name} has the seeds {reading['seeds']}, not {list(SEEDS)}")
        return reading

    def __getitem__(self, key: str) -> Any:
        """Return a part of the file. Raises: IncompleteResultError if it has none."""
        if key not in self._content:
            raise IncompleteResultError(f"{self.name} has no {key}")
        return self._content[key]

    def figures(self, cell: Any, figure: str, *, part: str = "cells", num: int = len(SEEDS)) -> Sequence[float]:
        """Return what a cell of a part gave, seed by seed.

        Raises: IncompleteResultError if there is no such cell, or not a number for every one of `num` seeds.
        """
        wanted = asdict(cell)
        found = [row for row in self[part] if wanted.items() <= row.items()]
        if len(found) != 1:
            raise IncompleteResultError(f"{self.name} has {len(found)} rows of {cell}")
        values = found[0].get(figure, [])
        if len(values) != num:
            raise IncompleteResultError(f"{self.name} has {len(values)} of {num} seeds' {figure} of {cell}")
        return [float(value) for value in values]
