"""The pool: one flat piece of memory in which the units of all resident adapters lie, at their true rank.

It lays tensors out and hands out views; which extents are taken is its owner's business. Every tensor starts on a
cache line of its own, whatever its shape: implementations read it where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motley_kernels.adapter_delta.types import DeltaUnit

ALIGNMENT = 256
"""Bytes to whose multiples tensors and extents start and end."""


class UnitPool:
    """Memory for units: factors in one dtype, channels int32, routers float32."""

    def __init__(self, num_bytes: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.num_bytes = num_bytes
        self.dtype = dtype
        self.device = device
        # Outside inference mode, so that either mode may write.
        with torch.inference_mode(False):
            self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def extent_bytes(self, units: Sequence[DeltaUnit]) -> int:
        """Return the bytes of an extent that holds these units."""
        return sum(_aligned(tensor.numel() * dtype.itemsize) for tensor, dtype in self._pieces(units))

    def place(self, start: int, units: Sequence[DeltaUnit]) -> list[DeltaUnit]:
        """Return units of the same shapes as views of the pool from a byte on; their contents are whatever is there.

        Semantics: offsets within the extent do not depend on `start`, so that one copy moves it whole.
        Raises: ValueError if the extent does not start on a multiple of ALIGNMENT, or does not lie in the pool.
        """
        end = start + self.extent_bytes(units)
        if start % ALIGNMENT or not 0 <= start <= end <= self.num_bytes:
            raise ValueError(f"bytes {start} to {end} are no extent of a pool of {self.num_bytes}")
        views = []
        for tensor, dtype in self._pieces(units):
            num_bytes = tensor.numel() * dtype.itemsize
            views.append(self.buffer[start : start + num_bytes].view(dtype).view(tensor.shape))
            start += _aligned(num_bytes)
        placed = iter(views)
        return [unit.with_tensors([next(placed) for _ in unit.tensors]) for unit in units]

    def _pieces(self, units: Sequence[DeltaUnit]) -> list[tuple[Tensor, torch.dtype]]:
        """Return every tensor with the dtype it is held in."""
        pieces = []
        for unit in units:
            for tensor in unit.tensors:
                is_router = unit.gate is not None and tensor is unit.gate.router
                dtype = torch.float32 if is_router else self.dtype if tensor.is_floating_point() else torch.int32
                pieces.append((tensor, dtype))
        return pieces


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def write_units(placed: Sequence[DeltaUnit], units: Sequence[DeltaUnit]) -> None:
    """Copy units into their places, converting to the pool's dtype."""
    for target, unit in zip(placed, units, strict=True):
        for to, given in zip(target.tensors, unit.tensors, strict=True):
            to.copy_(given)
