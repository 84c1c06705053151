"""A very small base that stands for the larger one of docs/quality.md, in its proportions, and a cell of each script.

What is trained on it is trained for one step: that everything is measured on it, not what comes of it, is looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MODULES = (
    "cells",
    "jobs",
    "goat",
    "goat_plan",
    "loqt",
    "loqt_plan",
    "loram",
    "loram_plan",
    "s2ft",
    "s2ft_plan",
    "subject",
)
HIDDEN, FFN, LAYERS = 96, 256, 3
SIZES = f"--hidden {HIDDEN} --ffn {FFN} --layers {LAYERS} --heads 6 --kv-heads 2"
TRAINING = f"{SIZES} --steps 2 --rows 2 --length 32 --threads 1"


def use_larger(quality: SimpleNamespace, folder: Path, device: str, *more: str) -> Any:
    """Read a command line that asks for it, as a script does; bases are kept in a folder."""
    command = ["script.py", "--subject", "larger", "--device", device, "--training", TRAINING, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality.subject, "BASES", folder)
        patch.setattr(sys, "argv", command)
        return quality.cells.parse_options("A script.", has_subject=True)


def measure_one_of_each(quality: SimpleNamespace, folder: Path) -> dict[str, dict[str, float]]:
    """Measure a cell of each script on what this process measures on; the adapters of S2FT stay in the folder."""
    with pytest.MonkeyPatch.context() as patch:
        for plan in (quality.goat_plan, quality.loram_plan, quality.s2ft_plan):
            for name, value in {"STEPS": 1, "ROWS": 2, "NUM_ASKED": 2}.items():
                patch.setattr(plan, name, value)
        for name, value in {"NUM_KNOWN_ASKED": 1, "PROSE_LETTERS": 200}.items():
            patch.setattr(quality.s2ft_plan, name, value)
        for name, value in {"PROSE_LETTERS": 200, "ALIGNMENT_LETTERS": 2000, "CALIBRATION_SAMPLES": 2}.items():
            patch.setattr(quality.loram_plan, name, value)
        starts = (quality.loqt_plan.SCRATCH, quality.loqt_plan.CONTINUED)
        steps = {"STEPS": dict.fromkeys(starts, 3), "INTERVALS": dict.fromkeys(starts, 2)}
        for name, value in {"ROWS": 2, "NUM_HELD_OUT": 2, **steps}.items():
            patch.setattr(quality.loqt_plan, name, value)
        s2ft, loram, loqt = quality.s2ft_plan, quality.loram_plan, quality.loqt_plan
        return {
            "s2ft": quality.s2ft.train(s2ft.Lesson(s2ft.S2FT), 1e-3, 1, folder / "s2ft"),
            "s2ft LoRA": quality.s2ft.train(s2ft.Lesson(s2ft.LORA), 1e-3, 1, folder / "lora"),
            "goat": quality.goat.train(quality.goat_plan.GOAT, 1e-3, 1),
            "goat mixture": quality.goat.train(quality.goat_plan.MIXTURE, 1e-3, 1),
            "loram": quality.loram.train(loram.Lesson(loram.STRUCTURED, loram.MIDDLE), 1e-3, None, 1),
            "loram base": quality.loram.measure_base(1),
            "loqt": quality.loqt.train(loqt.CONTINUED, loqt.LOQT, 1e-3, 1),
            "loqt full": quality.loqt.train(loqt.SCRATCH, loqt.FULL, 1e-3, 1),
        }
