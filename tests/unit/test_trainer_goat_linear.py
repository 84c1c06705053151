"""One Linear with experts: where tokens go, what is added, its gradients, what dropout drops, what is kept for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from motley_adapters.kinds.goat import GoatGeometry
from motley_adapters.kinds.goat_init import SpectrumSlices, slice_spectrum
from motley_kernels.adapter_delta.reference import expert_shares
from motley_kernels.adapter_delta.routing import share_out
from motley_kernels.adapter_delta.types import Gate
from motley_trainer.data.batches import NOT_LEARNED, Batch
from motley_trainer.methods.goat_linear import GoatLinear, Start
from motley_trainer.methods.goat_routing import Routed, balance_loss, choose_experts, count_picks, tokens_of
from torch import Tensor, nn

GEOMETRY = GoatGeometry(experts=4, top_k=2, rank=8, rho=10.0, segments="head")
OUT, IN = 24, 40
SCALE = 7.5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sliced(weight: Tensor, geometry: GoatGeometry, scale: float, router: Tensor) -> tuple[SpectrumSlices, Start]:
    slices = slice_spectrum(weight, geometry)
    return slices, Start(*slices.initial_factors(scale, geometry.rho), router, *slices.residual_factors)


def made(
    geometry: GoatGeometry = GEOMETRY, *, router: Tensor | None = None, dtype: torch.dtype = torch.float32, **more: Any
) -> GoatLinear:
    """Return a Linear as training begins with it."""
    base = nn.Linear(IN, OUT).requires_grad_(False)
    base.weight.data, base.bias.data = drawn(OUT, IN, seed=1).to(dtype), drawn(OUT, seed=2).to(dtype)
    router = drawn(geometry.experts, IN, seed=3) if router is None else router
    _, start = sliced(base.weight, geometry, SCALE, router)
    scaling = geometry.residual_scaling
    return GoatLinear(base.eval(), start, top_k=geometry.top_k, scale=SCALE, residual_scaling=scaling, **more)


def moved(goat: GoatLinear) -> GoatLinear:
    """Move every factor away from what it began with, as training does."""
    with torch.no_grad():
        for place, parameter in enumerate((goat.goat_a, goat.goat_b, goat.router)):
            parameter += drawn(*parameter.shape, seed=10 + place) * 0.2
    return goat


def shares_of(router: Tensor, x: Tensor, top_k: int = 2) -> Tensor:
    return torch.stack([expert_shares(Gate(router.detach(), top_k), row) for row in x])


# --- Where tokens go


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_shares_are_those_of_the_kernels_and_of_the_paper(top_k: int) -> None:
    logits = drawn(50, 8)
    chosen, kept = choose_experts(logits, top_k)
    shares = torch.zeros(50, 8).scatter(1, chosen, kept)
    likely, largest = logits.softmax(1).topk(top_k)
    wanted = torch.zeros(50, 8).scatter(1, largest, likely / likely.sum(1, keepdim=True))
    torch.testing.assert_close(shares, wanted, rtol=1e-5, atol=1e-6)
    served = torch.empty(50, 8)
    share_out(logits.clone(), torch.arange(8) >= top_k, served)
    assert torch.equal(shares, served)
    assert bool(((shares > 0).sum(1) == top_k).all())


def test_equal_logits_go_to_the_lower_index_as_in_the_kernels() -> None:
    logits = torch.tensor([[1.0, 2, 2, 1, 2], [0, 0, 0, 0, 0], [3, 1, 3, 3, 3]])
    chosen, kept = choose_experts(logits, 2)
    assert chosen.tolist() == [[1, 2], [0, 1], [0, 2]]
    assert kept.tolist() == [[0.5, 0.5]] * 3
    for row, experts in zip(logits, chosen, strict=True):
        served = expert_shares(Gate(row[:, None].clone(), 2), torch.ones(1))
        assert served.nonzero()[:, 0].tolist() == sorted(experts.tolist())


def test_shares_average_to_one_over_the_experts_under_a_symmetric_router() -> None:
    chosen, kept = choose_experts(drawn(4000, 4, seed=5), 2)
    shares = torch.zeros(4000, 4).scatter(1, chosen, kept)
    assert bool(((shares.mean(0) - 0.25).abs() < 3 * shares.std(0) / math.sqrt(4000)).all())


# --- What is added


def test_the_first_output_is_the_base_and_the_closed_form_of_its_deviation() -> None:
    goat, x = made(), drawn(6, IN, seed=4)
    slices, _ = sliced(goat.base.weight, GEOMETRY, SCALE, goat.router)
    deviation = goat(x) - goat.base(x)
    assert deviation.abs().max() > 0.1  # not equal to the base
    wanted = slices.initial_deviation(shares_of(goat.router, x), x, GEOMETRY.rho)
    torch.testing.assert_close(deviation.detach(), wanted, rtol=1e-5, atol=1e-5)


def test_the_first_output_is_the_base_where_all_shares_are_equal() -> None:
    everyone = GoatGeometry(experts=4, top_k=4, rank=8, rho=10.0, segments="head")
    goat, x = made(everyone, router=torch.zeros(4, IN)), drawn(6, IN, seed=4)
    torch.testing.assert_close(goat(x), goat.base(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@torch.no_grad()
def test_the_edited_base_of_the_paper_and_the_original_with_a_residual_agree(
    dtype: torch.dtype, tolerance: float
) -> None:
    goat, x = moved(made(dtype=dtype)), drawn(6, IN, seed=7).to(dtype)
    _, start = sliced(goat.base.weight, GEOMETRY, SCALE, goat.router)
    wide = x.float()
    edited = goat.base.weight.float() - SCALE / 4 * start.b @ start.a
    experts = [wide @ (goat.goat_b[:, 2 * e : 2 * e + 2] @ goat.goat_a[2 * e : 2 * e + 2]).T for e in range(4)]
    routed = torch.einsum("te,eto->to", shares_of(goat.router, wide), torch.stack(experts))
    wanted = wide @ edited.T + goat.base.bias.float() + SCALE * routed
    found = goat(x)
    assert found.dtype == dtype
    assert float((found.float() - wanted).norm() / wanted.norm()) < tolerance


def test_the_example_by_hand() -> None:
    """diag(8, 4, 2, 1), two experts of rank 1; x = (1, 1, 1, 1) to the first, then to both evenly."""
    base = nn.Linear(4, 4, bias=False).requires_grad_(False)
    base.weight.data = torch.diag(torch.tensor([8.0, 4, 2, 1]))
    x = torch.ones(1, 4)
    for top_k, router, wanted in (
        (1, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), [8.4, 4, 1.9, 1]),
        (2, torch.zeros(2, 4), [8.0, 4, 2, 1]),
    ):
        geometry = GoatGeometry(experts=2, top_k=top_k, rank=2, rho=10.0, segments="head")
        scale = geometry.theoretical_scale(4, 1.0, "expert")
        assert scale == pytest.approx(3.4641, abs=1e-4)
        _, start = sliced(base.weight, geometry, scale, router)
        goat = GoatLinear(base, start, top_k=top_k, scale=scale, residual_scaling=geometry.residual_scaling)
        assert goat.goat_b[:, 0].abs().tolist() == pytest.approx([0.48056, 0, 0, 0], abs=1e-5)
        assert goat(x)[0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_disabled_one_is_the_base_alone() -> None:
    goat, x = moved(made()), drawn(6, IN, seed=4)
    goat.is_enabled = False
    assert torch.equal(goat(x), goat.base(x))


# --- Gradients


def defined(goat: GoatLinear, x: Tensor, stays: Tensor | None) -> Tensor:
    """Return what a Linear and its experts give, expert by expert, by autograd alone."""
    logits = x @ goat.router.T
    likely, chosen = logits.softmax(1).topk(goat.top_k)
    kept = likely / likely.sum(1, keepdim=True)
    total = goat.base(x) + GEOMETRY.residual_scaling * x @ goat.residual_a.T @ goat.residual_b.T
    for token in range(len(x)):
        for place, expert in enumerate(chosen[token].tolist()):
            seen = x[token] if stays is None else x[token] * stays[place, token] / (1 - goat.dropout)
            rows = slice(2 * expert, 2 * expert + 2)
            product = goat.goat_b[:, rows] @ (goat.goat_a[rows] @ seen)
            total = total.index_add(0, torch.tensor([token]), (SCALE * kept[token, place] * product)[None])
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_in_training_are_those_that_autograd_finds(dropout: float) -> None:
    goat = moved(made(dropout=dropout, drops=torch.Generator().manual_seed(1))).train()
    x, weights = drawn(7, IN, seed=8).requires_grad_(), drawn(7, OUT, seed=9)
    learned = (x, goat.goat_a, goat.goat_b, goat.router)
    y = goat(x.view(1, 7, IN))[0]
    found = torch.autograd.grad((y * weights).sum(), learned)
    stays = torch.rand(2, 7, IN, generator=torch.Generator().manual_seed(1)) >= dropout if dropout else None
    wanted = defined(goat, x, stays)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(found, torch.autograd.grad((wanted * weights).sum(), learned), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_dropout_drops_for_each_expert_on_its_own_and_keeps_the_mean() -> None:
    goat = moved(made(router=torch.zeros(4, IN), dropout=0.25, drops=torch.Generator().manual_seed(1))).train()
    with torch.no_grad():
        goat.router.zero_()  # every token to the first two experts, evenly
        goat.goat_a.copy_(torch.ones(8, IN))
        x = torch.ones(3000, IN)
        whole = goat.eval()(x[:1])
        dropped = goat.train()(x)
        torch.testing.assert_close(dropped.mean(0, keepdim=True), whole, rtol=0.05, atol=0.5)
        goat.goat_b.zero_()
        goat.goat_b[0, 0] = goat.goat_b[1, 2] = 1.0  # the first two outputs see one expert each
        first, second = (goat(x) - goat.base(x)).T[:2]
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert float(first.std()) > 0.1
    assert abs(float(correlation)) < 0.1


def test_the_backward_pass_keeps_the_inputs_that_it_was_given_and_no_copy() -> None:
    x = drawn(9, IN).to(torch.bfloat16).requires_grad_()
    goats = [made(dtype=torch.bfloat16).train() for _ in range(2)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        for goat in goats:
            assert goat(x).dtype == torch.bfloat16
    wide = {tensor.data_ptr() for tensor in kept if 9 in tensor.shape and IN in tensor.shape}
    assert wide == {x.data_ptr()}
    assert not any(9 in tensor.shape and OUT in tensor.shape for tensor in kept)


# --- What evens it out

EVERY = torch.ones(4, dtype=torch.bool)


def logits_of(likely: list[float], num_tokens: int = 4) -> Tensor:
    return torch.tensor([likely] * num_tokens).log()


@pytest.mark.parametrize(
    ("likely", "top_k", "counts", "wanted"),
    [
        ([0.7, 0.3], 1, [3, 1], 1.2),
        ([0.4, 0.3, 0.2, 0.1], 2, [3, 3, 1, 1], 1.2),
        ([0.25, 0.25, 0.25, 0.25], 2, [2, 2, 2, 2], 1.0),
        ([0.97, 0.01, 0.01, 0.01], 1, [4, 0, 0, 0], 3.88),
    ],
)
def test_the_balance_loss_by_hand(likely: list[float], top_k: int, counts: list[int], wanted: float) -> None:
    """The released code has E sum (c / T) P, which is top_k times the paper's."""
    logits, picks = logits_of(likely), torch.tensor(counts)
    loss = balance_loss(Routed(logits, torch.zeros(4, top_k, dtype=torch.long)), picks, EVERY)
    assert float(loss) == pytest.approx(wanted, abs=1e-5)
    of_code = len(likely) * sum(count / 4 * part for count, part in zip(counts, likely, strict=True))
    assert of_code == pytest.approx(top_k * wanted, abs=1e-5)


