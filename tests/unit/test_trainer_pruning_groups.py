"""What belongs together when a head or a channel goes: counted, traced on real models, and cut out of them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from architectures import build_model
from motley_bases.errors import UnsupportedBaseError
from motley_bases.pruned_geometry import DecoderShape, channels_of_heads, num_parameters
from motley_trainer.errors import UnsuitableBaseError
from motley_trainer.pruning.counting import kept_count
from motley_trainer.pruning.groups import GroupKind, LayerGroups, Side, groups_of, layer_groups
from motley_trainer.pruning.surgery import num_parameters as count_parameters
from motley_trainer.pruning.surgery import shapes_of, shrink
from torch import Tensor, nn
from transformers import PreTrainedModel

LLAMA_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, 32000)
LLAMA_3_8B = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
TINY_LLAMA = DecoderShape(22, 2048, 5632, 32, 4, 64, 32000)

VOCABULARY = 50
IDS = torch.tensor([[5, 1, 7, 2, 9, 3, 11, 30, 4, 17]])
FAMILIES = ["llama", "llama_biased", "llama_wide_heads", "llama_tied", "mistral", "qwen2", "qwen3"]
KV_HEADS = {"grouped": 2, "one each": 4}


def small(family: str, **overrides: object) -> PreTrainedModel:
    return build_model(family, vocab_size=VOCABULARY, **overrides)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def linear(model: PreTrainedModel, path: str) -> nn.Linear:
    found = model.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def groups_at(model: PreTrainedModel, layer: int, kind: GroupKind) -> LayerGroups:
    return next(groups for groups in groups_of(model) if (groups.layer, groups.kind) == (layer, kind))


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "ratio", "layers", "kept", "wanted"),
    [
        (LLAMA_7B, "0.25", range(4, 30), (24, 8256), 5_422_977_024),
        (LLAMA_3_8B, "0.25", range(4, 30), (6, 10752), 6_612_586_496),
        (TINY_LLAMA, "0.25", range(4, 18), (3, 4224), 945_907_712),
        (LLAMA_7B, "0.60", range(3, 31), (13, 4403), 3_350_188_032),
    ],
)
def test_the_published_totals_follow_from_the_groups_to_the_parameter(
    shape: DecoderShape, ratio: str, layers: range, kept: tuple[int, int], wanted: int
) -> None:
    total = num_parameters(shape)
    for layer in layers:
        groups = layer_groups(shape, layer)
        counts = tuple(kept_count(of_kind, Fraction(ratio)) for of_kind in groups)
        assert counts == kept
        for of_kind, count in zip(groups, counts, strict=True):
            total -= (of_kind.num_groups - count) * of_kind.num_parameters_per_group
    assert total == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_has_as_many_parameters_as_a_model_loses_with_it(family: str) -> None:
    for kind in GroupKind:
        model = small(family)
        groups, before = groups_at(model, 1, kind), count_parameters(model)
        shrink(model, {(1, kind): range(1, groups.num_groups)})
        assert before - count_parameters(model) == groups.num_parameters_per_group


# --- the closed form, traced on transformers' own modelling -----------------------------------------------------------


def touched(model: PreTrainedModel, changed: str, row: int, watched: str) -> set[int]:
    """Return which inputs of a Linear change when one row of another Linear does."""
    seen: list[Tensor] = []
    handle = linear(model, watched).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    logits(model)
    kept = linear(model, changed).weight.data[row].clone()
    linear(model, changed).weight.data[row] += 0.5
    logits(model)
    linear(model, changed).weight.data[row] = kept
    handle.remove()
    return set((seen[0] != seen[1]).any(dim=1).nonzero()[:, 1].tolist())


@pytest.mark.parametrize("kv_heads", KV_HEADS.values(), ids=KV_HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_row_reaches_lies_in_its_own_group(family: str, kv_heads: int) -> None:
    model = small(family, num_key_value_heads=kv_heads)
    for kind in GroupKind:
        groups = groups_at(model, 1, kind)
        *sources, sink = groups.members
        assert sink.side is Side.INPUTS
        for group in (0, groups.num_groups - 1):
            own = set(channels_of_heads([group], sink.channels_per_group))
            reached: set[int] = set()
            for source in sources:
                for row in channels_of_heads([group], source.channels_per_group)[:: groups.head_dim // 2 or 1]:
                    reached |= touched(model, source.path, row, sink.path)
            assert reached == own


# --- removal is zeroing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", KV_HEADS.values(), ids=KV_HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_groups_equals_zeroing_what_reads_them(family: str, kv_heads: int) -> None:
    for kind in GroupKind:
        dense = small(family, num_key_value_heads=kv_heads)
        pruned = small(family, num_key_value_heads=kv_heads)
        kept, sinks = {}, []
        for layer, gone in ((0, 0), (2, 1)):
            groups = groups_at(dense, layer, kind)
            kept[layer, kind] = [group for group in range(groups.num_groups) if group != gone]
            sinks.append((groups.members[-1], gone))
        shrink(pruned, kept)
        for sink, gone in sinks:
            linear(dense, sink.path).weight.data[:, list(channels_of_heads([gone], sink.channels_per_group))] = 0
        torch.testing.assert_close(logits(pruned), logits(dense), rtol=1e-5, atol=1e-5)
        assert (logits(pruned) - logits(small(family, num_key_value_heads=kv_heads))).abs().max() > 0.1


def permute_query_heads(model: PreTrainedModel, order: list[int]) -> None:
    """Reorder the query heads of layer 1, with the columns that read them."""
    q, o = (linear(model, f"model.layers.1.self_attn.{name}_proj") for name in "qo")
    channels = list(channels_of_heads(order, q.out_features // len(order)))
    q.weight.data = q.weight.data[channels]
    o.weight.data = o.weight.data[:, channels]


def test_query_heads_may_be_permuted_within_their_group_and_not_across() -> None:
    whole, within, across = (small("llama") for _ in range(3))
    permute_query_heads(within, [1, 0, 2, 3])
    permute_query_heads(across, [0, 2, 1, 3])
    torch.testing.assert_close(logits(within), logits(whole), rtol=1e-5, atol=1e-5)
    assert (logits(across) - logits(whole)).abs().max() > 0.1


def test_each_key_head_may_be_permuted_where_each_query_head_has_its_own_with_it_alone() -> None:
    whole, alone, together = (small("llama", num_key_value_heads=4) for _ in range(3))
    order = [0, 2, 1, 3]
    permute_query_heads(alone, order)
    permute_query_heads(together, order)
    for name in "kv":
        projection = linear(together, f"model.layers.1.self_attn.{name}_proj")
        projection.weight.data = projection.weight.data[list(channels_of_heads(order, 16))]
    torch.testing.assert_close(logits(together), logits(whole), rtol=1e-5, atol=1e-5)
    assert (logits(alone) - logits(whole)).abs().max() > 0.1


def test_keeping_all_groups_changes_nothing() -> None:
    model, whole = small("llama_biased"), small("llama_biased")
    shrink(model, {(groups.layer, groups.kind): range(groups.num_groups) for groups in groups_of(model)})
    assert torch.equal(logits(model), logits(whole))


def test_a_bias_goes_with_its_rows_and_stays_whole_behind_removed_columns() -> None:
    model, whole = small("llama_biased"), small("llama_biased")
    shrink(model, {(0, GroupKind.FFN): range(3, 96), (0, GroupKind.ATTENTION): [1]})
    up, down, k = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"
    assert torch.equal(linear(model, up).bias, linear(whole, up).bias[3:])
    assert torch.equal(linear(model, k).bias, linear(whole, k).bias[16:])
    assert torch.equal(linear(model, down).bias, linear(whole, down).bias)


def test_shapes_are_told_with_the_query_heads_that_belong_to_the_key_heads() -> None:
    model = small("llama")
    shrink(model, {(1, GroupKind.ATTENTION): [1], (2, GroupKind.FFN): [5, 7]})
    shapes = [(layer.num_heads, layer.num_kv_heads, layer.ffn_size) for layer in shapes_of(model).layers]
    assert shapes == [(4, 2, 96), (2, 1, 96), (4, 2, 2)]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 2], [-1, 0]])
def test_groups_that_cannot_be_kept_are_refused(kept: list[int]) -> None:
    if kept == [0, 2]:
        with pytest.raises(ValueError, match="must ascend below 2"):
            shrink(small("llama"), {(0, GroupKind.ATTENTION): [2]})
        return
    model = small("llama", num_key_value_heads=4)
    with pytest.raises(ValueError, match="must ascend below 4"):
        shrink(model, {(0, GroupKind.ATTENTION): kept})


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "mixtral"])
def test_a_family_without_a_closed_form_is_refused_by_name(family: str) -> None:
    with pytest.raises(UnsupportedBaseError, match=family) as refused:
        groups_of(small(family))
    assert (refused.value.reason, refused.value.field) == ("NOT_PRUNABLE", "model_type")


def test_a_query_head_that_lost_its_key_head_is_no_group() -> None:
    model = small("llama")
    q = linear(model, "model.layers.1.self_attn.q_proj")
    smaller = nn.Linear(64, 48, bias=False)
    smaller.weight.data = q.weight.data[:48]
    model.set_submodule("model.layers.1.self_attn.q_proj", smaller)
    with pytest.raises(UnsuitableBaseError, match=r"layers\.1\.self_attn\.q_proj has 48 outputs") as refused:
        groups_of(model)
    assert refused.value.reason == "NO_CLOSED_FORM"


def test_a_layer_without_one_of_the_linears_is_refused_by_its_path() -> None:
    model = small("llama")
    model.set_submodule("model.layers.2.mlp.up_proj", nn.Identity())
    with pytest.raises(UnsuitableBaseError, match=r"layers\.2\.mlp\.up_proj is not a Linear"):
        groups_of(model)
