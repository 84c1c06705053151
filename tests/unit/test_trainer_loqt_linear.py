"""LoQT's Linear: what it holds, along which side, what its merges keep, and what its gradients are."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from motley_trainer.errors import DivergedError
from motley_trainer.methods.held_weight import PlainWeight, holding
from motley_trainer.methods.loqt_compensation import Compensated, compensated, product_of
from motley_trainer.methods.loqt_linear import LoqtLinear, Renewing
from motley_trainer.methods.loqt_projection import Side, directions, side_of
from motley_trainer.spec.settings import LoqtDecomposition
from torch import Tensor, nn

SVD, EIGH = LoqtDecomposition
NF4 = holding("nf4")
PLAIN = holding("none")
DECAY = 0.974  # of a gradient's channels, where the errors below were measured
SHAPES = [(96, 64), (64, 64), (64, 96)]  # outputs, inputs


def drawn(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def orthonormal(rank: int, size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(drawn(size, rank, seed=seed))[0].T.contiguous()


def make(shape: tuple[int, int], quantization: str = "none", *, bias: bool = False, **more: Any) -> LoqtLinear:
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(drawn(*shape, seed=3, spread=0.05))
    settings: dict[str, Any] = {"rank": 8, "scale": 0.5, "compensation_steps": 5, "decomposition": SVD, **more}
    return LoqtLinear(linear, "a.path", Renewing(holding=holding(quantization), **settings))


# --- NF4


@pytest.mark.parametrize("shape", [(64, 64), (3, 33), (7, 5), (1, 1), (40, 100)])
def test_what_is_quantized_stays_itself_and_takes_four_bits(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    once = NF4.hold(weight)
    codes = once.tensors()["codes"]
    assert (codes.dtype, codes.numel()) == (torch.uint8, -(-weight.numel() // 2))
    expanded = once.expanded(torch.float32)
    assert expanded.shape == weight.shape
    largest = weight.flatten().abs()[:64].max()
    assert float((expanded - weight).flatten()[:64].abs().max()) < 0.16 * float(
        largest
    )  # half the widest gap of the 16
    again = NF4.hold(expanded)
    assert torch.equal(codes, again.tensors()["codes"])


def test_codes_stand_for_the_sixteen_values_of_nf4() -> None:
    values = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0, 0.0795803, 0.1609302,
              0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]  # fmt: skip
    weight = torch.tensor(values).repeat(4)[None]
    held = NF4.hold(weight)
    torch.testing.assert_close(held.expanded(torch.float32), weight, rtol=0, atol=1e-5)
    assert held.tensors()["codes"][:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


def test_normal_numbers_lose_nine_hundredths() -> None:
    weight = drawn(256, 256, spread=0.02)
    lost = (NF4.hold(weight).expanded(torch.float32) - weight).norm() / weight.norm()
    assert float(lost) == pytest.approx(0.092, abs=0.003)


def test_two_weights_share_the_tables() -> None:
    weight = drawn(128, 128)
    sizes = {name: tensor.nbytes for name, tensor in NF4.hold(weight).tensors().items()}
    assert sizes == {"codes": 8192, "scales": 256, "scales_of_scales": 4, "offset": 4}


def test_a_weight_is_found_again_in_its_tensors() -> None:
    for way in (NF4, PLAIN):
        held = way.hold(drawn(9, 7))
        found = way.find(held.tensors(), torch.Size((9, 7)))
        assert torch.equal(found.expanded(torch.float32), held.expanded(torch.float32))


# --- The side, and the directions


def test_the_frozen_factor_lies_on_the_smaller_side_and_of_equal_ones_on_the_inputs() -> None:
    assert [side_of(*sides) for sides in ((64, 96), (64, 64), (96, 64))] == [Side.INPUT, Side.INPUT, Side.OUTPUT]
    for outputs, inputs in SHAPES:
        linear = make((outputs, inputs))
        linear.renew(drawn(outputs, inputs))
        assert linear.frozen is not None
        factors = linear.factors(torch.float32)
        assert factors is not None
        assert [tuple(factor.shape) for factor in factors] == [(8, inputs), (outputs, 8)]
        assert linear.factor.numel() == 8 * max(outputs, inputs)
        assert linear.frozen.expanded(torch.float32).numel() == 8 * min(outputs, inputs)


@pytest.mark.parametrize("decomposition", LoqtDecomposition)
@pytest.mark.parametrize("shape", SHAPES)
def test_directions_are_orthonormal_and_catch_the_most_of_a_gradient(
    shape: tuple[int, int], decomposition: LoqtDecomposition
) -> None:
    gradient, side = drawn(*shape, seed=5), side_of(shape[1], shape[0])
    found = directions(gradient, 8, side, decomposition)
    rows = found if side is Side.INPUT else found.T
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-5)
    seen = gradient @ rows.T if side is Side.INPUT else rows @ gradient
    best = torch.linalg.svdvals(gradient)[:8]
    assert float(seen.norm()) == pytest.approx(float(best.norm()), rel=1e-5)
    others = orthonormal(8, min(shape))
    by_chance = gradient @ others.T if side is Side.INPUT else others @ gradient
    assert float(by_chance.norm()) < 0.8 * float(seen.norm())
    # The largest first, whichever way they were found.
    lengths = seen.norm(dim=0 if side is Side.INPUT else 1)
    torch.testing.assert_close(lengths, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_find_one_subspace(shape: tuple[int, int]) -> None:
    gradient, side = drawn(*shape, seed=6) * 1e-22, side_of(shape[1], shape[0])  # whose squares vanish in float32
    spans = []
    for decomposition in LoqtDecomposition:
        found = directions(gradient, 8, side, decomposition)
        rows = found if side is Side.INPUT else found.T
        spans.append(rows.T @ rows)
    torch.testing.assert_close(spans[0], spans[1], rtol=0, atol=1e-4)


# --- What makes up for quantizing


def ratios(done: Compensated) -> list[float]:
    return [error / done.errors[0] for error in done.errors[1:]]


def make_up(steps: int, shape: tuple[int, int] = (256, 256), *, decay: float = DECAY, rank: int = 64) -> Compensated:
    side = side_of(shape[1], shape[0])
    kept = NF4.hold(directions(decaying(shape, side, decay), rank, side, SVD)).expanded(torch.float32)
    weight = drawn(*shape, seed=1, spread=0.02)
    return compensated(weight, kept, side, scale=0.5, steps=steps, hold=NF4.hold, dtype=torch.float32)


def decaying(shape: tuple[int, int], side: Side, decay: float) -> Tensor:
    """Make a gradient whose channels on a side are the smaller the later, as of inputs some of which hardly count."""
    sizes = decay ** torch.arange(min(shape))
    return drawn(*shape, seed=2) * (sizes if side is Side.INPUT else sizes[:, None])


@pytest.mark.parametrize("shape", [(256, 256), (256, 512), (512, 256)])
def test_a_quarter_of_the_rank_takes_up_what_theory_says_and_more_rounds_take_up_more(shape: tuple[int, int]) -> None:
    found = ratios(make_up(5, shape))
    assert found[0] == pytest.approx(0.867, abs=0.003)  # the root of 1 - 64/256 is 0.866
    assert found[4] == pytest.approx(0.858, abs=0.005 if shape[0] > shape[1] else 0.003)
    assert found == sorted(found, reverse=True)


def test_where_no_channel_stands_out_rounds_take_up_much_more() -> None:
    """Then every weight is moved a little, and the nearest codes are others."""
    found = ratios(make_up(5, decay=1.0))
    assert found[0] == pytest.approx(0.867, abs=0.003)
    assert found[4] == pytest.approx(0.73, abs=0.01)
    assert found == sorted(found, reverse=True)


def test_the_loop_as_the_paper_has_it_undoes_every_second_round() -> None:
    """The guard of those two: with the corrected weight's residual the error swings, and both would fail."""
    weight = drawn(256, 256, seed=1, spread=0.02)
    kept = NF4.hold(directions(decaying((256, 256), Side.INPUT, DECAY), 64, Side.INPUT, SVD)).expanded(torch.float32)
    inverse = torch.linalg.pinv(kept) / 0.5
    corrected, errors = weight, []
    first = (weight - NF4.hold(weight).expanded(torch.float32)).norm()
    for _ in range(4):
        held = NF4.hold(corrected).expanded(torch.float32)
        factor = (corrected - held) @ inverse
        taken_up = 0.5 * factor @ kept
        errors.append(float((weight - held - taken_up).norm() / first))
        corrected = weight - taken_up
    assert errors == pytest.approx([0.867, 0.994, 0.866, 0.991], abs=0.003)
    assert errors != sorted(errors, reverse=True)