def test_the_balance_loss_has_a_gradient_through_the_likelihoods_alone() -> None:
    logits = drawn(12, 4).requires_grad_()
    chosen, _ = choose_experts(logits, 2)
    is_token = torch.arange(12) < 9
    picks = count_picks(chosen, 4, is_token)
    (found,) = torch.autograd.grad(balance_loss(Routed(logits, chosen), picks, is_token), logits)
    often = 4 * picks / (2 * 9)
    (wanted,) = torch.autograd.grad((often * logits[:9].softmax(1).mean(0)).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert not found[9:].any()
    assert found[:9].any()


def test_padding_is_neither_counted_nor_balanced() -> None:
    logits = drawn(6, 4)
    chosen, _ = choose_experts(logits, 2)
    is_token = torch.tensor([True, True, False, True, False, False])
    picks = count_picks(chosen, 4, is_token)
    assert picks.tolist() == torch.bincount(chosen[is_token].flatten(), minlength=4).tolist()
    alone = Routed(logits[is_token], chosen[is_token])
    wanted = balance_loss(alone, picks, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(balance_loss(Routed(logits, chosen), picks, is_token), wanted)


def test_rows_are_told_from_padding_at_lm_head_too() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[NOT_LEARNED, NOT_LEARNED, 5, 6], [NOT_LEARNED, 7, NOT_LEARNED, NOT_LEARNED]])
    batch = Batch(torch.zeros_like(mask), mask, labels)
    assert tokens_of(batch, 8).tolist() == [True, True, True, True, True, True, False, False]
    assert batch.predicting.tolist() == [0, 1, 2]
    assert tokens_of(batch, 6).tolist() == [True, True, True, True, True, False]
