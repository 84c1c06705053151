"""What stays: exact counts, the same choice every time, and never an empty layer."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from architectures import build_model
from hypothesis import given
from hypothesis import strategies as st
from motley_bases.pruned_geometry import DecoderShape
from motley_trainer.errors import SettingsError, UnsuitableBaseError
from motley_trainer.pruning import iterative
from motley_trainer.pruning.aggregation import Aggregation
from motley_trainer.pruning.counting import kept_count
from motley_trainer.pruning.groups import GroupKind, LayerGroups, layer_groups
from motley_trainer.pruning.iterative import prune_in_steps
from motley_trainer.pruning.saliency import Criterion
from motley_trainer.pruning.selection import Key, check_ratio, keep_highest, select
from motley_trainer.pruning.settings import (
    PruneSettings,
    RecoverySettings,
    Selection,
    parse_layers,
    parse_ratio,
)
from motley_trainer.pruning.surgery import num_parameters, shapes_of
from torch import Tensor

SHAPE = DecoderShape(3, 64, 96, 8, 4, 8, 50)
WINDOWS = torch.randint(0, 50, (4, 10), generator=torch.Generator().manual_seed(3))


def keyed(shape: DecoderShape = SHAPE) -> dict[Key, LayerGroups]:
    return {(layer, groups.kind): groups for layer in range(shape.num_layers) for groups in layer_groups(shape, layer)}


def scores_for(groups: dict[Key, LayerGroups], seed: int = 0) -> dict[Key, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(of.num_groups, generator=generator, dtype=torch.float64) for key, of in groups.items()}


def removed_parameters(groups: dict[Key, LayerGroups], kept: dict[Key, tuple[int, ...]]) -> int:
    return sum((of.num_groups - len(kept[key])) * of.num_parameters_per_group for key, of in groups.items())


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_groups", "head_dim", "ratio", "kept"),
    [
        (32, 128, "0.25", 24),
        (8, 128, "0.25", 6),
        (4, 64, "0.25", 3),
        (32, 128, "0.60", 13),  # 19.2 heads go: 19
        (40, 128, "0.65", 14),  # 26 go, and 40 * (1 - 0.65) is no 14 in floating point
        (2, 32, "0.25", 2),  # half a head is none
    ],
)
def test_heads_go_as_whole_ones(num_groups: int, head_dim: int, ratio: str, kept: int) -> None:
    groups = LayerGroups(0, GroupKind.ATTENTION, num_groups, head_dim, ())
    assert kept_count(groups, Fraction(ratio)) == kept


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "kept"),
    [
        (11008, "0.25", 1, 8256),
        (11008, "0.25", 64, 8256),
        (4096, "0.25", 1, 3072),
        (1000, "0.43", 1, 570),  # int(1000 * (1 - 0.43)) is 570 or 569, as floats will have it
        (13824, "0.65", 1, 4838),
        (13824, "0.65", 64, 4864),
        (96, "0.25", 64, 96),  # no more than there is
    ],
)
def test_channels_are_counted_exactly_and_rounded_up_to_the_multiple(
    width: int, ratio: str, multiple: int, kept: int
) -> None:
    groups = LayerGroups(0, GroupKind.FFN, width, 1, ())
    assert kept_count(groups, Fraction(ratio), multiple) == kept


@given(st.fractions(min_value=0, max_value=Fraction(999, 1000)), st.integers(1, 300), st.sampled_from([1, 16, 64]))
def test_no_ratio_takes_less_than_the_exact_share_of_channels_without_a_multiple(
    ratio: Fraction, width: int, multiple: int
) -> None:
    groups = LayerGroups(0, GroupKind.FFN, width, 1, ())
    exact = width * (1 - ratio)
    if exact < 1:
        with pytest.raises(SettingsError):
            kept_count(groups, ratio, multiple)
        return
    kept = kept_count(groups, ratio, multiple)
    assert 1 <= kept <= width
    assert exact - 1 < kept < exact + multiple
    assert kept % multiple == 0 or kept == width


@pytest.mark.parametrize(("kind", "ratio"), [(GroupKind.ATTENTION, "0.99"), (GroupKind.FFN, "0.999")])
def test_a_ratio_that_empties_a_layer_is_refused_by_the_layer(kind: GroupKind, ratio: str) -> None:
    groups = next(of for of in layer_groups(SHAPE, 2) if of.kind is kind)
    with pytest.raises(SettingsError, match=f"all {groups.num_groups} {kind} groups of layer 2") as refused:
        kept_count(groups, Fraction(ratio))
    assert (refused.value.reason, refused.value.field) == ("EMPTY_LAYER", "ratio")


# --- choices ----------------------------------------------------------------------------------------------------------


def test_the_highest_stay_ascending_and_of_equals_the_later() -> None:
    assert keep_highest(torch.tensor([3.0, 1.0, 2.0, 5.0]), 2) == (0, 3)
    assert keep_highest(torch.tensor([1.0] * 50), 20) == tuple(range(30, 50))


def test_local_selection_takes_the_lowest_of_each_layer_and_kind() -> None:
    groups = keyed()
    scores = scores_for(groups)
    kept = select(Selection.LOCAL, groups, groups, scores, ratio=Fraction(1, 4))
    for key, of in groups.items():
        order = sorted(range(of.num_groups), key=lambda index, key=key: float(scores[key][index]))  # type: ignore[misc]
        assert kept[key] == tuple(sorted(order[of.num_groups // 4 :]))


@pytest.mark.parametrize("selection", list(Selection))
def test_the_ratio_of_nothing_keeps_everything(selection: Selection) -> None:
    groups = keyed()
    kept = select(selection, groups, groups, scores_for(groups), ratio=Fraction(0))
    assert kept == {key: tuple(range(of.num_groups)) for key, of in groups.items()}


def test_global_selection_removes_the_share_of_parameters_but_for_less_than_the_smallest_group() -> None:
    groups = keyed()
    kept = select(Selection.GLOBAL, groups, groups, scores_for(groups), ratio=Fraction(1, 3))
    total = sum(of.num_groups * of.num_parameters_per_group for of in groups.values())
    smallest = min(of.num_parameters_per_group for of in groups.values())
    assert total / 3 - smallest < removed_parameters(groups, kept) <= total / 3
    assert len({len(kept[layer, GroupKind.FFN]) for layer in range(3)}) > 1  # layers differ


@given(st.integers(0, 50), st.sampled_from(["0.1", "0.5", "0.9", "0.99"]), st.sampled_from([1, 16, 64]))
def test_global_selection_leaves_a_head_and_a_multiple_of_channels_in_every_layer(
    seed: int, ratio: str, multiple: int
) -> None:
    groups = keyed()
    scores = scores_for(groups, seed)
    scores[0, GroupKind.FFN] *= 1e-6  # one layer that nobody would miss
    scores[1, GroupKind.ATTENTION] *= 1e-6
    kept = select(Selection.GLOBAL, groups, groups, scores, ratio=Fraction(ratio), multiple=multiple)
    for (_, kind), indices in kept.items():
        assert list(indices) == sorted(set(indices))
        assert len(indices) >= (multiple if kind is GroupKind.FFN else 1)
        assert kind is GroupKind.ATTENTION or len(indices) % multiple == 0 or len(indices) == 96


@given(
    st.integers(0, 1000),
    st.fractions(min_value=0, max_value=Fraction(99, 100), max_denominator=100),
    st.booleans(),
)
def test_without_a_multiple_global_selection_takes_single_groups_in_the_order_of_their_scores(
    seed: int, ratio: Fraction, tied: bool
) -> None:
    groups = keyed(DecoderShape(3, 8, 7, 4, 2, 4, 50))
    scores = scores_for(groups, seed)
    if tied:
        scores = {key: (value * 3).round() for key, value in scores.items()}
    kept = {key: list(range(of.num_groups)) for key, of in groups.items()}
    left = int(sum(of.num_groups * of.num_parameters_per_group for of in groups.values()) * ratio)
    means = {kind: float(torch.cat([scores[layer, kind] for layer in range(3)]).mean()) or 1.0 for kind in GroupKind}
    order = [
        (float(value) / means[key[1]], place, index)
        for place, key in enumerate(groups)
        for index, value in enumerate(scores[key])
    ]
    for _, place, index in sorted(order):
        key = list(groups)[place]
        size = groups[key].num_parameters_per_group
        if size <= left and len(kept[key]) > 1:
            kept[key].remove(index)
            left -= size
    expected = {key: tuple(indices) for key, indices in kept.items()}
    assert select(Selection.GLOBAL, groups, groups, scores, ratio=ratio) == expected


@pytest.mark.parametrize("multiple", [16, 40, 64])
@pytest.mark.parametrize("ratio", ["1/10", "1/4", "1/2", "2/3"])
def test_a_multiple_leaves_less_undone_than_the_least_that_could_still_go(multiple: int, ratio: str) -> None:
    groups = keyed(DecoderShape(4, 64, 512, 4, 2, 16, 50))
    kept = select(Selection.GLOBAL, groups, groups, scores_for(groups), ratio=Fraction(ratio), multiple=multiple)
    widths = [len(indices) for (_, kind), indices in kept.items() if kind is GroupKind.FFN]
    assert all(width % multiple == 0 or width == 512 for width in widths)
    total = sum(of.num_groups * of.num_parameters_per_group for of in groups.values())
    could_go = [
        of.num_parameters_per_group
        * (1 if kind is GroupKind.ATTENTION else len(kept[layer, kind]) % multiple or multiple)
        for (layer, kind), of in groups.items()
        if len(kept[layer, kind]) > (1 if kind is GroupKind.ATTENTION else multiple)
    ]
    assert 0 <= total * Fraction(ratio) - removed_parameters(groups, kept) < min(could_go)


def test_of_whole_multiples_the_one_of_the_lowest_mean_goes() -> None:
    groups = keyed(DecoderShape(2, 8, 8, 2, 2, 2, 50))  # a head would fit as well
    scores = {key: torch.full((of.num_groups,), 5.0, dtype=torch.float64) for key, of in groups.items()}
    scores[0, GroupKind.FFN][:4] = torch.tensor([0.0, 9.0, 9.0, 9.0])  # the lowest channel, in bad company
    scores[1, GroupKind.FFN][4:] = torch.tensor([1.0, 2.0, 3.0, 1.0])
    share = Fraction(4 * 3 * 8, sum(of.num_groups * of.num_parameters_per_group for of in groups.values()))
    kept = select(Selection.GLOBAL, groups, groups, scores, ratio=share, multiple=4)
    assert kept[1, GroupKind.FFN] == (0, 1, 2, 3)
    assert all(len(indices) == groups[key].num_groups for key, indices in kept.items() if key != (1, GroupKind.FFN))


def test_a_ratio_that_layers_together_cannot_come_to_is_refused_with_what_they_can() -> None:
    groups = keyed()
    total, least = (
        sum(count(of) * of.num_parameters_per_group for of in groups.values())
        for count in (lambda of: of.num_groups, lambda of: 1 if of.kind is GroupKind.ATTENTION else 16)
    )
    reachable = Fraction(total - least, total)
    check_ratio(Selection.GLOBAL, groups, ratio=reachable, multiple=16)
    kept = select(Selection.GLOBAL, groups, groups, scores_for(groups), ratio=reachable, multiple=16)
    assert removed_parameters(groups, kept) == total - least
    with pytest.raises(SettingsError, match=f"only {total - least:,} ") as refused:
        check_ratio(Selection.GLOBAL, groups, ratio=reachable + Fraction(1, total), multiple=16)
    assert (refused.value.reason, refused.value.field) == ("RATIO_NOT_REACHED", "ratio")


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_how_loud_a_kind_is_does_not_decide_globally(factor: float) -> None:
    groups = keyed()
    scores = scores_for(groups)
    louder = {key: value * factor if key[1] is GroupKind.ATTENTION else value for key, value in scores.items()}
    kept, kept_louder = (
        select(Selection.GLOBAL, groups, groups, given, ratio=Fraction(1, 4)) for given in (scores, louder)
    )
    assert kept == kept_louder
    assert any(len(indices) < 4 for (_, kind), indices in kept.items() if kind is GroupKind.ATTENTION)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_cannot_be_compared_are_refused_by_the_layer(bad: float) -> None:
    groups = keyed()
    scores = scores_for(groups)
    scores[1, GroupKind.FFN][3] = bad
    with pytest.raises(UnsuitableBaseError, match="ffn scores of layer 1") as refused:
        select(Selection.LOCAL, groups, groups, scores, ratio=Fraction(1, 4))
    assert refused.value.reason == "NOT_FINITE"


# --- steps ------------------------------------------------------------------------------------------------------------


def settings(**overrides: object) -> PruneSettings:
    return PruneSettings(**{"ratio": Fraction(1, 2), "window": 10, "num_windows": 4, **overrides})  # type: ignore[arg-type]


def test_steps_end_at_the_widths_of_one_step_and_the_book_is_in_the_originals_numbers() -> None:
    whole, gradual = (build_model("llama", vocab_size=50) for _ in range(2))
    seen: list[int] = []
    pruned = prune_in_steps(
        gradual, settings(first_layer=1, steps=4), WINDOWS, lambda: seen.append(shapes_of(gradual).layers[1].ffn_size)
    )
    assert seen == [84, 72, 60, 48]
    assert [(layer.num_kv_heads, layer.ffn_size) for layer in shapes_of(gradual).layers] == [(2, 96), (1, 48), (1, 48)]
    assert pruned.layers[0] is None
    for layer in (1, 2):
        kept = pruned.layers[layer]
        assert kept is not None
        for name in ("gate_proj", "up_proj"):
            path = f"model.layers.{layer}.mlp.{name}.weight"
            assert torch.equal(gradual.state_dict()[path], whole.state_dict()[path][list(kept.ffn_channels)])
        (head,) = kept.kv_heads
        path = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(gradual.state_dict()[path], whole.state_dict()[path][32 * head : 32 * (head + 1)])


@pytest.mark.parametrize("criterion", list(Criterion))
@pytest.mark.parametrize("selection", list(Selection))
def test_the_same_seed_and_text_give_the_same_base(criterion: Criterion, selection: Selection) -> None:
    given = settings(criterion=criterion, selection=selection, steps=2, aggregation=Aggregation.MAX, seed=7)
    first, second = (prune_in_steps(build_model("llama", vocab_size=50), given, WINDOWS) for _ in range(2))
    assert first == second
    assert (first.num_unlike_first_order is not None) == criterion.needs_fisher


def test_the_second_order_may_choose_otherwise_and_the_mix_hardly_does() -> None:
    counts = {
        criterion: prune_in_steps(
            build_model("llama", vocab_size=50), settings(criterion=criterion), WINDOWS
        ).num_unlike_first_order
        for criterion in (Criterion.PARAM_SECOND, Criterion.PARAM_MIX)
    }
    second, mix = counts.values()
    assert second is not None
    assert mix is not None
    assert second > mix


def test_a_gradual_global_pruning_removes_no_more_than_the_share() -> None:
    model = build_model("llama", vocab_size=50)
    before = num_parameters(model)
    prunable = sum(
        of.num_groups * of.num_parameters_per_group for of in keyed(DecoderShape(3, 64, 96, 4, 2, 16, 50)).values()
    )
    prune_in_steps(model, settings(selection=Selection.GLOBAL, steps=3), WINDOWS)
    assert prunable / 2 - 192 < before - num_parameters(model) <= prunable / 2


@pytest.mark.parametrize(
    ("selection", "reason"), [(Selection.LOCAL, "EMPTY_LAYER"), (Selection.GLOBAL, "RATIO_NOT_REACHED")]
)
def test_a_ratio_out_of_reach_is_refused_before_anything_is_estimated(
    selection: Selection, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterative, "estimate", lambda *_: pytest.fail("estimated"))
    with pytest.raises(SettingsError) as refused:
        prune_in_steps(
            build_model("llama", vocab_size=50),
            settings(ratio=Fraction(99, 100), selection=selection, steps=5),
            WINDOWS,
        )
    assert refused.value.reason == reason


def test_a_ratio_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="less than one head") as refused:
        prune_in_steps(build_model("llama", vocab_size=50), settings(ratio=Fraction(1, 10), multiple=96), WINDOWS)
    assert refused.value.reason == "NOTHING_TO_PRUNE"


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["0", "1", "-0.1", "1.5", "1e400", f"1/{10**18 + 1}"])
def test_a_ratio_outside_nothing_and_all_or_too_fine_is_refused(ratio: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(ratio=Fraction(ratio))
    assert (refused.value.reason, refused.value.field) == ("BAD_RATIO", "ratio")


def test_a_ratio_is_read_as_it_is_written() -> None:
    assert parse_ratio("0.65") == Fraction(13, 20)
    assert parse_ratio("1/3") == Fraction(1, 3)
    for text in ("", "half", "nan", "inf", "1/0"):
        with pytest.raises(SettingsError) as refused:
            parse_ratio(text)
        assert refused.value.reason == "BAD_RATIO"


def test_layers_are_read_as_a_half_open_interval() -> None:
    assert parse_layers("4:30") == (4, 30)
    assert parse_layers(":") == (0, None)
    assert settings(first_layer=2).layers(8) == range(2, 8)
    for text in ("4", "4-30", "-1:3", "a:b", "1:2:3", "²:3"):
        with pytest.raises(SettingsError) as refused:
            parse_layers(text)
        assert refused.value.reason == "LAYER_RANGE"


@pytest.mark.parametrize("interval", [(3, 3), (4, 2), (0, 9), (8, None)])
def test_layers_that_are_none_or_not_the_models_are_refused(interval: tuple[int, int | None]) -> None:
    with pytest.raises(SettingsError, match="0:8") as refused:
        settings(first_layer=interval[0], end_layer=interval[1]).layers(8)
    assert (refused.value.reason, refused.value.field) == ("LAYER_RANGE", "layers")


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("multiple", 0), ("seed", -1), ("seed", 2**63), ("num_windows", 0), ("window", 1)],
)
def test_a_count_that_cannot_be_is_refused_by_its_name(field: str, value: int) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(**{field: value})
    assert (refused.value.reason, refused.value.field) == ("BAD_COUNT", field)


def test_a_recovery_that_cannot_be_is_refused() -> None:
    for wrong in ({"steps": -1}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}):
        with pytest.raises(SettingsError) as refused:
            RecoverySettings(**wrong)  # type: ignore[arg-type]
        assert refused.value.reason == "BAD_RECOVERY"
