"""Drawn problems of the adapter delta, for the tests of every implementation: a Linear with units, and sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, Implementation, UnitTable, add_delta
from motley_kernels.adapter_delta.pool import UnitPool, write_units
from motley_kernels.testing import KINDS, Kind, Members, Routing, draw_inputs, draw_kind, draw_sets
from torch import Generator, Tensor

RANKS = (1, 2, 3, 4, 7, 8, 13, 16, 24, 33, 64)
WIDTHS = ((64, 48), (48, 192), (40, 24), (33, 37), (5, 1), (192, 64))
NUM_SLOTS = 12


@dataclass(frozen=True)
class Problem:
    """A Linear with units, and sequences as (unit set, number of new tokens) with their inputs and outputs."""

    units: UnitTable
    sequences: list[tuple[Members, int]]
    x: Tensor
    y: Tensor

    @property
    def batch(self) -> DeltaBatch:
        """Return a new batch of all sequences."""
        return DeltaBatch.from_sequences(self.sequences)

    def rows_of(self, kept: Sequence[int]) -> Tensor:
        """Return the rows of the kept sequences, in the order given."""
        starts = [0]
        for _, length in self.sequences:
            starts.append(starts[-1] + length)
        return torch.tensor([row for n in kept for row in range(starts[n], starts[n + 1])], dtype=torch.int64)


def draw_table(
    in_features: int,
    out_features: int,
    generator: Generator,
    ranks: Sequence[int] = RANKS,
    kinds: Sequence[Kind] = KINDS,
) -> UnitTable:
    """Draw a table where one slot in five has no unit, and those that have one differ in kind and rank."""
    units = UnitTable(in_features, out_features)
    for slot in range(NUM_SLOTS):
        if slot % 5 != 4:
            rank = ranks[int(torch.randint(len(ranks), (), generator=generator))]
            kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
            units.bind(slot, draw_kind(kind, rank, in_features, out_features, generator))
    return units


def draw_problem(
    seed: int,
    routing: Routing,
    widths: tuple[int, int],
    lengths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    kinds: Sequence[Kind] = KINDS,
) -> Problem:
    """Draw a table, and sequences of these lengths over it."""
    generator = Generator().manual_seed(seed)
    units = draw_table(*widths, generator, kinds=kinds)
    sets = draw_sets(routing, len(lengths), NUM_SLOTS, max_members=4, base_share=0.2, generator=generator)
    x = draw_inputs(sum(lengths), widths[0], generator, dtype)
    y = torch.randn(sum(lengths), widths[1], generator=generator).to(dtype)
    return Problem(units, list(zip(sets, lengths, strict=True)), x, y)


def apply(
    units: UnitTable, batch: DeltaBatch, x: Tensor, y: Tensor, implementation: Implementation = "grouped"
) -> Tensor:
    """Return y with the deltas added."""
    out = y.clone()
    add_delta(out, x, units, batch, implementation=implementation)
    return out


def define(units: UnitTable, batch: DeltaBatch, x: Tensor, y: Tensor) -> Tensor:
    """Return y with the deltas added by the definition."""
    return apply(units, batch, x, y, "reference")


def copy_of(units: UnitTable) -> UnitTable:
    """Return another table of the same units, of which nothing has been derived."""
    copy = UnitTable(units.in_features, units.out_features)
    for slot, unit in units.units.items():
        copy.bind(slot, unit)
    return copy


def pooled(units: UnitTable, fill: int = 0xFF) -> UnitTable:
    """Return a table of the same units in one pool, of which every other byte is `fill`: NaN, unless given."""
    given = list(units.units.values())
    pool = UnitPool(
        UnitPool(0, device=torch.device("cpu"), dtype=torch.float32).extent_bytes(given) + 4096,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    pool.buffer.fill_(fill)
    placed = pool.place(1024, given)
    write_units(placed, given)
    table = UnitTable(units.in_features, units.out_features)
    for slot, unit in zip(units.units, placed, strict=True):
        table.bind(slot, unit)
    return table


def table_of(*units: DeltaUnit, sides: tuple[int, int]) -> UnitTable:
    """Return a table that holds these units under slots 0, 1, ..."""
    table = UnitTable(*sides)
    for slot, unit in enumerate(units):
        table.bind(slot, unit)
    return table
