"""The adapter delta: one operator that adds every token's own adapters to a Linear.

Any mix of adapters shares a batch. This package checks what it is given, chooses an implementation and knows only units
and token rows: no requests, no names, no model. `reference` is the definition. It is called by the engine thread, once
per Linear and step, and records no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from motley_kernels.adapter_delta import grouped, reference
from motley_kernels.adapter_delta.types import RUN_TOKENS, DeltaBatch, DeltaUnit, Segment, UnitTable
from motley_kernels.errors import DeviceError, ShapeError

__all__ = [
    "RUN_TOKENS",
    "DeltaBatch",
    "DeltaUnit",
    "Implementation",
    "Segment",
    "UnitTable",
    "add_delta",
    "add_embedding_delta",
    "warm_up",
]

Implementation = Literal["auto", "reference", "grouped", "triton"]


def add_delta(
    y: Tensor, x: Tensor, units: UnitTable, batch: DeltaBatch, *, implementation: Implementation = "auto"
) -> None:
    """Add each token's adapter delta to `y`, in place.

    Semantics: y[t] += sum over members (slot, weight) of t's segment of weight times the member's unit of x[t] (see
    `DeltaUnit`), for the members that have a unit here; a token in no segment, or with no unit here, keeps its bits and
    costs nothing. Products and sums are in float32 whatever the types given (float64 by the reference, where y is), and
    `y` is rounded once. A token's bits do not depend on other tokens.
    Shapes: x [..., I], y [..., O], any float dtypes, with T rows each; y is contiguous where it has more dimensions.
    Effects: writes only `y`, and scratch in `units.plan` and `batch.layouts`.
    Raises: ShapeError if T, I or O disagree with `batch` or `units`; DeviceError if tensors live on two devices.
    Source: Punica SGMV, arXiv:2310.18547; reference.py is the definition.
    """
    if not batch.segments or not units.units:
        return
    _check_rows("y", y, units.out_features, batch)
    _check_rows("x", x, units.in_features, batch)
    _check_device(y, x, units)
    chosen = _choose(implementation, y)
    if chosen == "grouped":
        grouped.add_delta(y, x, units, batch)
        return
    y, x = y.view(-1, units.out_features), x.reshape(-1, units.in_features)
    if chosen == "reference":
        reference.add_delta(y, x, units, batch)
    else:
        from motley_kernels.adapter_delta import triton_impl  # only here, as a machine without a GPU needs no triton

        triton_impl.add_delta(y, x, units, batch)


def add_embedding_delta(
    y: Tensor,
    input_ids: Tensor,
    units: UnitTable,
    batch: DeltaBatch,
    output_scale: float = 1.0,
    *,
    implementation: Implementation = "auto",
) -> None:
    """Add each token's embedding delta to `y`, in place.

    Semantics: as `add_delta` with x[t] one-hot at input_ids[t], so A x[t] is a column of A; the delta is multiplied by
    `output_scale`, for bases that scale their embeddings.
    Shapes: input_ids [T] integer, below the table's in_features; y [T, O].
    Effects: writes only `y`.
    Raises: ShapeError if T or O disagree with `batch` or `units`; DeviceError if tensors live on two devices;
    ValueError for a unit that is not a plain low-rank pair.
    """
    if not batch.segments or not units.units:
        return
    _check_rows("y", y, units.out_features, batch)
    if input_ids.shape != (batch.num_tokens,):
        raise ShapeError(f"input_ids are {tuple(input_ids.shape)}, expected ({batch.num_tokens},)")
    _check_device(y, input_ids, units)
    chosen = _choose(implementation, y)
    if chosen == "reference":
        reference.add_embedding_delta(y, input_ids, units, batch, output_scale)
    elif chosen == "triton":
        from motley_kernels.adapter_delta import triton_impl

        triton_impl.add_embedding_delta(y, input_ids, units, batch, output_scale)
    else:
        grouped.add_embedding_delta(y, input_ids, units, batch, output_scale)


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile what the first token under an adapter would otherwise wait for.

    Semantics: takes seconds where no earlier process kept anything compiled on disk, a moment where one did; on the
    thread that will serve. Kernels of a GPU are compiled at their first use.
    """
    if device.type == "cpu":
        from motley_kernels.adapter_delta import singles

        singles.warm_up(dtype if dtype in singles.COMPILED else torch.float32)


def _choose(implementation: Implementation, y: Tensor) -> Implementation:
    """Return what `auto` means for this output: the kernels on CUDA, plain torch elsewhere, neither for float64."""
    if implementation != "auto":
        return implementation
    if y.dtype == torch.float64:
        return "reference"
    return "triton" if y.is_cuda else "grouped"


def _check_rows(name: str, rows: Tensor, width: int, batch: DeltaBatch) -> None:
    if rows.shape[-1] != width or rows.numel() != batch.num_tokens * width:
        raise ShapeError(f"{name} is {tuple(rows.shape)}, expected ({batch.num_tokens}, {width})")


def _check_device(y: Tensor, given: Tensor, units: UnitTable) -> None:
    if not (y.device == given.device == units.device):
        raise DeviceError(f"y is on {y.device}, the input on {given.device}, the units on {units.device}")