def test_the_best_round_is_kept_and_none_leaves_the_factor_at_zero() -> None:
    for steps in (0, 1, 3):
        done = make_up(steps)
        weight = drawn(256, 256, seed=1, spread=0.02)
        gradient = decaying((256, 256), Side.INPUT, DECAY)
        kept = NF4.hold(directions(gradient, 64, Side.INPUT, SVD)).expanded(torch.float32)
        lacks = weight - done.held.expanded(torch.float32) - 0.5 * product_of(done.factor, kept, Side.INPUT)
        assert float(lacks.norm()) == pytest.approx(min(done.errors), rel=1e-5)
        assert bool(done.factor.any()) == (steps > 0)
        assert len(done.errors) == steps + 1


def test_a_round_that_is_worse_than_the_one_before_is_not_kept() -> None:
    """With a quantizer that is worse each time, the first round stays."""
    calls = []

    def hold(weight: Tensor) -> PlainWeight:
        calls.append(weight)
        return PlainWeight(weight + 0.01 * len(calls) * drawn(32, 32, seed=len(calls)))

    frozen = orthonormal(8, 32)
    weight = drawn(32, 32, seed=9)
    done = compensated(weight, frozen, Side.INPUT, scale=1.0, steps=4, hold=hold, dtype=torch.float32)
    assert min(done.errors) == done.errors[1]
    lacks = weight - done.held.expanded(torch.float32) - done.factor @ frozen
    assert float(lacks.norm()) == pytest.approx(done.errors[1], rel=1e-5)


