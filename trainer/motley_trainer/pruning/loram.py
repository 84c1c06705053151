"""What a copy keeps by LoRAM's own rules of counting: heads and channels drawn at random, or the highest scored.

The rules themselves are the bases' pruned geometry; they differ from LLM-Pruner's in how they round and in which
layers stay whole. Knows nothing of weights. Pure functions; any thread.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from motley_bases.prune_manifest import LayerKeep
from motley_bases.pruned_geometry import DecoderShape, PruneRule
from torch import Tensor

from motley_trainer.errors import SettingsError
from motley_trainer.pruning.groups import GroupKind
from motley_trainer.pruning.selection import Key, keep_highest

Keeps = tuple[LayerKeep | None, ...]


def draw_keeps(shape: DecoderShape, rule: PruneRule, seed: int) -> Keeps:
    """Draw what each pruned layer keeps (LoRAM-Rand); the same seed draws the same.

    Raises: SettingsError with reason EMPTY_LAYER or LAYER_RANGE, as `check_rule` does.
    """
    num_kv_heads, ffn_size, layers = check_rule(shape, rule)
    rng = random.Random(f"loram {seed}")
    drawn = {
        layer: LayerKeep(
            ffn_channels=tuple(sorted(rng.sample(range(shape.ffn_size), ffn_size))),
            kv_heads=tuple(sorted(rng.sample(range(shape.num_kv_heads), num_kv_heads))),
        )
        for layer in layers
    }
    return tuple(drawn.get(layer) for layer in range(shape.num_layers))


def best_keeps(shape: DecoderShape, rule: PruneRule, scores: Mapping[Key, Tensor]) -> Keeps:
    """Keep the highest scored heads and channels of each pruned layer (LoRAM-Stru).

    Shapes: scores [G] for each pruned layer and kind, as estimation gives them.
    Raises: as `draw_keeps`.
    """
    num_kv_heads, ffn_size, layers = check_rule(shape, rule)
    kept = {
        layer: LayerKeep(
            ffn_channels=keep_highest(scores[layer, GroupKind.FFN], ffn_size),
            kv_heads=keep_highest(scores[layer, GroupKind.ATTENTION], num_kv_heads),
        )
        for layer in layers
    }
    return tuple(kept.get(layer) for layer in range(shape.num_layers))


def check_rule(shape: DecoderShape, rule: PruneRule) -> tuple[int, int, range]:
    """Return how many key-value heads and channels a pruned layer keeps, and which layers are pruned.

    Raises: SettingsError with reason EMPTY_LAYER if that leaves a layer empty, LAYER_RANGE if no layer is pruned.
    """
    layers = rule.pruned_layers(shape.num_layers)
    if not layers:
        raise SettingsError(
            f"of {shape.num_layers} layers, the first {rule.num_first_whole} and the last {rule.num_last_whole} stay "
            "whole, and no other is left",
            reason="LAYER_RANGE",
            field="layers",
        )
    num_kv_heads, ffn_size = rule.kept_kv_heads(shape.num_heads, shape.num_kv_heads), rule.kept_ffn_size(shape.ffn_size)
    for kept, whole, what in ((num_kv_heads, shape.num_kv_heads, "heads"), (ffn_size, shape.ffn_size, "channels")):
        if kept < 1:
            raise SettingsError(
                f"a ratio of {float(rule.ratio):g} would take all {whole} {what} of a layer",
                reason="EMPTY_LAYER",
                field="ratio",
            )
    return num_kv_heads, ffn_size, layers
