"""The modules behind docs/quality.md, imported as its scripts import each other, and its result files, changed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HOUSE = Path(__file__).resolve().parents[1]
RESULTS = HOUSE / "benchmarks" / "results"
FOLDERS = (HOUSE / "benchmarks", HOUSE / "recipes")


@contextmanager
def imported(*names: str) -> Iterator[SimpleNamespace]:
    """Import modules, and forget them and all that they found beside them when the context ends."""
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(HOUSE / "benchmarks" / "quality"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and any(Path(file).is_relative_to(folder) for folder in FOLDERS):
                del sys.modules[name]


def write_changed(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Copy the result files into a folder with one of them changed, and return it."""
    for path in RESULTS.glob("quality_*.json"):
        content = json.loads(path.read_text())
        if path.stem == name:
            edit(content)
        (folder / path.name).write_text(json.dumps(content))
    return folder


def row(content: dict[str, Any], wanted: dict[str, Any], part: str = "cells") -> dict[str, Any]:
    """Return the first row with these values."""
    found: dict[str, Any] = next(row for row in content[part] if wanted.items() <= row.items())
    return found
