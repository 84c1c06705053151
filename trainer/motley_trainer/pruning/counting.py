"""Counting: how many heads and channels of a layer stay, exactly, under whose rules.

Owns how a share becomes whole heads and channels. Chooses none of them. Pure functions.
Source: LLM-Pruner, arXiv:2305.11627; LoRAM, arXiv:2502.13533; in both, what the published parameter counts follow.
"""

from __future__ import annotations

import math
from enum import StrEnum
from fractions import Fraction

from motley_bases.pruned_geometry import PruneRule

from motley_trainer.errors import SettingsError
from motley_trainer.pruning.groups import GroupKind, LayerGroups


class CountingRule(StrEnum):
    """Whose rules of counting.

    Semantics: the FFN channels that go are rounded up by both. llm-pruner rounds up the attention channels that go, and
    then down to whole heads; loram rounds as the bases' pruned geometry does, and unlike the other leaves the first
    layers and the last whole where nothing else is said.
    """

    LLM_PRUNER = "llm-pruner"
    LORAM = "loram"


def kept_count(
    groups: LayerGroups, ratio: Fraction, multiple: int = 1, rule: CountingRule = CountingRule.LLM_PRUNER
) -> int:
    """Return how many groups of one kind a layer keeps.

    Semantics: the FFN width that stays is rounded up to the multiple.
    Raises: SettingsError with reason EMPTY_LAYER if that is none.
    """
    if groups.kind is GroupKind.FFN:
        kept = round_up(PruneRule(ratio).kept_ffn_size(groups.num_groups), multiple, groups.num_groups)
    elif rule is CountingRule.LORAM:
        kept = PruneRule(ratio).kept_kv_heads(groups.num_groups * groups.queries_per_head, groups.num_groups)
    else:
        kept = groups.num_groups - math.ceil(groups.num_groups * groups.head_dim * ratio) // groups.head_dim
    if kept < 1:
        raise SettingsError(
            f"a ratio of {float(ratio):g} would take all {groups.num_groups} {groups.kind} groups of layer "
            f"{groups.layer}",
            reason="EMPTY_LAYER",
            field="ratio",
        )
    return kept


def round_up(width: int, multiple: int, whole: int) -> int:
    """Return the next multiple, but no more than there is."""
    return min(-(-width // multiple) * multiple, whole)
