"""What the operator needs installed: a machine whose work is on a GPU has no numba."""

from __future__ import annotations

import subprocess
import sys


def test_the_operator_imports_and_defines_itself_without_numba() -> None:
    program = """
import sys
sys.modules["numba"] = None
import torch
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta, grouped
units = UnitTable(2, 1)
units.bind(0, DeltaUnit(torch.ones(1, 2), torch.ones(1, 1), 1.0))
y = torch.zeros(8, 1)
run = DeltaBatch.from_sequences([(((0, 1.0),), 8)])
for implementation in ("reference", "grouped"):
    add_delta(y, torch.ones(8, 2), units, run, implementation=implementation)
assert (y == 4).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
