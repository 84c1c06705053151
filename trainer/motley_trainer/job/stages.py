"""Directories that a job's stages leave for those after them: each there whole or not at all, and bound to the job.

A directory that is there is done, unless it is of another job, and then it is made anew. Knows nothing of what is in
them. Runs on the thread that trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motley_trainer.files.durable import sweep, write_folder

STAGE_FILE = "motley_stage.json"


@dataclass(frozen=True, eq=False, slots=True)
class Stage:
    """What a stage left: a directory, and what it has said of it."""

    directory: Path
    facts: Mapping[str, Any]


class Stages:
    """The stages of one job, in a folder of their own; `binding` is what makes them this job's and no other's."""

    def __init__(self, folder: Path, binding: Mapping[str, str]) -> None:
        self._folder = folder
        self._binding = dict(binding)
        sweep(folder)

    def find(self, name: str) -> Stage | None:
        """Return what a stage left, None if it is still to be done."""
        directory = self._folder / name
        try:
            found = json.loads((directory / STAGE_FILE).read_bytes())
        except FileNotFoundError:
            return None
        return Stage(directory, found["facts"]) if found["binding"] == self._binding else None

    def write(self, name: str, fill: Callable[[Path], Mapping[str, object]]) -> Stage:
        """Have a stage's directory filled, and return it; `fill` returns the facts.

        Raises: OutputError with reason DISK_FULL or OUTPUT_UNWRITABLE; what was there before is then still there.
        """
        told: list[Mapping[str, object]] = []

        def fill_and_bind(aside: Path) -> None:
            told.append(fill(aside))
            text = json.dumps({"binding": self._binding, "facts": told[0]}, indent=2, allow_nan=False)
            (aside / STAGE_FILE).write_text(f"{text}\n", encoding="utf-8")

        directory = self._folder / name
        write_folder(directory, fill_and_bind)
        return Stage(directory, told[0])

    def folder(self, name: str) -> Path:
        """Return a folder for what a stage needs while it is under way."""
        return self._folder / name