# --- The module


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_weight_that_is_meant(shape: tuple[int, int], quantization: str) -> None:
    linear = make(shape, quantization, bias=True)
    linear.renew(drawn(*shape, seed=4))
    with torch.no_grad():
        linear.factor.add_(drawn(*linear.factor.shape, seed=8, spread=0.1))
    x, of_y = drawn(2, 5, shape[1], seed=6).requires_grad_(), drawn(2, 5, shape[0], seed=7)
    y = linear(x)
    y.backward(of_y)
    factors = linear.factors(torch.float32)
    assert factors is not None
    a, b = (factor.clone().requires_grad_() for factor in factors)
    plain, bias = x.detach().clone().requires_grad_(), linear.bias.detach().clone().requires_grad_()
    held = linear.held.expanded(torch.float32)
    wanted = plain @ (held + 0.5 * b @ a).T + bias
    wanted.backward(of_y)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(linear.bias.grad, bias.grad)
    torch.testing.assert_close(
        linear.factor.grad, b.grad if linear.side is Side.INPUT else a.grad, rtol=1e-5, atol=1e-5
    )
    # The identity that projected gradients go by: dL/dB = scale * G A^T, and likewise on the other side.
    of_weight = of_y.flatten(0, 1).T @ plain.detach().flatten(0, 1)
    identity = 0.5 * (of_weight @ a.T if linear.side is Side.INPUT else b.T @ of_weight)
    torch.testing.assert_close(linear.factor.grad, identity.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_while_it_captures_the_whole_weights_gradient_is_handed_over_and_the_factor_gets_none(
    shape: tuple[int, int],
) -> None:
    linear = make(shape, "nf4")
    linear.renew(drawn(*shape))
    given: list[Tensor] = []
    linear.captures = lambda one, gradient: given.append(gradient)
    x, of_y = drawn(3, 4, shape[1], seed=1).requires_grad_(), drawn(3, 4, shape[0], seed=2)
    linear(x).backward(of_y)
    (gradient,) = given
    torch.testing.assert_close(gradient, of_y.flatten(0, 1).T @ x.detach().flatten(0, 1))
    assert linear.factor.grad is None
    torch.testing.assert_close(x.grad, of_y @ linear.merged())
    with torch.no_grad():  # what is measured meanwhile is no other
        torch.testing.assert_close(linear(x), x @ linear.merged().T)
    assert len(given) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_merge_keeps_the_outputs_and_without_quantizing_every_bit_that_counts(shape: tuple[int, int]) -> None:
    x = drawn(20, shape[1], seed=2)
    for quantization in ("none", "nf4"):
        linear = make(shape, quantization)
        linear.renew(drawn(*shape, seed=4))
        with torch.no_grad():
            linear.factor.add_(drawn(*linear.factor.shape, seed=8, spread=0.02))
        weight, before = linear.merged(), linear(x).detach()
        factor = linear.factor.detach().clone()
        linear.renew(drawn(*shape, seed=5))
        after, lost = linear(x).detach(), weight - linear.merged()
        if quantization == "none":
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
            assert not linear.factor.any()
        else:
            torch.testing.assert_close(before - after, x @ lost.T, rtol=1e-4, atol=1e-4)
            plain = (NF4.hold(weight).expanded(torch.float32) - weight).norm()
            assert 0 < float(lost.norm()) < float(plain)
            assert not torch.equal(factor, linear.factor)


def test_without_quantizing_a_bfloat16_weight_keeps_merges_of_small_changes() -> None:
    """Each far less than the last bit of a weight: rounded to the weight's type at each merge, all would be lost."""
    linear = nn.Linear(64, 64, bias=False)
    nn.init.constant_(linear.weight, 1.0)
    renewing = Renewing(8, 0.5, 0, SVD, PLAIN)
    held = LoqtLinear(linear.bfloat16(), "a.path", renewing)
    wanted = torch.ones(64, 64)
    held.renew(drawn(64, 64))
    for merge in range(20):
        with torch.no_grad():
            held.factor.fill_(1e-3)
        assert held.frozen is not None
        wanted += 0.5 * held.factor.detach().float() @ held.frozen.expanded(torch.float32)
        held.renew(drawn(64, 64, seed=merge + 1))
        assert not held.factor.any()
    assert float((wanted - 1).abs().max()) > 1e-3
    torch.testing.assert_close(held.held.expanded(torch.float32), wanted, rtol=0, atol=1e-5)
    assert held(drawn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_a_merge_of_nothing_changes_nothing() -> None:
    linear = make((96, 64), "none")
    before = linear.weight.clone()
    linear.renew(drawn(96, 64))
    linear.renew(drawn(96, 64, seed=1))
    assert torch.equal(linear.weight, before)


def test_the_first_time_quantizing_is_made_up_for_as_well() -> None:
    """The weight comes whole: were it quantized before its first gradient, there would be nothing left to take up."""
    weight = drawn(96, 64, seed=3, spread=0.05)  # as `make` has it
    lost = {}
    for steps in (0, 5):
        linear = make((96, 64), "nf4", compensation_steps=steps, rank=16)
        linear.renew(drawn(96, 64))
        lost[steps] = float((linear.merged() - weight).norm())
    assert lost[5] < 0.9 * lost[0]


def test_a_gradient_is_let_go_before_the_weight_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make((96, 64), "nf4")
    linear.renew(drawn(96, 64))
    alive: list[weakref.ref[Tensor]] = []
    real, seen = LoqtLinear.merged, []

    def merged(one: LoqtLinear) -> Tensor:
        seen.append(alive[0]() is None)
        return real(one)

    def capture(one: LoqtLinear, gradient: Tensor) -> None:
        alive.append(weakref.ref(gradient))
        passed = [gradient]
        del gradient
        LoqtLinear.renew(one, passed.pop())

    monkeypatch.setattr(LoqtLinear, "merged", merged)
    linear.captures = capture
    linear(drawn(3, 64).requires_grad_()).sum().backward()
    assert seen == [True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_refused_by_the_linears_name_and_changes_nothing(value: float) -> None:
    linear = make((96, 64), "nf4")
    linear.renew(drawn(96, 64))
    before, gradient = linear.merged(), drawn(96, 64)
    gradient[3, 3] = value
    with pytest.raises(DivergedError, match=r"at a merge: the gradient of a\.path") as refused:
        linear.renew(gradient)
    assert refused.value.reason == "LOSS_NOT_FINITE"
    assert torch.equal(linear.merged(), before)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_it_settles_to_computes_the_same(quantization: str) -> None:
    linear = make((64, 96), quantization, bias=True)
    linear.renew(drawn(64, 96))
    plain = linear.settled(torch.device("cpu"))
    x = drawn(4, 96)
    torch.testing.assert_close(plain(x), linear(x), rtol=1e-5, atol=1e-5)
    assert type(plain) is nn.Linear
    assert not any(parameter.requires_grad for parameter in plain.parameters())
