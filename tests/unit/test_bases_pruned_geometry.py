"""A pruned copy's sizes, to the parameter, and the channels that it keeps."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from motley_bases.pruned_geometry import (
    DecoderShape,
    PruneRule,
    exact_ratio,
    kept_channels,
    num_parameters,
    query_heads,
)

LLAMA_2_70B = DecoderShape(80, 8192, 28672, 64, 8, 128, 32000)
LLAMA_31_70B = DecoderShape(80, 8192, 28672, 64, 8, 128, 128256)
LLAMA_2_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, 32000)


@pytest.mark.parametrize(
    ("shape", "ratio", "ffn_size", "num_kv_heads", "wanted"),
    [
        (LLAMA_2_70B, "0.65", 10035, 3, 28_099_436_544),
        (LLAMA_2_70B, "0.75", 7168, 2, 21_488_738_304),
        (LLAMA_2_70B, "0.85", 4300, 2, 16_272_924_672),
        (LLAMA_2_70B, "0.95", 1433, 1, 9_662_226_432),
        (LLAMA_31_70B, "0.85", 4300, 2, 17_849_982_976),
        (LLAMA_2_13B, "0.65", 4838, 14, 6_005_662_720),
    ],
)
def test_the_published_counts_to_the_parameter(
    shape: DecoderShape, ratio: str, ffn_size: int, num_kv_heads: int, wanted: int
) -> None:
    rule = PruneRule(exact_ratio(ratio))
    assert rule.kept_ffn_size(shape.ffn_size) == ffn_size
    assert rule.kept_kv_heads(shape.num_heads, shape.num_kv_heads) == num_kv_heads
    assert num_parameters(shape, rule) == wanted


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [(LLAMA_2_70B, 68_976_648_192), (LLAMA_31_70B, 70_553_706_496), (LLAMA_2_13B, 13_015_864_320)],
)
def test_the_whole_models_to_the_parameter(shape: DecoderShape, wanted: int) -> None:
    assert num_parameters(shape) == wanted
    assert num_parameters(shape, PruneRule(Fraction(0))) == wanted


def test_a_ratio_is_what_was_written_not_the_nearest_binary_fraction() -> None:
    assert int(40 * (1 - 0.65)) == 14
    assert int(60 * (1 - 0.65)) == 21
    assert int(100 * (1 - 0.43)) == 57
    assert int(10 * (1 - 0.9)) == 0  # but one tenth of 10 is 1
    assert PruneRule(exact_ratio(0.9)).kept_kv_heads(10, 10) == 1


@pytest.mark.parametrize("ratio", ["-0.1", "1", "1.5"])
def test_a_ratio_that_leaves_nothing_is_refused(ratio: str) -> None:
    with pytest.raises(ValueError, match="ratio"):
        PruneRule(exact_ratio(ratio))


@pytest.mark.parametrize(
    ("num_layers", "wanted"), [(80, range(4, 78)), (40, range(4, 38)), (8, range(4, 6)), (5, range(4, 4))]
)
def test_the_first_and_the_last_layers_stay_whole(num_layers: int, wanted: range) -> None:
    assert PruneRule(Fraction(1, 2)).pruned_layers(num_layers) == wanted


def test_grouped_queries_by_hand() -> None:
    shape = DecoderShape(1, 16, 6, 8, 4, 2, 10)
    rule = PruneRule(exact_ratio("0.65"))
    assert rule.kept_kv_heads(8, 4) == 2
    assert PruneRule(Fraction(1, 2)).kept_ffn_size(6) == 3
    kept = kept_channels(shape, kv_heads=[1, 3], ffn_channels=[1, 3, 4])
    assert kept["k_proj"].outputs == kept["v_proj"].outputs == (2, 3, 6, 7)
    assert query_heads([1, 3], 2) == (2, 3, 6, 7)
    assert kept["q_proj"].outputs == kept["o_proj"].inputs == (4, 5, 6, 7, 12, 13, 14, 15)
    assert kept["gate_proj"].outputs == kept["up_proj"].outputs == kept["down_proj"].inputs == (1, 3, 4)
    assert kept["q_proj"].inputs is kept["o_proj"].outputs is kept["down_proj"].outputs is None


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_a_kept_head_keeps_its_whole_group(group: int, head_dim: int) -> None:
    shape = DecoderShape(1, 32, 12, 3 * group, 3, head_dim, 10)
    kept = kept_channels(shape, kv_heads=[0, 2], ffn_channels=range(12))
    marked = torch.arange(3).repeat_interleave(group * head_dim)  # the key-value head of every query channel
    assert list(kept["q_proj"].outputs or ()) == torch.nonzero(marked != 1).flatten().tolist()
    assert list(kept["k_proj"].outputs or ()) == [*range(head_dim), *range(2 * head_dim, 3 * head_dim)]


@pytest.mark.parametrize(
    ("kv_heads", "ffn_channels"),
    [([], [0]), ([2], [0]), ([0], [6]), ([0], []), ([1, 0], [0]), ([0, 0], [0]), ([-1], [0])],
)
def test_heads_and_channels_that_cannot_be_kept_are_refused(kv_heads: list[int], ffn_channels: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend"):
        kept_channels(DecoderShape(1, 16, 6, 4, 2, 2, 10), kv_heads=kv_heads, ffn_channels=ffn_channels)
