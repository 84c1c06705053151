"""Aggregation: from the scores of single channels of single weights to one score for each group that goes as a whole.

Owns the fold of query heads onto the key-value head that they read, the aggregation over a group's members, and the sum
over the channels of a head, in this order. Pure functions, in float64, since products of small scores underflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from motley_trainer.pruning.groups import LayerGroups


class Aggregation(StrEnum):
    """What becomes of the scores that the members of a group have for one channel."""

    SUM = "sum"
    MEAN = "mean"
    PROD = "prod"
    MAX = "max"
    FIRST = "first"
    LAST = "last"


def group_scores(groups: LayerGroups, member_scores: Sequence[Tensor], aggregation: Aggregation) -> Tensor:
    """Score every group of one kind of a layer.

    Shapes: member_scores in the order of the groups' members, each [G * channels_per_group]; result [G], float64.
    """
    folded = torch.stack([
        fold(scores.double(), groups.num_groups, groups.head_dim) for scores in member_scores
    ])  # fmt: skip
    return aggregate(folded, aggregation).sum(1)


def fold(scores: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """Add up, channel by channel, the heads of each group.

    Shapes: scores [G * heads per group * D]; result [G, D].
    Semantics: the heads of group g are g * n to g * n + n - 1, n the heads per group: those that read its keys.
    """
    return scores.view(num_groups, -1, head_dim).sum(1)


def aggregate(member_scores: Tensor, aggregation: Aggregation) -> Tensor:
    """Make one score of what the members say. Shapes: member_scores [members, ...]; result [...]."""
    match aggregation:
        case Aggregation.SUM:
            return member_scores.sum(0)
        case Aggregation.MEAN:
            return member_scores.mean(0)
        case Aggregation.PROD:
            return member_scores.prod(0)
        case Aggregation.MAX:
            return member_scores.amax(0)
        case Aggregation.FIRST:
            return member_scores[0]
        case Aggregation.LAST:
            return member_scores[-1]
