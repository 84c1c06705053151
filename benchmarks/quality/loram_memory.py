"""What LoRAM takes in memory: a LoRA on one base, on its copy without a half, and on that in 4 bits.

Every cell is measured in a process of its own, as the memory of other training is, and beside that how many bytes the
process has resident at most, over what it had before the base was loaded. The copy is made by the function that a job
calls. The weights are random, since sizes do not depend on them; a seed is a repetition.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import loram_memory_plan as plan
import torch
import training_memory_plan as training
from cells import Row, measure_cells, parse_options, write
from costs import CPU
from motley_trainer.pruning.loram import CopyOrder, make_copy
from motley_trainer.spec.settings import LoramPruning, LoramSettings
from training_memory import measure_on, resident, write_base

CUT = LoramSettings(pruning=LoramPruning.RANDOM, ratio=Fraction(plan.RATIO), layers=(0, training.LAYERS))


def write_copy(base: Path, directory: Path) -> Path:
    """Write the copy of a base."""
    directory.mkdir()
    make_copy(CopyOrder(base=base, settings=CUT, seed=0, device=CPU)).write(directory)
    return directory


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The base, its copy, and one of a single layer, to begin with."""

    base: Path
    copy: Path
    small: Path


def measure(cell: plan.Cell, seed: int, *, checkpoints: Checkpoints) -> Row:
    """Measure one cell.

    Semantics: `resident` is over what was there when a smaller base had been trained and was gone, so that what
    libraries load once is no part of it.
    """
    torch.set_num_threads(1)
    measure_on(CPU, cell.training, seed, checkpoints.small)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    row = measure_on(CPU, cell.training, seed, checkpoints.copy if cell.is_copy else checkpoints.base)
    return row | {"resident": row["held"] + row["growth"] - before}


def main() -> None:
    """Measure, print as it goes, write the result file."""
    options = parse_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder, "base"))
        checkpoints = Checkpoints(base, write_copy(base, Path(folder, "copy")), write_base(Path(folder, "small"), 1))
        cells = measure_cells(plan.CELLS, partial(measure, checkpoints=checkpoints), options, is_alone=True)
    setting = {
        "rows": training.ROWS,
        "length": training.LENGTH,
        "steps": training.STEPS,
        "layers": training.LAYERS,
        "hidden": training.HIDDEN,
    }
    write("quality_loram_memory", {"setting": setting, "cells": cells}, options)


if __name__ == "__main__":
    main()
