"""What a channel is worth: each formula against a slow loop, and the moments against one window at a time."""

from __future__ import annotations

import pytest
import torch
from architectures import build_model
from motley_trainer.pruning.aggregation import Aggregation, aggregate, fold, group_scores
from motley_trainer.pruning.estimation import estimate
from motley_trainer.pruning.gradients import Moments, gather_moments, window_losses
from motley_trainer.pruning.groups import GroupKind, LayerGroups, Member, Side, groups_of
from motley_trainer.pruning.saliency import Criterion, channel_scores, element_saliency
from motley_trainer.pruning.surgery import shrink
from torch import Tensor, nn
from transformers import PreTrainedModel

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
MOMENTS = Moments(torch.tensor([[0.1, -0.2], [0.0, 1.0]]), torch.tensor([[0.04, 0.04], [0.0, 1.0]]))
WINDOWS = torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(3))


def small(family: str = "llama", **overrides: object) -> PreTrainedModel:
    return build_model(family, vocab_size=50, **overrides)


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "outputs", "inputs"),
    [
        (Criterion.PARAM_FIRST, [0.5, 0.0], [0.1, 0.4]),
        (Criterion.VECTOR, [0.3, 0.0], [0.1, 0.4]),
        (Criterion.PARAM_SECOND, [0.2, 0.0], [0.04, 0.16]),
        (Criterion.PARAM_MIX, [0.56, 0.0], [0.08, 0.48]),
        (Criterion.L1, [3.0, 3.0], [4.0, 2.0]),
        (Criterion.L2, [5.0, 9.0], [10.0, 4.0]),
    ],
)
def test_the_worked_example(criterion: Criterion, outputs: list[float], inputs: list[float]) -> None:
    for side, wanted in ((Side.OUTPUTS, outputs), (Side.INPUTS, inputs)):
        scores = channel_scores(criterion, WEIGHT, side, MOMENTS)
        torch.testing.assert_close(scores, torch.tensor(wanted))


def slow_score(criterion: Criterion, weights: list[float], gradients: list[float], fishers: list[float]) -> float:
    triples = list(zip(weights, gradients, fishers, strict=True))
    if criterion is Criterion.VECTOR:
        return abs(sum(w * g for w, g, _ in triples))
    elements = {
        Criterion.PARAM_FIRST: lambda w, g, f: abs(w * g),
        Criterion.PARAM_SECOND: lambda w, g, f: abs(w * f * w),
        Criterion.PARAM_MIX: lambda w, g, f: abs(w * g - 0.5 * w * f * w),
        Criterion.L1: lambda w, g, f: abs(w),
        Criterion.L2: lambda w, g, f: w * w,
    }
    return sum(elements[criterion](*triple) for triple in triples)


@pytest.mark.parametrize("criterion", [criterion for criterion in Criterion if criterion is not Criterion.RANDOM])
def test_a_formula_equals_a_slow_loop(criterion: Criterion) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, gradient = (torch.randn(7, 5, generator=generator) for _ in range(2))
    fisher = torch.rand(7, 5, generator=generator)
    for side, turned in ((Side.OUTPUTS, False), (Side.INPUTS, True)):
        rows = [(matrix.T if turned else matrix).tolist() for matrix in (weight, gradient, fisher)]
        slow = [slow_score(criterion, *of_channel) for of_channel in zip(*rows, strict=True)]
        fast = channel_scores(criterion, weight, side, Moments(gradient, fisher))
        torch.testing.assert_close(fast, torch.tensor(slow))


def test_a_vector_never_scores_above_its_elements() -> None:
    weight, gradient = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(2))
    for side in Side:
        vector = channel_scores(Criterion.VECTOR, weight, side, Moments(gradient))
        assert (vector <= channel_scores(Criterion.PARAM_FIRST, weight, side, Moments(gradient)) + 1e-6).all()


