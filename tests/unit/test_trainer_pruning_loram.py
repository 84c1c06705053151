"""LoRAM's copies: as many heads and channels as its published counts say, random or the best, whole ends."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from motley_bases.prune_manifest import LayerKeep
from motley_bases.pruned_geometry import DecoderShape, PruneRule, kept_channels
from motley_trainer.errors import SettingsError
from motley_trainer.pruning.groups import GroupKind
from motley_trainer.pruning.loram import Keeps, best_keeps, draw_keeps

LLAMA_2_70B = DecoderShape(80, 8192, 28672, 64, 8, 128, 32000)
LLAMA_2_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, 32000)
SMALL = DecoderShape(8, 16, 6, 8, 4, 2, 10)
RULE = PruneRule(Fraction(1, 2), num_first_whole=3, num_last_whole=2)


def num_kept_parameters(shape: DecoderShape, keeps: Keeps) -> int:
    """Count every weight that the kept channels leave, Linear by Linear."""
    total = 2 * shape.vocab_size * shape.hidden_size + (2 * shape.num_layers + 1) * shape.hidden_size
    whole = LayerKeep(tuple(range(shape.ffn_size)), tuple(range(shape.num_kv_heads)))
    for keep in keeps:
        kept = kept_channels(shape, kv_heads=(keep or whole).kv_heads, ffn_channels=(keep or whole).ffn_channels)
        total += sum(len(of.inputs or of.outputs or ()) * shape.hidden_size for of in kept.values())
    return total


@pytest.mark.parametrize(
    ("shape", "ratio", "wanted"),
    [
        (LLAMA_2_70B, Fraction(13, 20), 28_099_436_544),
        (LLAMA_2_70B, Fraction(17, 20), 16_272_924_672),
        (LLAMA_2_13B, Fraction(13, 20), 6_005_662_720),
    ],
)
def test_what_is_drawn_leaves_the_published_parameters(shape: DecoderShape, ratio: Fraction, wanted: int) -> None:
    keeps = draw_keeps(shape, PruneRule(ratio), seed=0)
    assert [layer for layer, keep in enumerate(keeps) if keep is None] == [
        0, 1, 2, 3, shape.num_layers - 2, shape.num_layers - 1,
    ]  # fmt: skip
    assert num_kept_parameters(shape, keeps) == wanted


def test_a_seed_draws_the_same_and_another_draws_otherwise() -> None:
    assert draw_keeps(LLAMA_2_13B, RULE, seed=1) == draw_keeps(LLAMA_2_13B, RULE, seed=1)
    assert draw_keeps(LLAMA_2_13B, RULE, seed=1) != draw_keeps(LLAMA_2_13B, RULE, seed=2)
    first, second = draw_keeps(LLAMA_2_13B, RULE, seed=1)[3:5]
    assert first != second, "every layer draws for itself"


def test_the_highest_scored_stay() -> None:
    scores = {
        (layer, kind): torch.tensor(values)
        for layer in range(3, 6)
        for kind, values in (
            (GroupKind.ATTENTION, [0.5, 3.0, float(layer), 1.0]),
            (GroupKind.FFN, [0.0, 9.0, 1.0, 8.0, 7.0, 2.0]),
        )
    }
    keeps = best_keeps(SMALL, RULE, scores)
    assert keeps == (None, None, None, *[LayerKeep((1, 3, 4), (1, 2))] * 3, None, None)


@pytest.mark.parametrize(
    ("shape", "rule", "reason"),
    [
        (SMALL, PruneRule(Fraction(99, 100), 0, 0), "EMPTY_LAYER"),  # of 6 channels 5.94 go, rounded up
        (DecoderShape(8, 16, 6, 4, 4, 2, 10), PruneRule(Fraction(4, 5), 0, 0), "EMPTY_LAYER"),  # 0.8 heads stay
        (DecoderShape(6, 16, 6, 8, 4, 2, 10), PruneRule(Fraction(1, 2)), "LAYER_RANGE"),
    ],
)
def test_a_rule_that_leaves_nothing_or_prunes_nothing_is_refused(
    shape: DecoderShape, rule: PruneRule, reason: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        draw_keeps(shape, rule, seed=0)
    assert caught.value.reason == reason
