"""Run drawn problems of the adapter delta by the Triton kernels, on a GPU or in the interpreter."""

from __future__ import annotations

import torch
from delta_problems import Problem, define
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta
from motley_kernels.testing import Members, assert_close
from torch import Tensor


def table_on(units: UnitTable, device: str, dtype: torch.dtype) -> UnitTable:
    """Return a table of the same units on a device, their factors in a dtype."""
    table = UnitTable(units.in_features, units.out_features)
    for slot, unit in units.units.items():
        table.bind(slot, unit_on(unit, device, dtype))
    return table


def unit_on(unit: DeltaUnit, device: str, dtype: torch.dtype) -> DeltaUnit:
    """Return the same unit on a device, its factors in a dtype."""
    factors = {id(factor) for factor in (unit.a, unit.b) if factor is not None}
    return unit.with_tensors(t.to(device, dtype if id(t) in factors else t.dtype, copy=True) for t in unit.tensors)


def run(units: UnitTable, sequences: list[tuple[Members, int]], x: Tensor, y: Tensor, device: str = "cpu") -> Tensor:
    """Return y with the deltas added by the Triton kernels on the units' device, brought back."""
    out = y.to(device, copy=True)
    batch = DeltaBatch.from_sequences(sequences, torch.device(device))
    add_delta(out, x.to(device), units, batch, implementation="triton")
    return out.cpu()


def assert_equals_the_definition(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that a problem whose factors are brought to a dtype comes out as defined."""
    expected = define(table_on(problem.units, "cpu", dtype), problem.batch, problem.x, problem.y)
    out = run(table_on(problem.units, device, dtype), problem.sequences, problem.x, problem.y, device)
    assert_close(out, expected, problem.y.dtype)


def assert_neighbours_change_no_bit(
    problem: Problem, dtype: torch.dtype, kept: list[int], units: UnitTable, device: str = "cpu"
) -> None:
    """Assert that the kept sequences, in this order and by a table of these units, have the bits of the whole batch."""
    whole = run(table_on(problem.units, device, dtype), problem.sequences, problem.x, problem.y, device)
    rows = problem.rows_of(kept)
    sequences = [problem.sequences[n] for n in kept]
    part = run(table_on(units, device, dtype), sequences, problem.x[rows], problem.y[rows], device)
    assert torch.equal(part, whole[rows])
