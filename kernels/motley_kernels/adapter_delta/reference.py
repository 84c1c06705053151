"""The definition of the adapter delta: a literal loop over tokens and members.

The oracle of every other implementation. Float32 arithmetic, float64 where the inputs are; no attention to speed. It
knows nothing of stacks and layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motley_kernels.adapter_delta.types import DeltaBatch, UnitTable


def add_delta(y: Tensor, x: Tensor, units: UnitTable, batch: DeltaBatch) -> None:
    """Add each token's adapter delta to `y`, in place; see the package's `add_delta`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for segment in batch.segments:
        for token in segment.token_indices.tolist():
            total = None
            for slot, weight in segment.members:
                if (unit := units.units.get(slot)) is None:
                    continue
                hidden = unit.a.to(dtype) @ x[token].to(dtype)
                delta = weight * unit.scaling * (unit.b.to(dtype) @ hidden)
                total = delta if total is None else total + delta
            if total is not None:
                y[token] = (y[token].to(dtype) + total).to(y.dtype)


def add_embedding_delta(y: Tensor, input_ids: Tensor, units: UnitTable, batch: DeltaBatch, output_scale: float) -> None:
    """Add each token's embedding delta to `y`, in place; see the package's `add_embedding_delta`."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    for segment in batch.segments:
        for token in segment.token_indices.tolist():
            total = None
            for slot, weight in segment.members:
                if (unit := units.units.get(slot)) is None:
                    continue
                hidden = unit.a[:, int(input_ids[token])].to(dtype)
                delta = weight * unit.scaling * output_scale * (unit.b.to(dtype) @ hidden)
                total = delta if total is None else total + delta
            if total is not None:
                y[token] = (y[token].to(dtype) + total).to(y.dtype)
