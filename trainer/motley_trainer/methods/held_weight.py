"""A weight as it is held in memory: in full, or in fewer bits.

Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from motley_bases.quantization import NONE, require_quantizer
from torch import Tensor


class HeldWeight(Protocol):
    """A weight [O, I]."""

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that is meant; it may be what is held itself, and must not be written into."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Return all that is held, by name."""


@dataclass(frozen=True, eq=False, slots=True)
class PlainWeight:
    """A weight as it is."""

    values: Tensor

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight."""
        return self.values.to(dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the weight."""
        return {"values": self.values}


@dataclass(frozen=True, slots=True)
class Holding:
    """A way to hold weights: how one is made of numbers, and found again in what a checkpoint has of it.

    Semantics: `find` takes the tensors by name, and the weight's shape.
    """

    hold: Callable[[Tensor], HeldWeight]
    find: Callable[[Mapping[str, Tensor], torch.Size], HeldWeight]


def holding(quantization: str) -> Holding:
    """Return how weights are held: `none` in float32, `nf4` in codes.

    Semantics: whatever a model computes in, without quantizing nothing is lost when a small change becomes a part of a
    weight: in bfloat16 most of it would be.
    Raises: UnsupportedBaseError with reason NO_QUANTIZER.
    """
    if quantization == NONE:
        return Holding(
            hold=lambda weight: PlainWeight(weight.float()),
            find=lambda tensors, shape: PlainWeight(tensors["values"]),
        )
    require_quantizer()
    from motley_trainer.methods.nf4 import Nf4Weight, quantize

    return Holding(hold=quantize, find=Nf4Weight.of)
