"""Selection: which groups of a layer stay, given their scores and how much is to go.

Owns the two ways of competing for the places that there are. A layer is never emptied: local selection refuses to,
global selection passes over what would. Knows nothing of weights. Pure functions; equal scores go by number, the lower
first, so that the same scores always give the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from motley_trainer.errors import UnsuitableBaseError
from motley_trainer.pruning.counting import CountingRule, kept_count, round_up
from motley_trainer.pruning.groups import GroupKind, LayerGroups
from motley_trainer.pruning.settings import Selection

Key = tuple[int, GroupKind]
Kept = dict[Key, tuple[int, ...]]
"""The groups that stay, ascending, by layer and kind, in the numbers that they have before."""


def select(
    selection: Selection,
    initial: Mapping[Key, LayerGroups],
    current: Mapping[Key, LayerGroups],
    scores: Mapping[Key, Tensor],
    *,
    ratio: Fraction,
    multiple: int = 1,
    rule: CountingRule = CountingRule.LLM_PRUNER,
) -> Kept:
    """Choose what stays of the current groups, so that `ratio` of the initial ones is gone.

    Shapes: scores [G] for each layer and kind.
    Semantics: the rule is of local selection; globally, parameters are counted.
    Raises: SettingsError with reason EMPTY_LAYER if the ratio asks for all heads or all channels of a layer;
    UnsuitableBaseError with reason NOT_FINITE for scores that cannot be compared.
    """
    for layer, kind in current:
        if not bool(torch.isfinite(scores[layer, kind]).all()):
            raise UnsuitableBaseError(
                f"the {kind} scores of layer {layer} are not finite: the base's loss or weights are not",
                reason="NOT_FINITE",
                field=f"layers.{layer}",
            )
    if selection is Selection.GLOBAL:
        return _select_globally(initial, current, scores, ratio, multiple)
    return {
        key: keep_highest(scores[key], min(kept_count(initial[key], ratio, multiple, rule), groups.num_groups))
        for key, groups in current.items()
    }


def keep_highest(scores: Tensor, num_kept: int) -> tuple[int, ...]:
    """Return the indices of the highest scores, ascending."""
    order = torch.sort(scores, stable=True).indices.tolist()
    return tuple(sorted(order[len(order) - num_kept :]))


def num_differing(kept: Kept, others: Kept) -> int:
    """Return how many groups one choice keeps and the other does not."""
    return sum(len(set(kept[key]) - set(others[key])) for key in kept)


def _select_globally(
    initial: Mapping[Key, LayerGroups],
    current: Mapping[Key, LayerGroups],
    scores: Mapping[Key, Tensor],
    ratio: Fraction,
    multiple: int,
) -> Kept:
    """Remove the groups of the lowest scores, of whatever layer and kind, until the share of the parameters is gone.

    Semantics: a score counts in means of its kind, since a head's is a sum over many channels and would never be low;
    a group that does not fit into what is left to remove is passed over.
    """
    removable = math.floor(_num_parameters(initial.values()) * ratio)
    removable -= _num_parameters(initial.values()) - _num_parameters(current.values())
    means = {kind: _mean([scores[key] for key in current if key[1] is kind]) for kind in GroupKind}
    ranked = sorted(
        (score / means[key[1]], place, index)
        for place, key in enumerate(current)
        for index, score in enumerate(scores[key].tolist())
    )
    keys = list(current)
    removed: dict[Key, list[int]] = {key: [] for key in current}
    for _, place, index in ranked:
        key = keys[place]
        groups = current[key]
        size = groups.num_parameters_per_group
        if size <= removable and len(removed[key]) < groups.num_groups - _least(initial[key], multiple):
            removed[key].append(index)
            removable -= size
    return {key: _kept(groups, removed[key], multiple) for key, groups in current.items()}


def _kept(groups: LayerGroups, removed: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Return what stays, giving back the last removed so that an FFN's width is a multiple."""
    width = groups.num_groups - len(removed)
    if groups.kind is GroupKind.FFN:
        width = round_up(width, multiple, groups.num_groups)
    return tuple(sorted(set(range(groups.num_groups)) - set(removed[: groups.num_groups - width])))


def _least(groups: LayerGroups, multiple: int) -> int:
    return min(multiple, groups.num_groups) if groups.kind is GroupKind.FFN else 1


def _num_parameters(groups: Iterable[LayerGroups]) -> int:
    return sum(of_kind.num_groups * of_kind.num_parameters_per_group for of_kind in groups)


def _mean(scores: Sequence[Tensor]) -> float:
    return float(torch.cat(list(scores)).mean()) or 1.0
