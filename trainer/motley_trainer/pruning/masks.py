"""Masks: which single weights of a Linear go, given what each of them is estimated to cost.

Two rules, of which each takes exactly as many as it says. Knows nothing of models. Pure; equal scores go by place, the
first first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor


class MaskRule(Protocol):
    """Chooses among the weights of some columns of a Linear."""

    @property
    def num_columns(self) -> int | None:
        """Return how many columns are chosen among at once, None for all of a block."""

    def goes(self, scores: Tensor) -> Tensor:
        """Tell of each weight whether it goes. Shapes: scores [O, columns]; returns the same, bool."""


@dataclass(frozen=True, slots=True)
class ShareMask:
    """Take the share of all weights of a block that cost least, rounded down."""

    ratio: Fraction

    @property
    def num_columns(self) -> None:
        """Return None: the weights of a whole block compete."""

    def goes(self, scores: Tensor) -> Tensor:
        """Take the lowest of the block, from whichever rows."""
        taken = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        order = torch.sort(scores.flatten(), stable=True).indices
        taken[order[: math.floor(self.ratio * scores.numel())]] = True
        return taken.view_as(scores)


@dataclass(frozen=True, slots=True)
class PatternMask:
    """Leave `kept` of every `of` neighbours in a row."""

    kept: int
    of: int

    @property
    def num_columns(self) -> int:
        """Return how many neighbours compete."""
        return self.of

    def goes(self, scores: Tensor) -> Tensor:
        """Take the lowest of each row. Shapes: scores [O, of]."""
        order = torch.sort(scores, dim=1, stable=True).indices
        taken = torch.zeros_like(scores, dtype=torch.bool)
        return taken.scatter_(1, order[:, : self.of - self.kept], True)
