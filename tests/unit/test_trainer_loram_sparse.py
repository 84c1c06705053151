"""Single weights at zero: as many as the rule says, the others moved as the definition has them, layer after layer."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from architectures import build_model
from hypothesis import given
from hypothesis import strategies as st
from motley_trainer.errors import UnsuitableBaseError
from motley_trainer.pruning.masks import MaskRule, PatternMask, ShareMask
from motley_trainer.pruning.sparse_gpt import DAMPING, prune_weight, sparsify
from small_trainings import SPEC, SmallTraining
from torch import Tensor
from transformers import PreTrainedModel

WINDOWS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(3))
HALF = ShareMask(Fraction(1, 2))
TWO_OF_FOUR = PatternMask(2, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: Tensor) -> Tensor:
    return 2 / len(x) * (x.T @ x)


# --- Masks


@given(st.fractions(min_value=0, max_value=1).filter(lambda ratio: ratio < 1), st.integers(1, 5), st.integers(1, 9))
def test_a_share_takes_the_lowest_and_exactly_so_many(ratio: Fraction, rows: int, columns: int) -> None:
    scores = random(rows, columns).abs()
    goes = ShareMask(ratio).goes(scores)
    assert int(goes.sum()) == math.floor(ratio * rows * columns)
    if goes.any():
        assert scores[goes].max() <= scores[~goes].min()


def test_equal_scores_go_by_place() -> None:
    assert HALF.goes(torch.ones(2, 3)).tolist() == [[True] * 3, [False] * 3]
    assert TWO_OF_FOUR.goes(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


def test_a_pattern_takes_the_lowest_of_each_row() -> None:
    scores = torch.tensor([[4.0, 1, 3, 2], [1, 9, 8, 7]])
    assert TWO_OF_FOUR.goes(scores).tolist() == [[False, True, False, True], [True, False, False, True]]


# --- One weight


def test_two_columns_by_hand() -> None:
    """Of H = [[2, 1], [1, 2]], damped by 0.02, column 0 costs 1 / 0.656 and column 1 costs 1 / 0.495."""
    weight = torch.tensor([[1.0, 1.0]])
    prune_weight(weight, torch.tensor([[2.0, 1], [1, 2]]), PatternMask(1, 2))
    assert weight.tolist() == [[0.0, pytest.approx(1 + 1 / 2.02)]]


def by_definition(weight: Tensor, hessian: Tensor, rule: MaskRule, block_size: int) -> Tensor:
    """Prune column after column, each time with the inverse of the Hessian of the columns that are left."""
    w, h = weight.double(), hessian.double().clone()
    dead = h.diagonal() == 0
    w[:, dead], h[dead, dead] = 0, 1
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h))
    inverses = [torch.linalg.inv(h[i:, i:]) for i in range(len(h))]
    goes = torch.zeros_like(w, dtype=torch.bool)
    for i, inverse in enumerate(inverses):
        width = rule.num_columns or block_size
        if i % width == 0:
            columns = range(i, min(i + width, len(h)))
            costs = torch.stack([inverses[j][0, 0] for j in columns])
            goes[:, list(columns)] = rule.goes(w[:, list(columns)] ** 2 / costs)
        error = w[:, i].masked_fill(~goes[:, i], 0) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
        w[:, i].masked_fill_(goes[:, i], 0)
    return w


@pytest.mark.parametrize("rule", [HALF, TWO_OF_FOUR, PatternMask(4, 8)], ids=str)
@pytest.mark.parametrize("block_size", [8, 128])
def test_a_weight_is_pruned_as_the_definition_says(rule: MaskRule, block_size: int) -> None:
    weight, x = random(5, 24), random(40, 24, seed=1) @ random(24, 24, seed=2)
    x[:, 7] = 0
    wanted = by_definition(weight, hessian_of(x), rule, min(block_size, 24))
    found, given_weight = weight.clone(), weight.clone()
    prune_weight(found, hessian_of(x), rule, block_size=block_size)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(found == 0, wanted == 0)
    assert torch.equal(weight, given_weight)
    assert not found[:, 7].any(), "an input that is never other than zero needs no weight"
    assert int((found == 0).sum()) >= 60
    kept = found != 0
    assert not torch.equal(found[kept], weight[kept]), "what stays is moved"


def test_what_stays_makes_up_for_what_goes() -> None:
    weight, x = random(6, 32), random(64, 32, seed=1) @ random(32, 32, seed=2)
    pruned = weight.clone()
    prune_weight(pruned, hessian_of(x), HALF)
    masked = weight.masked_fill(pruned == 0, 0)
    assert (x @ (pruned - weight).T).norm() < 0.7 * (x @ (masked - weight).T).norm()


def test_what_cannot_be_computed_with_is_refused_by_name() -> None:
    for value in (math.nan, math.inf):
        hessian = torch.eye(4)
        hessian[1, 1] = value
        with pytest.raises(UnsuitableBaseError) as caught:
            prune_weight(random(2, 4), hessian, HALF, path="model.layers.0.mlp.up_proj")
        assert (caught.value.reason, caught.value.field) == ("NOT_FINITE", "model.layers.0.mlp.up_proj")


# --- Whole models


def model(**config: object) -> PreTrainedModel:
    return build_model("llama", vocab_size=50, **config)


def linears(of: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight for name, weight in of.state_dict().items() if "_proj" in name}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])  # the last two with windows of attention
def test_each_layer_sees_what_the_pruned_ones_before_it_give(architecture: str) -> None:
    together = build_model(architecture, vocab_size=50)
    one_by_one = build_model(architecture, vocab_size=50)
    sparsify(together, WINDOWS, range(3), HALF)
    for layer in range(3):
        sparsify(one_by_one, WINDOWS, range(layer, layer + 1), HALF)
    for name, weight in linears(together).items():
        torch.testing.assert_close(weight, linears(one_by_one)[name], rtol=1e-4, atol=1e-5)
    alone = build_model(architecture, vocab_size=50)
    sparsify(alone, WINDOWS, range(2, 3), HALF)
    name = "model.layers.2.mlp.up_proj.weight"
    assert (linears(alone)[name] - linears(together)[name]).abs().max() > 0.01


def test_every_linear_of_the_layers_keeps_its_pattern_and_all_else_its_bits() -> None:
    pruned, whole = model(), model()
    told: list[None] = []
    found = sparsify(pruned, WINDOWS, range(1, 3), PatternMask(4, 8), lambda: told.append(None))
    before = whole.state_dict()
    num_zeros = 0
    for name, weight in pruned.state_dict().items():
        assert weight.shape == before[name].shape
        if "_proj" in name and ".layers.0." not in name:
            zeros = (weight.view(len(weight), -1, 8) == 0).sum(2)
            assert bool((zeros == 4).all()), name
            num_zeros += int(zeros.sum())
        else:
            assert torch.equal(weight, before[name]), name
    assert (found.num_zeros, found.num_weights, len(told)) == (num_zeros, 2 * num_zeros, 2)


def test_windows_in_several_batches_count_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = model(), model()
    sparsify(whole, WINDOWS, range(1), HALF)
    monkeypatch.setattr("motley_trainer.pruning.sparse_gpt.BATCH_SIZE", 3)
    sparsify(parts, WINDOWS, range(1), HALF)
    for name, weight in linears(whole).items():
        torch.testing.assert_close(weight, linears(parts)[name], rtol=1e-3, atol=1e-4)


def test_the_mask_stays_while_factors_learn(tmp_path: Path) -> None:
    training = SmallTraining(replace(SPEC, steps=3))
    sparsify(training.model, WINDOWS, range(3), TWO_OF_FOUR)
    before = {name: weight.clone() for name, weight in linears(training.model).items()}
    training.train(tmp_path)
    weights = {name.replace(".base.", "."): weight for name, weight in linears(training.model).items()}
    assert all(torch.equal(weights[name], weight) for name, weight in before.items())
    assert all(bool(factor.any()) for factor in training.attached.parameters.values())
