"""Estimation: the scores of all groups that may go, under one or several criteria, from one pass over the text.

Joins gradients, saliency and aggregation. Keeps nothing from one call to the next, so that the steps of a gradual
pruning never count a gradient twice. Runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.pruning.aggregation import Aggregation, group_scores
from motley_trainer.pruning.gradients import Moments, gather_moments
from motley_trainer.pruning.groups import LayerGroups, Member, Side
from motley_trainer.pruning.saliency import Criterion, channel_scores, random_scores
from motley_trainer.pruning.selection import Key

Channels = tuple[str, Side, Criterion]


def estimate(
    model: PreTrainedModel,
    groups: Mapping[Key, LayerGroups],
    windows: Tensor,
    criteria: Collection[Criterion],
    aggregation: Aggregation,
    generator: torch.Generator,
) -> dict[Criterion, dict[Key, Tensor]]:
    """Score every group under every criterion.

    Shapes: windows [N, T] token ids, unused by criteria that need no gradients; results [G], float64.
    Effects: freezes the model's parameters; draws from the generator for the random criterion alone.
    """
    members = {member.path: member for of_kind in groups.values() for member in of_kind.members}
    scores: dict[Channels, Tensor] = {}
    taylor = [criterion for criterion in criteria if criterion.needs_gradient]
    if taylor:
        with_fisher = any(criterion.needs_fisher for criterion in taylor)

        def reduce(path: str, moments: Moments) -> dict[Channels, Tensor]:
            return _scores_of(model, members[path], taylor, moments)

        for part in gather_moments(model, windows, members, reduce, with_fisher=with_fisher).values():
            scores |= part
    for member in members.values():
        if Criterion.RANDOM in criteria:
            num_channels = _channel_count(model, member)
            scores[member.path, member.side, Criterion.RANDOM] = random_scores(num_channels, generator)
        magnitudes = [criterion for criterion in criteria if criterion in (Criterion.L1, Criterion.L2)]
        scores |= _scores_of(model, member, magnitudes, None)
    return {
        criterion: {
            key: group_scores(
                of_kind, [scores[member.path, member.side, criterion] for member in of_kind.members], aggregation
            )
            for key, of_kind in groups.items()
        }
        for criterion in criteria
    }


@torch.no_grad()
def _scores_of(
    model: PreTrainedModel, member: Member, criteria: Collection[Criterion], moments: Moments | None
) -> dict[Channels, Tensor]:
    weight = _linear(model, member).weight
    return {
        (member.path, member.side, criterion): channel_scores(criterion, weight, member.side, moments).cpu()
        for criterion in criteria
    }


def _channel_count(model: PreTrainedModel, member: Member) -> int:
    linear = _linear(model, member)
    return linear.out_features if member.side is Side.OUTPUTS else linear.in_features


def _linear(model: PreTrainedModel, member: Member) -> nn.Linear:
    linear = model.get_submodule(member.path)
    assert isinstance(linear, nn.Linear)  # groups are of Linears
    return linear
