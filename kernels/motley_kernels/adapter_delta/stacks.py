"""Stacks: contiguous copies, for one Linear and one rank, of the units that the current batch applies token by token.

A stack knows units and rows, not tokens or slots. Rows are dense: a unit that the batch no longer uses gives its row to
one that arrives, or to the last row, so a change of one adapter copies at most two rows whatever the number of
adapters. Only the engine thread touches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from motley_kernels.adapter_delta.types import DeltaUnit

ALIGNMENT = 16
"""Elements to which I and O are padded with zeros: every row starts on a cache line, so bits do not depend on it."""


def aligned(size: int) -> int:
    """Round a dimension up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class RankStack:
    """The rows of one rank at one Linear.

    Shapes: a [capacity, R, I'], b [capacity, R, O'] float32, I' and O' aligned; b holds each factor transposed.
    `version` grows when any row changes its meaning, so that views made earlier are known to be stale.
    """

    def __init__(self, rank: int, in_features: int, out_features: int, device: torch.device) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.device = device
        self.a, self.b = self._allocate(0, rank)
        self.rows: dict[DeltaUnit, int] = {}
        self.version = 0
        self.num_copies = 0  # rows written since the start, to show that little is copied

    def hold(self, units: Sequence[DeltaUnit], also_keep: Iterable[DeltaUnit] = ()) -> None:
        """Give every unit a row among the first rows.

        Semantics: units of `also_keep` that have a row stay too; all others lose theirs.
        """
        wanted = dict.fromkeys(units)
        wanted.update(dict.fromkeys(unit for unit in also_keep if unit in self.rows))
        if wanted.keys() == self.rows.keys():
            return
        num_rows = len(wanted)
        kept = {unit: row for unit, row in self.rows.items() if unit in wanted and row < num_rows}
        self._reserve(num_rows, kept.values())
        taken = set(kept.values())
        free = iter([row for row in range(num_rows) if row not in taken])
        for unit in wanted:
            if unit not in kept:
                kept[unit] = row = next(free)
                self._copy(unit, row)
        self.rows = kept
        self.version += 1

    def forget(self, unit: DeltaUnit) -> bool:
        """Let go of a unit; tell whether no unit is left."""
        if self.rows.pop(unit, None) is not None:
            self.version += 1
        return not self.rows

    def _reserve(self, num_rows: int, kept: Iterable[int]) -> None:
        capacity = self.a.shape[0]
        if capacity // 4 < num_rows <= capacity:
            return
        capacity = 1 << (num_rows - 1).bit_length()
        old_a, old_b = self.a, self.b
        self.a, self.b = self._allocate(capacity, old_a.shape[1])
        for row in kept:
            self.a[row].copy_(old_a[row])
            self.b[row].copy_(old_b[row])

    def _allocate(self, capacity: int, rank: int) -> tuple[Tensor, Tensor]:
        # The zeros beyond the features are written once, here: a row's copy never touches them. Outside inference mode,
        # so that either mode may write later.
        with torch.inference_mode(False):
            a = torch.zeros(capacity, rank, aligned(self.in_features), device=self.device)
            b = torch.zeros(capacity, rank, aligned(self.out_features), device=self.device)
        return a, b

    def _copy(self, unit: DeltaUnit, row: int) -> None:
        self.a[row, :, : self.in_features].copy_(unit.a)
        self.b[row, :, : self.out_features].copy_(unit.b.t())
        self.num_copies += 1


def stack_view(stack: RankStack, row: int, num_rows: int, num_items: int) -> tuple[Tensor, Tensor]:
    """Return both factors for a batched product of single tokens.

    Semantics: one item per row, or `num_items` items that share one row without copying it.
    Shapes: [num_items, I', R] and [num_items, R, O'].
    """
    a, b = stack.a[row : row + num_rows], stack.b[row : row + num_rows]
    if num_rows != num_items:
        a, b = a.expand(num_items, -1, -1), b.expand(num_items, -1, -1)
    return a.transpose(1, 2), b
