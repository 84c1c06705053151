"""What an adapter weighs without having it at hand: the shapes of its units, small enough to keep for every adapter.

An adapter that left host memory needs room on the device before it is read again; how much is told from its outline, so
that one read is enough. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from motley_kernels.adapter_delta import DeltaUnit
from motley_kernels.adapter_delta.types import Gate
from torch import Tensor

from motley_adapters.spec import Part


@dataclass(frozen=True, slots=True)
class UnitOutline:
    """The shapes of one unit's tensors; None for those that it does not have.

    Shapes: as in `DeltaUnit` and `Gate`.
    """

    a: tuple[int, ...] | None
    b: tuple[int, ...] | None
    inputs: tuple[int, ...] | None
    outputs: tuple[int, ...] | None
    router: tuple[int, ...] | None

    @classmethod
    def of(cls, unit: DeltaUnit) -> UnitOutline:
        """Return a unit's outline."""
        router = None if unit.gate is None else unit.gate.router
        tensors = (unit.a, unit.b, unit.inputs, unit.outputs, router)
        return cls(*(None if tensor is None else tuple(tensor.shape) for tensor in tensors))

    @property
    def blank(self) -> DeltaUnit:
        """Return a unit of these shapes, in the dtypes of host memory, that has no memory and no values."""
        router = _blank(self.router, torch.float32)
        return DeltaUnit(
            _blank(self.a, torch.float32),
            _blank(self.b, torch.float32),
            0.0,
            _blank(self.inputs, torch.int32),
            _blank(self.outputs, torch.int32),
            None if router is None else Gate(router, 1),
        )


Outline = Mapping[str, Mapping[str, UnitOutline]]
"""The outlines of an adapter's units, by part digest and by module path."""


def outline_of(parts: Iterable[Part]) -> Outline:
    """Return the outline of an adapter's parts; modules that are alike share one."""
    known: dict[UnitOutline, UnitOutline] = {}

    def share(outline: UnitOutline) -> UnitOutline:
        return known.setdefault(outline, outline)

    return {part.digest: {path: share(UnitOutline.of(unit)) for path, unit in part.units.items()} for part in parts}


def blank_parts(outline: Outline) -> tuple[Part, ...]:
    """Return the parts that an outline tells of, blank: what they take can be counted, and nothing else."""
    return tuple(Part(digest, {path: unit.blank for path, unit in units.items()}) for digest, units in outline.items())


def _blank(shape: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor | None:
    return None if shape is None else torch.empty(shape, dtype=dtype, device="meta")
