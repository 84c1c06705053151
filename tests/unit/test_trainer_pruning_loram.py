"""LoRAM's copies: as many heads and channels as its published counts say, random or the best, whole ends."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from architectures import build_model
from hypothesis import given
from hypothesis import strategies as st
from motley_bases.pruned_geometry import DecoderShape, PruneRule, num_parameters
from motley_trainer.errors import SettingsError
from motley_trainer.pruning.counting import CountingRule, kept_count
from motley_trainer.pruning.groups import GroupKind, layer_groups
from motley_trainer.pruning.iterative import Pruned, prune_in_steps
from motley_trainer.pruning.loram_checks import pruned_layers
from motley_trainer.pruning.saliency import Criterion
from motley_trainer.pruning.selection import select
from motley_trainer.pruning.settings import PruneSettings, Selection
from motley_trainer.pruning.surgery import num_parameters as count_parameters
from motley_trainer.spec.settings import LoramPruning, LoramSettings

LLAMA_2_70B = DecoderShape(80, 8192, 28672, 64, 8, 128, 32000)
LLAMA_3_70B = DecoderShape(80, 8192, 28672, 64, 8, 128, 128256)
LLAMA_2_13B = DecoderShape(40, 5120, 13824, 40, 40, 128, 32000)
SMALL = DecoderShape(8, 64, 96, 4, 2, 16, 50)
WINDOWS = torch.randint(0, 50, (4, 10), generator=torch.Generator().manual_seed(3))


def loram(ratio: str | Fraction = "1/2", **settings: object) -> PruneSettings:
    fields = {"ratio": Fraction(ratio), "rule": CountingRule.LORAM, "window": 10, "num_windows": 4, **settings}
    return PruneSettings(**fields)  # type: ignore[arg-type]


def num_left(shape: DecoderShape, settings: PruneSettings) -> int:
    """Count what is left of a decoder by the groups that go from each of its layers."""
    left = num_parameters(shape)
    for layer in settings.layers(shape.num_layers):
        for groups in layer_groups(shape, layer):
            kept = kept_count(groups, settings.ratio, settings.multiple, settings.rule)
            left -= (groups.num_groups - kept) * groups.num_parameters_per_group
    return left


@pytest.mark.parametrize(
    ("shape", "ratio", "wanted"),
    [
        (LLAMA_2_70B, "0.65", 28_099_436_544),
        (LLAMA_2_70B, "0.75", 21_488_738_304),
        (LLAMA_2_70B, "0.85", 16_272_924_672),
        (LLAMA_2_70B, "0.95", 9_662_226_432),
        (LLAMA_3_70B, "0.85", 17_849_982_976),
        (LLAMA_2_13B, "0.65", 6_005_662_720),
    ],
)
def test_the_published_counts_follow_from_the_groups_to_the_parameter(
    shape: DecoderShape, ratio: str, wanted: int
) -> None:
    assert num_left(shape, loram(ratio)) == wanted


def test_single_weights_go_from_all_layers_unless_some_are_named() -> None:
    asked = LoramSettings(pruning=LoramPruning.UNSTRUCTURED, ratio=Fraction("0.55"))
    in_layer = 4 * 5120 * 5120 + 3 * 5120 * 13824
    left = num_parameters(LLAMA_2_13B) - asked.ratio * in_layer * len(pruned_layers(asked, 40))
    assert float(left) == pytest.approx(6_037_628_912, rel=1e-5)
    for pruning, layers in (
        (LoramPruning.SEMI_STRUCTURED, range(40)),
        (LoramPruning.STRUCTURED, range(4, 38)),
        (LoramPruning.RANDOM, range(4, 38)),
    ):
        assert pruned_layers(replace(asked, pruning=pruning), 40) == layers
        assert pruned_layers(replace(asked, pruning=pruning, layers=(5, 6)), 40) == range(5, 6)


@given(
    st.fractions(min_value=Fraction(1, 100), max_value=Fraction(3, 4)),
    st.sampled_from([(8, 8), (8, 4), (12, 4)]),
    st.integers(8, 40),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_any_ratio_and_interval_leaves_what_the_bases_own_arithmetic_says(
    ratio: Fraction, heads: tuple[int, int], ffn_size: int, first: int, last: int
) -> None:
    shape = DecoderShape(9, 32, ffn_size, *heads, 5, 20)
    settings = loram(ratio, first_layer=first, end_layer=9 - last)
    assert num_left(shape, settings) == num_parameters(shape, PruneRule(ratio, first, last))
    assert num_left(shape, loram(ratio)) == num_parameters(shape, PruneRule(ratio))


def test_the_two_rules_round_heads_differently() -> None:
    one_to_one, grouped = (layer_groups(DecoderShape(1, 64, 96, 8, kv, 16, 9), 0)[0] for kv in (8, 2))
    counts = {
        rule: (kept_count(one_to_one, Fraction("0.3"), rule=rule), kept_count(grouped, Fraction("0.499"), rule=rule))
        for rule in CountingRule
    }
    # 5.6 of 8 heads stay: 5, or without the 38.4, so 39 channels that go, of which two heads are whole: 6. Of 2 heads
    # 0.998 go: none, or the 15.968, so 16 channels, of one head.
    assert counts == {CountingRule.LORAM: (5, 2), CountingRule.LLM_PRUNER: (6, 1)}


@pytest.mark.parametrize("criterion", [Criterion.RANDOM, Criterion.PARAM_FIRST])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("kv_heads", "ratio"), [(2, "1/2"), (4, "0.3")])  # of 4 heads 2.8 stay, and so 2
def test_a_model_is_left_with_the_parameters_of_the_rule(
    criterion: Criterion, steps: int, kv_heads: int, ratio: str
) -> None:
    model = build_model("llama", vocab_size=50, num_hidden_layers=8, num_key_value_heads=kv_heads)
    pruned = prune_in_steps(model, loram(ratio, criterion=criterion, steps=steps), WINDOWS)
    assert [layer for layer, kept in enumerate(pruned.layers) if kept is not None] == [4, 5]
    shape = replace(SMALL, num_kv_heads=kv_heads)
    assert count_parameters(model) == num_parameters(shape, PruneRule(Fraction(ratio)))


def drawn(seed: int) -> Pruned:
    model = build_model("llama", vocab_size=50, num_hidden_layers=8)
    return prune_in_steps(model, loram(criterion=Criterion.RANDOM, seed=seed), WINDOWS)


def test_a_seed_draws_the_same_and_another_draws_otherwise() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    first, second = drawn(1).layers[4:6]
    assert first != second, "every layer draws for itself"


def test_the_highest_scored_stay() -> None:
    groups = {(0, of.kind): of for of in layer_groups(DecoderShape(1, 16, 6, 8, 4, 2, 10), 0)}
    scores = {
        (0, GroupKind.ATTENTION): torch.tensor([0.5, 3.0, 4.0, 1.0]),
        (0, GroupKind.FFN): torch.tensor([0.0, 9.0, 1.0, 8.0, 7.0, 2.0]),
    }
    kept = select(Selection.LOCAL, groups, groups, scores, ratio=Fraction(1, 2), rule=CountingRule.LORAM)
    assert kept == {(0, GroupKind.ATTENTION): (1, 2), (0, GroupKind.FFN): (1, 3, 4)}


def test_named_layers_take_the_place_of_the_rules_own() -> None:
    assert loram().layers(8) == range(4, 6)
    assert loram(first_layer=0).layers(8) == range(8)
    assert loram(end_layer=3).layers(8) == range(3)
    assert PruneSettings(Fraction(1, 2)).layers(8) == range(8)


def test_a_base_without_a_layer_between_the_whole_ends_is_refused_by_the_rule() -> None:
    with pytest.raises(SettingsError, match="those the rule loram prunes unless others are named") as caught:
        loram().layers(6)
    assert (caught.value.reason, caught.value.field) == ("LAYER_RANGE", "layers")


@pytest.mark.parametrize(
    ("shape", "kind", "ratio"),
    [
        (SMALL, GroupKind.FFN, "0.99"),  # of 96 channels 95.04 go, rounded up
        (DecoderShape(8, 16, 6, 4, 4, 2, 10), GroupKind.ATTENTION, "0.8"),  # 0.8 heads stay
    ],
)
def test_a_ratio_that_empties_a_layer_is_refused(shape: DecoderShape, kind: GroupKind, ratio: str) -> None:
    groups = next(of for of in layer_groups(shape, 4) if of.kind is kind)
    with pytest.raises(SettingsError) as caught:
        kept_count(groups, Fraction(ratio), rule=CountingRule.LORAM)
    assert caught.value.reason == "EMPTY_LAYER"


@pytest.mark.parametrize(("field", "value"), [("selection", Selection.GLOBAL), ("multiple", 16)])
def test_what_would_leave_other_counts_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"{field} {value} .* rule loram") as caught:
        loram(**{field: value})
    assert (caught.value.reason, caught.value.field) == ("RULE_CONFLICT", field)
