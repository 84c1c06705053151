"""Which bytes of the arena are taken: extents, first fit, freed ones grown together again.

Integers alone; what lies in an extent is its owner's business. The engine thread.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from motley_kernels.adapter_delta.pool import ALIGNMENT


class Extent(NamedTuple):
    """Bytes [start, start + size) of the arena."""

    start: int
    size: int


class ExtentAllocator:
    """Hand out extents of a fixed number of bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes // ALIGNMENT * ALIGNMENT
        self.num_used_bytes = 0
        self._free = [Extent(0, self.num_bytes)] if self.num_bytes else []  # by start, never touching

    def allocate(self, sizes: Sequence[int]) -> list[Extent] | None:
        """Hand out an extent of each size; None, and nothing, if they do not all fit.

        Semantics: side by side if there is such a place.
        Raises: ValueError for a size that is not a positive multiple of the alignment.
        """
        for size in sizes:
            if size <= 0 or size % ALIGNMENT:
                raise ValueError(f"an extent of {size} bytes")
        total = sum(sizes)
        if total > self.num_bytes - self.num_used_bytes:
            return None
        run = self._take(total) if total else None
        if run is not None:
            return _split(run, sizes)
        taken: list[Extent] = []
        for size in sizes:
            extent = self._take(size)
            if extent is None:
                self.free(taken)
                return None
            taken.append(extent)
        return taken

    def free(self, extents: Iterable[Extent]) -> None:
        """Take extents back.

        Raises: ValueError if one is not taken: it was given back twice, or never handed out.
        """
        for extent in _joined(extents):
            self._put_back(extent)

    def copy(self) -> ExtentAllocator:
        """Return another of the same state, to try things out on."""
        twin = ExtentAllocator(self.num_bytes)
        twin.num_used_bytes, twin._free = self.num_used_bytes, list(self._free)
        return twin

    def check_integrity(self, taken: Iterable[Extent]) -> None:
        """Raise RuntimeError unless what is taken and what is free cover every byte once."""
        owned = list(taken)
        end = 0
        for extent in sorted([*owned, *self._free]):
            if extent.start != end or extent.size <= 0:
                raise RuntimeError(f"extent {extent} follows byte {end}")
            end = extent.start + extent.size
        if end != self.num_bytes or sum(extent.size for extent in owned) != self.num_used_bytes:
            raise RuntimeError(f"{end} of {self.num_bytes} bytes are covered, {self.num_used_bytes} said to be used")

    def _take(self, size: int) -> Extent | None:
        for index, hole in enumerate(self._free):
            if hole.size >= size:
                if hole.size == size:
                    del self._free[index]
                else:
                    self._free[index] = Extent(hole.start + size, hole.size - size)
                self.num_used_bytes += size
                return Extent(hole.start, size)
        return None

    def _put_back(self, extent: Extent) -> None:
        start, end = extent.start, extent.start + extent.size
        index = bisect_left(self._free, extent)
        before = self._free[index - 1] if index else None
        after = self._free[index] if index < len(self._free) else None
        overlaps = (before is not None and before.start + before.size > start) or (
            after is not None and after.start < end
        )
        if overlaps or start < 0 or end > self.num_bytes or extent.size <= 0:
            raise ValueError(f"{extent} is not taken")
        self.num_used_bytes -= extent.size
        if after is not None and after.start == end:
            end += after.size
            del self._free[index]
        if before is not None and before.start + before.size == start:
            start = before.start
            del self._free[index - 1]
        insort(self._free, Extent(start, end - start))


def _split(run: Extent, sizes: Sequence[int]) -> list[Extent]:
    extents, start = [], run.start
    for size in sizes:
        extents.append(Extent(start, size))
        start += size
    return extents


def _joined(extents: Iterable[Extent]) -> list[Extent]:
    """Return the same bytes in as few extents as can be: a part's layers mostly lie side by side."""
    joined: list[Extent] = []
    for extent in sorted(extents):
        if joined and joined[-1].start + joined[-1].size == extent.start:
            joined[-1] = Extent(joined[-1].start, joined[-1].size + extent.size)
        else:
            joined.append(extent)
    return joined