def test_what_was_not_gathered_is_refused_not_guessed() -> None:
    with pytest.raises(ValueError, match="param_mix needs the Fisher diagonal"):
        channel_scores(Criterion.PARAM_MIX, WEIGHT, Side.OUTPUTS, Moments(MOMENTS.gradient))
    with pytest.raises(ValueError, match="vector needs gradients"):
        channel_scores(Criterion.VECTOR, WEIGHT, Side.OUTPUTS)
    with pytest.raises(ValueError, match="random has no score"):
        element_saliency(Criterion.RANDOM, WEIGHT)


# --- moments ----------------------------------------------------------------------------------------------------------


def slow_moments(model: PreTrainedModel, windows: Tensor) -> dict[str, Moments]:
    """Take one backward pass for each window, as the definition says."""
    model.requires_grad_(True)
    each: dict[str, list[Tensor]] = {path: [] for path in linears(model)}
    for window in windows:
        model.zero_grad()
        output = model(input_ids=window[None], labels=window[None], use_cache=False)
        output.loss.backward()
        for path, linear in linears(model).items():
            assert linear.weight.grad is not None
            each[path].append(linear.weight.grad.clone())
    return {path: Moments(torch.stack(own).mean(0), torch.stack(own).square().mean(0)) for path, own in each.items()}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "llama_biased"])
def test_moments_equal_those_of_one_window_at_a_time(family: str, batch_size: int) -> None:
    model = small(family)
    wanted = slow_moments(model, WINDOWS)
    found = gather_moments(
        model, WINDOWS, wanted.keys(), lambda path, moments: moments, with_fisher=True, batch_size=batch_size
    )
    assert found.keys() == wanted.keys()
    for path, moments in found.items():
        assert moments.fisher is not None
        assert wanted[path].fisher is not None
        torch.testing.assert_close(moments.gradient, wanted[path].gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.fisher, wanted[path].fisher, rtol=1e-3, atol=1e-9)
        assert (moments.fisher >= 0).all()


def test_the_fisher_diagonal_is_no_square_of_the_mean() -> None:
    model = small()
    path = "model.layers.1.mlp.up_proj"
    moments = gather_moments(model, WINDOWS, [path], lambda path, moments: moments, with_fisher=True)[path]
    assert moments.fisher is not None
    assert (moments.fisher >= moments.gradient.square() * (1 - 1e-4)).all()  # Jensen
    assert moments.fisher.sum() > 2 * moments.gradient.square().sum()


def test_gathering_leaves_no_gradients_and_no_hooks_behind() -> None:
    model = small()
    path = "model.layers.0.self_attn.q_proj"
    gather_moments(model, WINDOWS, [path], lambda path, moments: None, with_fisher=False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def scale_group(model: PreTrainedModel, groups: LayerGroups, group: int, factor: float) -> None:
    for member in groups.members:
        own_of(member, linears(model)[member.path].weight.data, group).mul_(factor)


def own_of(member: Member, matrix: Tensor, group: int) -> Tensor:
    """Return the part of a weight, or of anything like it, that is one group's."""
    start, size = group * member.channels_per_group, member.channels_per_group
    return matrix.narrow(0 if member.side is Side.OUTPUTS else 1, start, size)


@pytest.mark.parametrize("kind", list(GroupKind))
def test_the_signed_sum_over_a_group_is_the_slope_of_the_loss_as_the_group_fades(kind: GroupKind) -> None:
    model = small()
    groups = next(groups for groups in groups_of(model) if (groups.layer, groups.kind) == (1, kind))
    group, step = groups.num_groups - 1, 0.01
    paths = [member.path for member in groups.members]
    moments = gather_moments(model, WINDOWS, paths, lambda path, moments: moments, with_fisher=False)
    slope = sum(
        float(own_of(member, linears(model)[member.path].weight * moments[member.path].gradient, group).sum())
        for member in groups.members
    )
    scale_group(model, groups, group, 1 + step)
    above = float(window_losses(model, WINDOWS).mean())
    scale_group(model, groups, group, (1 - step) / (1 + step))
    below = float(window_losses(model, WINDOWS).mean())
    assert abs(slope) > 0.01
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.02)


