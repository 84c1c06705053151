"""Places: where in memory the tensors of units lie.

It reads addresses and channels, never weights. The engine thread calls it when it first sees a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from motley_kernels.adapter_delta.types import DeltaUnit
from motley_kernels.errors import ShapeError

ABSENT = -1
"""In place of where a tensor begins that a unit has not."""


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """A unit looked at once: its row for the compiled loop, and the memory, as address and bytes, where that is true.

    `address` is None where the loop cannot read the unit as it lies; `is_empty` says that it can add nothing.
    """

    unit: DeltaUnit
    row: tuple[int, ...]
    address: tuple[int, int] | None
    is_empty: bool
    nbytes: int


class Member(NamedTuple):
    """One member of a set at a Linear where it has a unit."""

    slot: int
    found: Found
    scale: float  # weight * scaling


def find_unit(unit: DeltaUnit, sides: tuple[int, int]) -> Found:
    """Look at a unit of a Linear of these sides where it lies.

    Raises: ShapeError for channels that the Linear has not: the compiled loop does not look.
    """
    for channels, count in zip((unit.inputs, unit.outputs), sides, strict=True):
        if channels is None or not channels.is_cpu or not channels.numel():
            continue
        if not 0 <= int(channels.min()) <= int(channels.max()) < count:
            raise ShapeError(f"channels {int(channels.min())} to {int(channels.max())} of {count}")
    tensors = unit.tensors
    addresses = {(one.data_ptr(), one.nbytes()) for one in (tensor.untyped_storage() for tensor in tensors)}
    is_readable = len(addresses) == 1 and all(
        tensor.is_contiguous() and tensor.dtype == (torch.float32 if tensor.is_floating_point() else torch.int32)
        for tensor in tensors
    )
    return Found(
        unit=unit,
        row=_describe(unit),
        address=addresses.pop() if is_readable else None,
        is_empty=not all(tensor.numel() for tensor in tensors),
        nbytes=unit.nbytes,
    )


def _describe(unit: DeltaUnit) -> tuple[int, ...]:
    """Return a unit as `singles_kernel` reads it: where its tensors begin, then its sizes."""
    gate = unit.gate
    factors = (unit.a, unit.b, None if gate is None else gate.router, unit.inputs, unit.outputs)
    begins = (ABSENT if one is None else int(one.storage_offset()) for one in factors)
    num_inputs = unit.a.shape[1] if unit.a is not None else unit.rank
    num_outputs = unit.b.shape[1] if unit.b is not None else unit.rank
    return (
        *begins, unit.rank, num_inputs, num_outputs,
        0 if gate is None else gate.num_experts, 0 if gate is None else gate.top_k,
    )  # fmt: skip
