"""What is measured on: the embedded base on the CPU, or, where there is a GPU, a larger one of the same town on that.

Owns which of them it is, in each process, and where the larger one is kept, which is trained when it is first needed.
Its directory is named by what it was trained with, so that none is taken for another. Knows nothing of what is
measured; no torch before it is asked for a GPU or trains.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "tiny"))

from motley_bases.checkpoint import resolve_base

EMBEDDED, LARGER = "tiny", "larger"
CPU, GPU = "cpu", "cuda"
BASES = Path(__file__).parents[1] / "bases"

# Three times as wide as the embedded base in all its sides, and half as deep again: some 43 million parameters.
TRAINING = tuple("--hidden 576 --ffn 1536 --layers 12 --heads 18 --kv-heads 6 --steps 2800 --rows 32 --lr 2e-3".split())


@dataclass(frozen=True, slots=True)
class Subject:
    """A base and where it computes; `name` is the base's."""

    name: str
    directory: Path
    device: str

    @property
    def suffix(self) -> str:
        """Return what its result files' names end with."""
        return "" if self.name == EMBEDDED else f"_{self.name}"


_used: Subject | None = None


def use(subject: Subject) -> None:
    """Make it what this process measures on."""
    global _used
    _used = subject


def current() -> Subject:
    """Return what this process measures on: the embedded base on the CPU, where nothing else was said."""
    return _used or Subject(EMBEDDED, resolve_base(EMBEDDED), CPU)


def choose(name: str | None = None, device: str | None = None, training: Sequence[str] = TRAINING) -> Subject:
    """Return what was asked for, or what this machine measures on: the larger base if torch sees a GPU.

    Semantics: the larger one computes on the GPU, where there is one, and the embedded one on the CPU, unless `device`
    says otherwise; `training` is what the recipe is told.
    Effects: trains the larger base if it is not there yet.
    """
    name = name or (LARGER if device != CPU and sees_gpu() else EMBEDDED)
    device = device or (GPU if name == LARGER and sees_gpu() else CPU)
    directory = resolve_base(EMBEDDED) if name == EMBEDDED else train_larger(training, device)
    return Subject(name, directory, device)


def train_larger(training: Sequence[str], device: str) -> Path:
    """Return the directory of the base that the recipe makes when it is told so; the first time, make it.

    Semantics: it is there whole or not at all.
    """
    digest = hashlib.sha256(" ".join(training).encode()).hexdigest()
    directory = BASES / f"{LARGER}-{digest[:12]}"
    if not directory.exists():
        from train_base import main

        print(f"training a base into {directory}", flush=True)
        part = BASES / f"{directory.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        main([*training, "--out", str(part), "--device", device])
        part.rename(directory)
    return directory


def sees_gpu() -> bool:
    """Tell whether torch can use a GPU."""
    import torch

    return torch.cuda.is_available()