# --- aggregation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "wanted"),
    [
        (Aggregation.SUM, [0.8, 0.7]),
        (Aggregation.MEAN, [0.8 / 3, 0.7 / 3]),
        (Aggregation.PROD, [0.01, 0.0]),
        (Aggregation.MAX, [0.5, 0.4]),
        (Aggregation.FIRST, [0.5, 0.0]),
        (Aggregation.LAST, [0.1, 0.4]),
    ],
)
def test_the_worked_example_of_aggregation(aggregation: Aggregation, wanted: list[float]) -> None:
    members = torch.tensor([[0.5, 0.0], [0.2, 0.3], [0.1, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(aggregate(members, aggregation), torch.tensor(wanted, dtype=torch.float64))


def test_query_heads_are_folded_onto_the_key_head_that_they_read() -> None:
    heads, kv_heads, head_dim = 32, 8, 4
    scores = torch.arange(heads, dtype=torch.float64).repeat_interleave(head_dim)
    wanted = torch.tensor([[4.0 * sum(range(4 * g, 4 * g + 4)) / 4] * head_dim for g in range(kv_heads)])
    torch.testing.assert_close(fold(scores, kv_heads, head_dim), wanted.double())
    misfolded = scores.view(heads // kv_heads, kv_heads * head_dim).sum(0)  # heads g, g + 8, g + 16, g + 24
    assert not torch.equal(misfolded.view(kv_heads, head_dim), wanted.double())


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_a_head_of_which_nothing_matters_scores_lowest_under_every_aggregation(aggregation: Aggregation) -> None:
    model = small(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    groups = next(groups for groups in groups_of(model) if groups.kind is GroupKind.ATTENTION)
    for member in groups.members:
        rows = slice(2 * member.channels_per_group, 3 * member.channels_per_group)
        weight = linears(model)[member.path].weight.data
        weight[rows if member.side is Side.OUTPUTS else (slice(None), rows)] *= 1e-3
    scores = estimate(
        model, {(0, GroupKind.ATTENTION): groups}, WINDOWS, [Criterion.PARAM_FIRST], aggregation, torch.Generator()
    )[Criterion.PARAM_FIRST][0, GroupKind.ATTENTION]
    assert int(scores.argmin()) == 2


def test_products_of_small_scores_do_not_vanish() -> None:
    groups = groups_of(small())[1]
    tiny = torch.full((groups.num_groups,), 1e-15)
    assert (group_scores(groups, [tiny] * 3, Aggregation.PROD) > 0).all()


# --- estimation -------------------------------------------------------------------------------------------------------


def keyed(model: PreTrainedModel) -> dict[tuple[int, GroupKind], LayerGroups]:
    return {(groups.layer, groups.kind): groups for groups in groups_of(model)}


def test_a_second_estimate_counts_no_gradient_of_the_first() -> None:
    """The second order of a gradual pruning's later steps is that of a model which was pruned at once."""
    gradual, at_once = small(), small()
    kept = {(1, GroupKind.FFN): range(10, 96)}
    criteria, none = [Criterion.PARAM_SECOND, Criterion.PARAM_MIX], torch.Generator()
    estimate(gradual, keyed(gradual), WINDOWS, criteria, Aggregation.SUM, none)
    shrink(gradual, kept)
    shrink(at_once, kept)
    second, fresh = (
        estimate(model, keyed(model), WINDOWS, criteria, Aggregation.SUM, none) for model in (gradual, at_once)
    )
    for criterion in criteria:
        for key, scores in fresh[criterion].items():
            torch.testing.assert_close(second[criterion][key], scores, rtol=1e-6, atol=0)


def test_random_scores_follow_the_generator_alone() -> None:
    model = small()

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        scores = estimate(model, keyed(model), WINDOWS[:0], [Criterion.RANDOM], Aggregation.SUM, generator)
        return scores[Criterion.RANDOM][0, GroupKind.FFN]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
