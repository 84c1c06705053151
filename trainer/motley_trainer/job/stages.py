"""Directories that a job's stages leave for those after them: each there whole or not at all, and bound to the job.

A directory that is there is done, unless it is of another job or its files are not those that were written, and then it
is made anew. Knows nothing of what is in them. Runs on the thread that trains.
"""

from __future__ import annotations

import hashlib
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
            is_ours = found["binding"] == self._binding
            is_done = is_ours and all(_digest(directory / file) == digest for file, digest in found["files"].items())
            return Stage(directory, found["facts"]) if is_done else None
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):  # a disk's doing, or a hand's
            return None

    def write(self, name: str, fill: Callable[[Path], Mapping[str, object]]) -> Stage:
        """Have a stage's directory filled, and return it; `fill` returns the facts.

        Raises: OutputError with reason DISK_FULL or OUTPUT_UNWRITABLE; what was there before is then still there.
        """
        told: list[Mapping[str, object]] = []

        def fill_and_bind(aside: Path) -> None:
            told.append(fill(aside))
            files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
            told_whole = {"binding": self._binding, "facts": told[0], "files": files}
            text = json.dumps(told_whole, indent=2, allow_nan=False)
            (aside / STAGE_FILE).write_text(f"{text}\n", encoding="utf-8")

        directory = self._folder / name
        write_folder(directory, fill_and_bind)
        return Stage(directory, told[0])

    def folder(self, name: str) -> Path:
        """Return a folder for what a stage needs while it is under way."""
        return self._folder / name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
