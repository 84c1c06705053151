"""Gradual pruning: estimate, select, cut, a part at a time, until the whole ratio is gone.

Owns the steps and the book of what is left in the original's numbers. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from motley_bases.prune_manifest import LayerKeep
from torch import Tensor
from transformers import PreTrainedModel

from motley_trainer.errors import SettingsError
from motley_trainer.pruning.estimation import estimate
from motley_trainer.pruning.groups import GroupKind, LayerGroups, groups_of
from motley_trainer.pruning.saliency import Criterion
from motley_trainer.pruning.selection import Kept, Key, check_ratio, num_differing, num_parameters_of, select
from motley_trainer.pruning.settings import PruneSettings, Selection
from motley_trainer.pruning.surgery import shrink


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was kept.

    Semantics: a layer is None where nothing of it went. `num_unlike_first_order` counts the groups that the second
    order kept and the first alone, at the same step, would not have; None under criteria without a second order.
    `num_group_parameters` is what all groups of the layers that are pruned had before: what a ratio is a share of.
    """

    layers: tuple[LayerKeep | None, ...]
    num_group_parameters: int
    num_unlike_first_order: int | None


def prune_in_steps(
    model: PreTrainedModel, settings: PruneSettings, windows: Tensor, on_step: Callable[[], None] = lambda: None
) -> Pruned:
    """Prune a whole model in place.

    Semantics: after step t of T, t/T of the ratio is gone, counted from the initial widths; scores are made anew at
    each step, from the model as it is then.
    Raises: SettingsError as `check_ratio` does, before anything is estimated; with reason NOTHING_TO_PRUNE if rounding
    leaves every layer whole.
    """
    layers = settings.layers(model.config.num_hidden_layers)
    initial = _groups_of_layers(model, layers)
    check_ratio(settings.selection, initial, ratio=settings.ratio, multiple=settings.multiple, rule=settings.rule)
    kept: Kept = {key: tuple(range(of_kind.num_groups)) for key, of_kind in initial.items()}
    generator = torch.Generator().manual_seed(settings.seed)
    criteria = {settings.criterion} | ({Criterion.PARAM_FIRST} if settings.criterion.needs_fisher else set())
    num_unlike_first_order = 0
    for step in range(1, settings.steps + 1):
        current = _groups_of_layers(model, layers)
        scores = estimate(model, current, windows, sorted(criteria), settings.aggregation, generator)
        choices = {
            criterion: select(
                settings.selection,
                initial,
                current,
                scores[criterion],
                ratio=settings.ratio * Fraction(step, settings.steps),
                multiple=settings.multiple,
                rule=settings.rule,
            )
            for criterion in criteria
        }
        chosen = choices[settings.criterion]
        num_unlike_first_order += num_differing(chosen, choices.get(Criterion.PARAM_FIRST, chosen))
        shrink(model, chosen)
        kept = {key: tuple(kept[key][index] for index in indices) for key, indices in chosen.items()}
        on_step()
    if all(len(kept[key]) == of_kind.num_groups for key, of_kind in initial.items()):
        raise SettingsError(
            f"a ratio of {float(settings.ratio):g} is less than one head or {settings.multiple} FFN channels"
            f"{' a layer' if settings.selection is Selection.LOCAL else ''}",
            reason="NOTHING_TO_PRUNE",
            field="ratio",
        )
    return Pruned(
        tuple(_layer_keep(layer, initial, kept) for layer in range(model.config.num_hidden_layers)),
        num_parameters_of(initial.values()),
        num_unlike_first_order if settings.criterion.needs_fisher else None,
    )


def _groups_of_layers(model: PreTrainedModel, layers: range) -> dict[Key, LayerGroups]:
    return {(groups.layer, groups.kind): groups for groups in groups_of(model) if groups.layer in layers}


def _layer_keep(layer: int, initial: dict[Key, LayerGroups], kept: Kept) -> LayerKeep | None:
    heads, channels = (layer, GroupKind.ATTENTION), (layer, GroupKind.FFN)
    if all(key not in kept or len(kept[key]) == initial[key].num_groups for key in (heads, channels)):
        return None
    return LayerKeep(ffn_channels=kept[channels], kv_heads=kept[heads])
