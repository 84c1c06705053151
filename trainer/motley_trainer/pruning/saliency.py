"""Saliency: what removing one row or column of a weight is estimated to cost.

Owns the criteria, one formula each, on single weights; what belongs together is added up elsewhere. Pure functions.
Source: LLM-Pruner, arXiv:2305.11627, section 3.2. From L(W) - L(W with w = 0) = g w - 1/2 w H w + ..., with the
diagonal of the Fisher matrix F for H.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from motley_trainer.pruning.gradients import Moments
from motley_trainer.pruning.groups import Side


class Criterion(StrEnum):
    """How a channel's cost is estimated.

    Semantics: per element, param_first |W g|, param_second |W F W|, param_mix |W g - 1/2 W F W|, l1 |W|, l2 W^2, added
    up over the channel; vector is |sum of W g| over the channel; random is uniform and looks at nothing.
    """

    PARAM_FIRST = "param_first"
    PARAM_SECOND = "param_second"
    PARAM_MIX = "param_mix"
    VECTOR = "vector"
    L1 = "l1"
    L2 = "l2"
    RANDOM = "random"

    @property
    def needs_gradient(self) -> bool:
        """Tell whether calibration text is read at all."""
        return self not in (Criterion.L1, Criterion.L2, Criterion.RANDOM)

    @property
    def needs_fisher(self) -> bool:
        """Tell whether each window's own gradient is looked at."""
        return self in (Criterion.PARAM_SECOND, Criterion.PARAM_MIX)


def channel_scores(criterion: Criterion, weight: Tensor, side: Side, moments: Moments | None = None) -> Tensor:
    """Score every channel of one side of a weight.

    Shapes: weight [O, I]; result [O] for outputs, [I] for inputs, float32.
    Raises: ValueError for a criterion that looks at no weight, or one whose moments are not given.
    """
    along = 1 if side is Side.OUTPUTS else 0
    weight = weight.float()
    if criterion is Criterion.VECTOR:
        return (weight * _gradient(criterion, moments)).sum(along).abs()
    return element_saliency(criterion, weight, moments).sum(along)


def element_saliency(criterion: Criterion, weight: Tensor, moments: Moments | None = None) -> Tensor:
    """Score every element of a weight. Shapes: weight and result [O, I].

    Raises: ValueError for a criterion that has no score of single elements, or one whose moments are not given.
    """
    match criterion:
        case Criterion.PARAM_FIRST:
            return (weight * _gradient(criterion, moments)).abs()
        case Criterion.PARAM_SECOND:
            return (weight * _fisher(criterion, moments) * weight).abs()
        case Criterion.PARAM_MIX:
            return (weight * _gradient(criterion, moments) - weight * _fisher(criterion, moments) * weight / 2).abs()
        case Criterion.L1:
            return weight.abs()
        case Criterion.L2:
            return weight.square()
    raise ValueError(f"{criterion} has no score of single elements")


def random_scores(num_channels: int, generator: torch.Generator) -> Tensor:
    """Draw scores that say nothing. Shapes: result [num_channels], float32, uniform on [0, 1)."""
    return torch.rand(num_channels, generator=generator)


def _gradient(criterion: Criterion, moments: Moments | None) -> Tensor:
    if moments is None:
        raise ValueError(f"{criterion} needs gradients")
    return moments.gradient


def _fisher(criterion: Criterion, moments: Moments | None) -> Tensor:
    if moments is None or moments.fisher is None:
        raise ValueError(f"{criterion} needs the Fisher diagonal")
    return moments.fisher
