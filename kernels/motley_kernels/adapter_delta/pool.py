"""The pool: one flat piece of memory in which the units of all resident adapters lie, at their true rank.

It lays tensors out and hands out views; which extents are taken is its owner's business. On a CPU every factor starts
at a multiple of its own row length, so that the pool, seen as rows of that length, has the factor's rows at consecutive
whole indices: implementations there gather rows by index, whichever adapter they are of. Elsewhere kernels take
pointers, and factors only start on cache lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motley_kernels.adapter_delta.types import DeltaUnit

ALIGNMENT = 256
"""Bytes to whose multiples extents start and end."""


class UnitPool:
    """Memory for units: factors in one dtype, channels int32, routers float32."""

    def __init__(self, num_bytes: int, *, device: torch.device, dtype: torch.dtype, pinned: bool = False) -> None:
        self.num_bytes = num_bytes
        self.dtype = dtype
        self.device = device
        # Outside inference mode, so that either mode may write.
        with torch.inference_mode(False):
            self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)

    def extent_bytes(self, units: Sequence[DeltaUnit]) -> int:
        """Return the bytes of an extent that holds these units wherever it starts."""
        total, aligned_to = 0, 0
        for tensor, dtype in self._pieces(units):
            step, size = self._step(tensor, dtype), tensor.numel() * dtype.itemsize
            total += size if step == aligned_to else step + size
            aligned_to = step if size % step == 0 else 0
        return -(-total // ALIGNMENT) * ALIGNMENT

    def place(self, start: int, units: Sequence[DeltaUnit]) -> list[DeltaUnit]:
        """Return units of the same shapes as views of the pool from a byte on; their contents are whatever is there.

        Semantics: off a CPU, offsets within the extent do not depend on `start`, so that one copy moves it whole.
        Raises: ValueError if the extent does not lie in the pool.
        """
        views: dict[int, Tensor] = {}
        offset = start
        for tensor, dtype in self._pieces(units):
            step = self._step(tensor, dtype)
            offset = -(-offset // step) * step
            end = offset + tensor.numel() * dtype.itemsize
            if start < 0 or end > self.num_bytes:
                raise ValueError(f"bytes {start} to {end} do not lie in a pool of {self.num_bytes}")
            views[id(tensor)] = self.buffer[offset:end].view(dtype).view(tensor.shape)
            offset = end
        return [unit.with_tensors(views[id(tensor)] for tensor in unit.tensors) for unit in units]

    def _pieces(self, units: Sequence[DeltaUnit]) -> list[tuple[Tensor, torch.dtype]]:
        """Return every tensor with the dtype it is held in, those of one row length together."""
        pieces = []
        for unit in units:
            for tensor in unit.tensors:
                is_router = unit.gate is not None and tensor is unit.gate.router
                dtype = torch.float32 if is_router else self.dtype if tensor.is_floating_point() else torch.int32
                pieces.append((tensor, dtype))
        return sorted(pieces, key=lambda piece: (piece[0].is_floating_point(), piece[1].itemsize, piece[0].shape[-1]))

    def _step(self, tensor: Tensor, dtype: torch.dtype) -> int:
        if self.device.type != "cpu" or not tensor.is_floating_point():
            return ALIGNMENT
        return max(1, tensor.shape[-1]) * dtype.itemsize


def write_units(placed: Sequence[DeltaUnit], units: Sequence[DeltaUnit]) -> None:
    """Copy units into their places, converting to the pool's dtype."""
    for target, unit in zip(placed, units, strict=True):
        for to, given in zip(target.tensors, unit.tensors, strict=True):
            to.copy_(given)
