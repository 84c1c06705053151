"""Selection: which groups of a layer stay, given their scores and how much is to go.

Owns the two ways of competing for the places that there are, and which ratios they can come to. A layer is never
emptied: local selection refuses to, global selection passes over what would. Knows nothing of weights. Pure functions;
equal scores go by number, the lower first, so that the same scores always give the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from motley_trainer.errors import SettingsError, UnsuitableBaseError
from motley_trainer.pruning.counting import CountingRule, kept_count
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
    Semantics: the rule is of local selection; globally, parameters are counted, and no more go than the share. Ratios
    are `check_ratio`'s to refuse.
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


def check_ratio(
    selection: Selection,
    initial: Mapping[Key, LayerGroups],
    *,
    ratio: Fraction,
    multiple: int = 1,
    rule: CountingRule = CountingRule.LLM_PRUNER,
) -> None:
    """Refuse a ratio that no choice among these groups can come to.

    Raises: SettingsError with reason EMPTY_LAYER if every layer is to lose that share and one would lose all;
    RATIO_NOT_REACHED if layers compete, and together have less to lose than is asked for.
    """
    if selection is Selection.LOCAL:
        for groups in initial.values():
            kept_count(groups, ratio, multiple, rule)
        return
    total = num_parameters_of(initial.values())
    least = sum(_least(groups, multiple) * groups.num_parameters_per_group for groups in initial.values())
    if total - least < math.floor(total * ratio):
        raise SettingsError(
            f"a ratio of {float(ratio):g} asks for {math.floor(total * ratio):,} of {total:,} parameters; as every "
            f"layer keeps a key-value head and {multiple} FFN channels, only {total - least:,} "
            f"({(total - least) / total:.2%}) can go",
            reason="RATIO_NOT_REACHED",
            field="ratio",
        )


def num_parameters_of(groups: Iterable[LayerGroups]) -> int:
    """Return how many parameters groups have."""
    return sum(of_kind.num_groups * of_kind.num_parameters_per_group for of_kind in groups)


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
    """Remove the units of the lowest scores, of whatever layer and kind, until the share of the parameters is gone.

    Semantics: a unit is a group, or as many FFN channels as bring a width to the next multiple. A unit that does not
    fit into what is left to remove is passed over, so that what stays undone is less than any unit that may still go.
    """
    removable = math.floor(num_parameters_of(initial.values()) * ratio)
    removable -= num_parameters_of(initial.values()) - num_parameters_of(current.values())
    removed: dict[Key, list[int]] = {key: [] for key in current}
    for key, unit in _ranked_units(current, scores, multiple):
        groups = current[key]
        size = len(unit) * groups.num_parameters_per_group
        least = _least(initial[key], multiple)
        if size <= removable and groups.num_groups - len(removed[key]) - len(unit) >= least:
            removed[key] += unit
            removable -= size
    return {key: tuple(sorted(set(range(of.num_groups)) - set(removed[key]))) for key, of in current.items()}


def _ranked_units(
    current: Mapping[Key, LayerGroups], scores: Mapping[Key, Tensor], multiple: int
) -> Iterator[tuple[Key, list[int]]]:
    """Yield what can go at once, the lowest scores first.

    Semantics: a score counts in means of its kind, since a head's is a sum over many channels and would never be low; a
    unit of several groups has their mean, which no single group's rounding touches.
    """
    means = {kind: _mean([scores[key] for key in current if key[1] is kind]) for kind in GroupKind}
    ranked: list[tuple[float, int, int, list[int]]] = []
    for place, (key, groups) in enumerate(current.items()):
        relative = [score / means[key[1]] for score in scores[key].tolist()]
        for number, unit in enumerate(_units(groups, relative, multiple)):
            ranked.append((math.fsum(relative[index] for index in unit) / len(unit), place, number, unit))
    keys = list(current)
    for _, place, _, unit in sorted(ranked):
        yield keys[place], unit


def _units(groups: LayerGroups, scores: Sequence[float], multiple: int) -> Iterator[list[int]]:
    """Cut the groups, the lowest scores first, into what goes at once.

    Semantics: the first unit of a width that is no multiple is what it has too much.
    """
    order = sorted(range(groups.num_groups), key=lambda index: (scores[index], index))
    size = multiple if groups.kind is GroupKind.FFN else 1
    end = groups.num_groups % size
    if end:
        yield order[:end]
    for begin in range(end, groups.num_groups, size):
        yield order[begin : begin + size]


def _least(groups: LayerGroups, multiple: int) -> int:
    return min(multiple, groups.num_groups) if groups.kind is GroupKind.FFN else 1


def _mean(scores: Sequence[Tensor]) -> float:
    return float(torch.cat(list(scores)).mean()) or 1.0
