"""GOAT by its formulas: where experts begin, what the residual takes away, and that the base is never edited."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from adapter_files import spec_of, tiny_spec
from applied_adapters import applied, delta_rows, logits
from architectures import build_model
from kind_adapters import make_goat
from motley_adapters.errors import AdapterFormatError
from motley_adapters.export import export_s2ft_as_lora
from motley_adapters.fusion import expand_parts
from motley_adapters.kinds.goat import GoatGeometry, GoatModule, Segments, write_goat
from motley_adapters.kinds.goat_init import (
    SpectrumSlices,
    check_geometry,
    expert_directions,
    slice_spectrum,
    theoretical_scale,
)
from motley_adapters.reader import read_adapter
from motley_kernels.adapter_delta import DeltaBatch, UnitTable, add_delta
from motley_kernels.adapter_delta.reference import expert_shares
from motley_kernels.adapter_delta.types import Gate
from torch import Tensor

GEOMETRY = GoatGeometry(experts=4, top_k=2, rank=8, rho=10.0, segments="head")
OUT, IN = 24, 40
SCALE = 7.5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight() -> Tensor:
    return random(OUT, IN, seed=1)


def begun(geometry: GoatGeometry = GEOMETRY, scale: float = SCALE, router: Tensor | None = None) -> GoatModule:
    """Return a module as training begins with it."""
    slices = slice_spectrum(weight(), geometry)
    if router is None:
        router = random(geometry.experts, IN, seed=2)
    return GoatModule(*slices.initial_factors(scale, geometry.rho), router, scale, *slices.residual_factors)


def outputs(module: GoatModule, geometry: GoatGeometry, x: Tensor) -> Tensor:
    """Return the served output: the original weight, the routed unit and the residual unit."""
    residual = delta_rows(module.residual_unit(geometry.residual_scaling), x, OUT)
    return x @ weight().T + delta_rows(module.unit(geometry.top_k), x, OUT) + residual


def shares_of(module: GoatModule, geometry: GoatGeometry, x: Tensor) -> Tensor:
    return torch.stack([expert_shares(Gate(module.router, geometry.top_k), row) for row in x])


def test_every_expert_begins_as_its_slice_over_rho_whatever_the_scale() -> None:
    slices = slice_spectrum(weight(), GEOMETRY)
    for scale in (SCALE, 1.0, 110.9):
        a, b = slices.initial_factors(scale, GEOMETRY.rho)
        for expert in range(4):
            rows = slice(2 * expert, 2 * expert + 2)
            wanted = slices.left[:, rows] @ slices.singular_values[rows].diag() @ slices.right[rows] / 10.0
            torch.testing.assert_close(scale * b[:, rows] @ a[rows], wanted, rtol=0, atol=1e-6)


def test_slices_are_disjoint_and_orthonormal_and_begin_at_their_segments() -> None:
    slices = slice_spectrum(weight(), GEOMETRY)
    torch.testing.assert_close(slices.left.T @ slices.left, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(slices.right @ slices.right.T, torch.eye(8), rtol=0, atol=1e-5)
    spectrum = torch.linalg.svdvals(weight())
    torch.testing.assert_close(slices.singular_values, spectrum[[0, 1, 6, 7, 12, 13, 18, 19]])


@pytest.mark.parametrize(
    ("segments", "wanted"),
    [
        ("head", [[0, 1], [6, 7], [12, 13], [18, 19]]),
        ("mini", [[4, 5], [10, 11], [16, 17], [22, 23]]),
        ("principal", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("minor", [[16, 17], [18, 19], [20, 21], [22, 23]]),
    ],
)
def test_segments_choose_directions(segments: Segments, wanted: list[list[int]]) -> None:
    assert expert_directions(replace(GEOMETRY, segments=segments), IN, OUT).tolist() == wanted


def test_random_segments_are_whole_blocks_that_the_seed_reproduces() -> None:
    geometry = replace(GEOMETRY, segments="random")
    drawn = [expert_directions(geometry, IN, OUT, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(set(drawn[0].flatten().tolist())) == 8
    assert (drawn[0][:, 1] - drawn[0][:, 0]).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rank": 3}, "rank"),
        ({"rank": 6}, "rank"),
        ({"rank": 28}, "rank"),
        ({"top_k": 5}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"experts": 0}, "experts"),
        ({"rho": 0.0}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"segments": "random"}, "segments"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        expert_directions(replace(GEOMETRY, **fields), IN, OUT)
    assert (caught.value.reason, caught.value.field) == ("INVALID_GEOMETRY", field)


def test_the_largest_rank_that_fits_is_accepted() -> None:
    check_geometry(replace(GEOMETRY, rank=24), IN, OUT)


def test_the_residual_and_what_training_would_have_frozen_make_the_base() -> None:
    module = begun()
    taken = SCALE / 4 * module.b @ module.a  # s / E times the sum over experts
    residual = GEOMETRY.residual_scaling * module.residual_b @ module.residual_a
    torch.testing.assert_close(-residual, taken, rtol=0, atol=1e-6)
    torch.testing.assert_close((weight() - taken) + taken, weight(), rtol=0, atol=1e-6)


def test_shares_average_to_one_over_the_experts_under_a_symmetric_router() -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack(
        [
            expert_shares(Gate(torch.randn(4, 8, generator=generator), 2), torch.randn(8, generator=generator))
            for _ in range(3000)
        ]
    )
    sigma = drawn.std(dim=0) / math.sqrt(len(drawn))
    assert ((drawn.mean(dim=0) - 0.25).abs() < 3 * sigma).all()


def test_the_first_output_deviates_from_the_base_by_the_closed_form() -> None:
    module, x = begun(), random(6, IN, seed=4)
    deviation = outputs(module, GEOMETRY, x) - x @ weight().T
    shares = shares_of(module, GEOMETRY, x)
    wanted = slice_spectrum(weight(), GEOMETRY).initial_deviation(shares, x, GEOMETRY.rho)
    assert deviation.abs().max() > 0.1  # not equal to the base
    torch.testing.assert_close(deviation, wanted, rtol=1e-5, atol=1e-5)


def test_the_first_output_is_the_base_where_all_shares_are_equal() -> None:
    everyone = replace(GEOMETRY, top_k=4)
    x = random(6, IN, seed=4)
    torch.testing.assert_close(
        outputs(begun(everyone, router=torch.zeros(4, IN)), everyone, x), x @ weight().T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("segments", [segments for segments in get_args(Segments) if segments != "random"])
def test_the_edited_base_of_the_reference_and_the_original_with_a_residual_agree(segments: Segments) -> None:
    geometry = replace(GEOMETRY, segments=segments)
    first = begun(geometry)
    module = replace(first, a=first.a + random(8, IN, seed=5), b=first.b + random(OUT, 8, seed=6))
    x = random(6, IN, seed=7)
    edited = weight() - SCALE / 4 * first.b @ first.a
    shares = shares_of(module, geometry, x)
    experts = torch.stack([x @ (module.b[:, 2 * e : 2 * e + 2] @ module.a[2 * e : 2 * e + 2]).T for e in range(4)])
    wanted = x @ edited.T + SCALE * torch.einsum("te,eto->to", shares, experts)
    torch.testing.assert_close(outputs(module, geometry, x), wanted, rtol=1e-5, atol=1e-4)


def test_softmax_then_the_largest_then_renormalised_is_softmax_over_the_largest() -> None:
    router = random(8, IN, seed=8)
    for x in random(20, IN, seed=9):
        likely, chosen = torch.softmax(router @ x, dim=0).topk(3)
        wanted = torch.zeros(8).index_copy(0, chosen, likely / likely.sum())
        shares = expert_shares(Gate(router, 3), x)
        torch.testing.assert_close(shares, wanted, rtol=1e-5, atol=1e-6)
        assert int((shares > 0).sum()) == 3
        assert float(shares.sum()) == pytest.approx(1.0, abs=1e-6)


def test_the_scale_follows_from_the_size_of_a_first_factor() -> None:
    generator = torch.Generator().manual_seed(10)
    width, inputs = 2, 16
    bound = 1 / math.sqrt(inputs)
    draws = (torch.rand(20_000, width, inputs, generator=generator) * 2 - 1) * bound
    mean = torch.einsum("sdi,sdj->ij", draws, draws) / len(draws)
    torch.testing.assert_close(mean, width / (3 * inputs) * torch.eye(inputs), rtol=0, atol=2e-3)
    scale = theoretical_scale(replace(GEOMETRY, rank=8, experts=4), inputs, eta=1.0)
    assert scale**2 * width / (3 * inputs) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("inputs", "experts", "rank", "eta", "source", "wanted"),
    [
        (4096, 8, 8, 1.0, "expert", 110.9),
        (4096, 8, 8, 1.0, "total", 39.2),
        (4096, 8, 32, 0.1, "expert", 17.5),
        (11008, 8, 8, 1.0, "expert", 181.7),
        (768, 8, 8, 1.0, "expert", 48.0),
        (1024, 8, 32, 1.0, "expert", 27.7),
    ],
)
def test_the_scale_of_each_linear(inputs: int, experts: int, rank: int, eta: float, source: Any, wanted: float) -> None:
    geometry = replace(GEOMETRY, experts=experts, rank=rank)
    assert theoretical_scale(geometry, inputs, eta=eta, rank_for_scale=source) == pytest.approx(wanted, abs=0.06)


@pytest.mark.parametrize("eta", [0.0, -1.0, math.inf, math.nan])
def test_an_eta_that_is_no_ratio_is_refused(eta: float) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        theoretical_scale(GEOMETRY, IN, eta=eta)
    assert caught.value.field == "eta"


# --- the hand-checkable example: diag(8, 4, 2, 1), two experts of rank 1 ---------------------------------------------

BY_HAND = GoatGeometry(experts=2, top_k=1, rank=2, rho=10.0, segments="head")


def by_hand() -> tuple[SpectrumSlices, GoatModule]:
    slices = slice_spectrum(torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])), BY_HAND)
    scale = theoretical_scale(BY_HAND, 4, eta=1.0)
    router = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])  # of x = (1, 1, 1, 1), expert 0
    return slices, GoatModule(*slices.initial_factors(scale, 10.0), router, scale, *slices.residual_factors)


def test_the_example_by_hand() -> None:
    _, module = by_hand()
    assert module.scale == pytest.approx(3.4641, abs=1e-4)
    assert module.b[:, 0].abs().tolist() == pytest.approx([0.48056, 0, 0, 0], abs=1e-5)
    assert module.a[1].abs().tolist() == pytest.approx([0, 0, 0.24028, 0], abs=1e-5)
    residual = BY_HAND.residual_scaling * module.residual_b @ module.residual_a
    torch.testing.assert_close(residual, -torch.diag(torch.tensor([0.4, 0, 0.1, 0])))


def test_the_example_routed_to_the_first_expert_by_hand() -> None:
    slices, module = by_hand()
    x = torch.ones(1, 4)
    delta = delta_rows(module.unit(1), x, 4) + delta_rows(module.residual_unit(BY_HAND.residual_scaling), x, 4)
    torch.testing.assert_close(delta, torch.tensor([[0.4, 0, -0.1, 0]]))
    torch.testing.assert_close(delta, slices.initial_deviation(torch.tensor([[1.0, 0]]), x, 10.0))


def test_the_example_with_equal_shares_is_the_base_by_hand() -> None:
    _, module = by_hand()
    x = torch.ones(1, 4)
    even = replace(module, router=torch.zeros(2, 4))
    delta = delta_rows(even.unit(2), x, 4) + delta_rows(module.residual_unit(BY_HAND.residual_scaling), x, 4)
    torch.testing.assert_close(delta, torch.zeros(1, 4))


# --- from disk -------------------------------------------------------------------------------------------------------

TOKENS = (5, 17, 33, 8, 64, 3)


def test_reading_computes_no_decomposition_and_keeps_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    directory = make_goat(tmp_path, model, base, seed=1)
    first = read_adapter(directory, base)
    with applied(model, (first, 1.0)):
        before = logits(model, TOKENS)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a residual is stored, never computed")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    second = read_adapter(directory, base)
    with applied(model, (second, 1.0)):
        assert torch.equal(logits(model, TOKENS), before)
    assert not torch.allclose(logits(model, TOKENS), before, atol=0.1)  # the adapter does something


def test_adapters_of_two_scales_share_one_residual(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    one, other = (
        read_adapter(make_goat(tmp_path / str(eta), model, base, seed=2, eta=eta), base) for eta in (0.1, 1.0)
    )
    assert one.spec.scalings != other.spec.scalings
    assert one.spec.shared == other.spec.shared
    (ours,), (theirs,) = one.shared, other.shared
    assert all(torch.equal(ours.units[path].a, theirs.units[path].a) for path in ours.units)
    (shared,) = one.spec.shared
    assert expand_parts([(one.spec, 0.5), (other.spec, 1.5)])[-1] == (shared, 2.0)


def test_a_merge_does_not_exist(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    with pytest.raises(AdapterFormatError) as caught:
        export_s2ft_as_lora(make_goat(tmp_path / "goat", model, base, seed=3), tmp_path / "lora", base)
    assert caught.value.reason == "UNSUPPORTED_KIND"
    assert not (tmp_path / "lora").exists()


def test_a_token_routes_alike_alone_and_in_a_batch() -> None:
    module = replace(begun(), a=random(8, IN, seed=11))
    x = random(9, IN, seed=12)
    table = UnitTable(IN, OUT)
    table.bind(1, module.unit(2))
    table.bind(2, module.residual_unit(GEOMETRY.residual_scaling))
    members = ((1, 1.0), (2, 1.0))
    together = torch.zeros(9, OUT)
    add_delta(together, x, table, DeltaBatch.from_sets([members if i % 3 else () for i in range(9)]))
    for i in range(9):
        alone = torch.zeros(1, OUT)
        add_delta(alone, x[i : i + 1], table, DeltaBatch.from_sets([members if i % 3 else ()]))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-5, atol=1e-5)
    assert not together[0].any()
    assert len({tuple((row > 0).tolist()) for row in shares_of(module, GEOMETRY, x)}) > 1  # routes differ


def test_routes_differ_between_linears(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    adapter = read_adapter(make_goat(tmp_path, model, base, seed=4, names=["q_proj", "v_proj"]), base)
    x = random(12, 64, seed=13)
    gates = [adapter.units[f"model.layers.0.self_attn.{name}_proj"].gate for name in "qv"]
    routes = [torch.stack([expert_shares(gate, row) for row in x]) > 0 for gate in gates if gate is not None]
    assert not torch.equal(*routes)


def test_the_experts_may_be_stored_in_half_precision_and_the_router_is_not(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=80)
    base = spec_of(model)
    adapter = read_adapter(make_goat(tmp_path, model, base, seed=5, dtype=torch.bfloat16), base)
    unit = next(iter(adapter.units.values()))
    assert unit.a is not None
    assert unit.gate is not None
    assert torch.equal(unit.a, unit.a.bfloat16().float())
    assert not torch.equal(unit.gate.router, unit.gate.router.bfloat16().float())


def test_lm_head_may_be_routed(tmp_path: Path) -> None:
    geometry = GoatGeometry(experts=2, top_k=1, rank=2, rho=10.0, segments="head")
    module = GoatModule(random(2, 4), random(11, 2), random(2, 4), 1.0, random(2, 4), random(11, 2))
    write_goat(tmp_path, tiny_spec(), geometry, {"lm_head": module})
    assert read_adapter(tmp_path, tiny_spec()).units.keys() == {"lm_head"}
