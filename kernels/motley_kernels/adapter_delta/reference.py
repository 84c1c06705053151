"""The definition of the adapter delta: a literal loop over tokens and members.

The oracle of every other implementation. Float32 arithmetic, float64 where the inputs are; no attention to speed. It
knows nothing of pools, plans and layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motley_kernels.adapter_delta.types import DeltaBatch, DeltaUnit, Gate, UnitTable


def add_delta(y: Tensor, x: Tensor, units: UnitTable, batch: DeltaBatch) -> None:
    """Add each token's adapter delta to `y`, in place; see the package's `add_delta`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for segment in batch.segments:
        for token in segment.token_indices.tolist():
            total = None
            for slot, weight in segment.members:
                if (unit := units.units.get(slot)) is None:
                    continue
                units.await_arrival(slot)
                delta = weight * unit_delta(unit, x[token].to(dtype), units.out_features)
                total = delta if total is None else total + delta
            if total is not None:
                y[token] = (y[token].to(dtype) + total).to(y.dtype)


def unit_delta(unit: DeltaUnit, x: Tensor, out_features: int) -> Tensor:
    """Return what one unit adds for one token.

    Shapes: x [I] float32 or float64; returns [O] of its dtype.
    """
    read = x if unit.inputs is None else x[unit.inputs.long()]
    products = read if unit.a is None else unit.a.to(x.dtype) @ read
    if unit.gate is not None:
        shares = expert_shares(unit.gate, x)
        shares = shares.repeat_interleave(unit.rank // unit.gate.num_experts)
        products = torch.where(shares == 0, 0, products * shares)
    written = unit.scaling * (products if unit.b is None else products @ unit.b.to(x.dtype))
    if unit.outputs is None:
        return written
    delta = x.new_zeros(out_features)
    delta[unit.outputs.long()] = written
    return delta


def expert_shares(gate: Gate, x: Tensor) -> Tensor:
    """Return each expert's share of one token, as `Gate` defines it.

    Shapes: x [I]; returns [E] in the dtype of x, summing to 1.
    """
    # Row by row: within one product, equal rows may come out unequal, and a tie would not be one.
    logits = torch.stack([torch.dot(row, x) for row in gate.router.to(x.dtype)])
    chosen = sorted(range(gate.num_experts), key=lambda expert: (-float(logits[expert]), expert))[: gate.top_k]
    shares = torch.zeros_like(logits)
    shares[chosen] = torch.softmax(logits[chosen], dim=0)
    return shares


def add_embedding_delta(y: Tensor, input_ids: Tensor, units: UnitTable, batch: DeltaBatch, output_scale: float) -> None:
    """Add each token's embedding delta to `y`, in place; see the package's `add_embedding_delta`."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    for segment in batch.segments:
        for token in segment.token_indices.tolist():
            total = None
            for slot, weight in segment.members:
                if (unit := units.units.get(slot)) is None:
                    continue
                units.await_arrival(slot)
                a, b = embedding_factors(unit)
                hidden = a[:, int(input_ids[token])].to(dtype)
                delta = weight * unit.scaling * output_scale * (hidden @ b.to(dtype))
                total = delta if total is None else total + delta
            if total is not None:
                y[token] = (y[token].to(dtype) + total).to(y.dtype)


def embedding_factors(unit: DeltaUnit) -> tuple[Tensor, Tensor]:
    """Return the factors of a unit at an embedding, which takes plain low-rank pairs alone.

    Raises: ValueError for a unit with channels of its own, an identity or a gate.
    """
    if unit.a is None or unit.b is None or unit.inputs is not None or unit.outputs is not None or unit.gate is not None:
        raise ValueError("an embedding takes plain low-rank units alone")
    return unit.a, unit.b
