"""A frozen Linear that something trainable stands beside, and can be left out of for a while.

Knows nothing of what is beside it. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """What stands in a Linear's place. Semantics: while `is_enabled` is false, it is the base alone."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.is_enabled = True
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """Return the base's weight: modelling code looks at its dtype and device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Return the base's bias."""
        return cast("Tensor | None", self.base.bias)


@contextmanager
def disabled(linears: Collection[AdaptedLinear]) -> Iterator[None]:
    """Make a model the base alone for a while."""
    for linear in linears:
        linear.is_enabled = False
    try:
        yield
    finally:
        for linear in linears:
            linear.is_enabled = True
