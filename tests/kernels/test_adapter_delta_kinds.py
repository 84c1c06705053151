"""Every kind of unit on numbers that can be checked by hand, single and in runs, by the definition and by torch."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from delta_problems import apply, define, draw_problem, table_of
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, add_delta, add_embedding_delta
from motley_kernels.adapter_delta.types import Gate
from motley_kernels.testing import assert_close, draw_goat, draw_inputs
from torch import Generator, Tensor

Path = Literal["reference", "grouped"]

pytestmark = [
    pytest.mark.parametrize("implementation", ["reference", "grouped"]),
    pytest.mark.parametrize("num_tokens", [1, 8], ids=["single", "run"]),
]


def delta(
    implementation: Path, num_tokens: int, x: list[float], out_features: int, *units: DeltaUnit, weight: float = 1.0
) -> Tensor:
    """Return what these units together add to each of some tokens of one sequence, all alike."""
    rows = torch.tensor([x] * num_tokens)
    batch = DeltaBatch.from_sequences([(tuple((slot, weight) for slot in range(len(units))), num_tokens)])
    y = torch.zeros(num_tokens, out_features)
    out = apply(table_of(*units, sides=(len(x), out_features)), batch, rows, y, implementation)
    assert torch.equal(out, out[:1].expand_as(out))
    return out[0]


def test_selected_input_channels_add_their_columns(implementation: Path, num_tokens: int) -> None:
    block = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])  # [O, R]
    unit = DeltaUnit(None, block.T.contiguous(), 1.0, inputs=torch.tensor([1, 3], dtype=torch.int32))
    out = delta(implementation, num_tokens, [1.0, 2.0, 3.0, 4.0], 3, unit)
    assert out.tolist() == [2.0, 8.0, 2.0]
    one_hot = DeltaUnit(torch.eye(4)[[1, 3]], block.T.contiguous(), 1.0)
    assert torch.equal(delta(implementation, num_tokens, [1.0, 2.0, 3.0, 4.0], 3, one_hot), out)


def test_selected_output_channels_leave_the_others(implementation: Path, num_tokens: int) -> None:
    block = torch.tensor([[1.0, 1.0], [0.0, 3.0]])  # [R, I]
    unit = DeltaUnit(block, None, 1.0, outputs=torch.tensor([0, 2], dtype=torch.int32))
    assert delta(implementation, num_tokens, [2.0, 5.0], 4, unit).tolist() == [7.0, 0.0, 15.0, 0.0]


def test_overlapping_channels_hold_the_weighted_sum(implementation: Path, num_tokens: int) -> None:
    blocks = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])]
    channels = [torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)]
    units = [DeltaUnit(block, None, 1.0, outputs=one) for block, one in zip(blocks, channels, strict=True)]
    out = delta(implementation, num_tokens, [2.0, 5.0], 4, *units, weight=0.5)
    assert out.tolist() == [1.0, 0.0, 2.5 + 3.5, 5.0]


def diagonal_experts(top_k: int, router: Tensor) -> list[DeltaUnit]:
    """Return the units of two rank-1 experts on W0 = diag(8, 4, 2, 1): rho 10, scale sqrt(12), and their residual."""
    scale = 12**0.5
    values = torch.tensor([8.0, 2.0])
    axes = torch.eye(4)[[0, 2]]
    factors = (values / (10 * scale)).sqrt().unsqueeze(1) * axes
    base_level = values.sqrt().unsqueeze(1) * axes
    return [
        DeltaUnit(factors, factors.clone(), scale, gate=Gate(router, top_k)),
        DeltaUnit(base_level, base_level.clone(), -1 / (10 * 2)),
    ]


def test_one_chosen_expert_over_the_rewritten_base(implementation: Path, num_tokens: int) -> None:
    for router in (torch.tensor([[1.0] * 4, [0.0] * 4]), torch.zeros(2, 4)):  # likelier, and of equals the first
        out = delta(implementation, num_tokens, [1.0] * 4, 4, *diagonal_experts(1, router))
        assert_close(torch.tensor([8.0, 4.0, 2.0, 1.0]) + out, torch.tensor([8.4, 4.0, 1.9, 1.0]), torch.float32)


def test_two_experts_of_equal_shares_give_the_base_back(implementation: Path, num_tokens: int) -> None:
    out = delta(implementation, num_tokens, [1.0] * 4, 4, *diagonal_experts(2, torch.zeros(2, 4)))
    assert_close(out, torch.zeros(4), torch.float32)


def test_equal_logits_go_to_the_lowest_indices(implementation: Path, num_tokens: int) -> None:
    # 24 experts: from 17 on the library's own selection of the largest is no longer stable.
    num_experts = 24
    logits = torch.zeros(num_experts)
    logits[[5, 9, 17, 23]] = 1.0
    unit = DeltaUnit(
        torch.ones(num_experts, 1), torch.eye(num_experts), 1.0, gate=Gate(logits.unsqueeze(1).contiguous(), 6)
    )
    out = delta(implementation, num_tokens, [1.0], num_experts, unit)
    assert torch.nonzero(out).flatten().tolist() == [0, 1, 5, 9, 17, 23]
    assert_close(out.sum(), torch.tensor(1.0), torch.float32)
    assert out[5] == out[23]


def test_every_token_takes_its_own_route(implementation: Path, num_tokens: int) -> None:
    num_experts = 5
    unit = DeltaUnit(
        torch.ones(num_experts, num_experts),
        torch.arange(1.0, num_experts + 1).unsqueeze(1),
        1.0,
        gate=Gate(torch.eye(num_experts), 1),
    )
    chosen = [(3 * token) % num_experts for token in range(num_tokens + 3)]
    x = torch.eye(num_experts)[chosen]
    length = len(chosen) if num_tokens > 1 else 1
    batch = DeltaBatch.from_sequences([(((0, 1.0),), length)] * (len(chosen) // length))
    table = table_of(unit, sides=(num_experts, 1))
    out = apply(table, batch, x, torch.zeros(len(chosen), 1), implementation)
    assert out.flatten().tolist() == [expert + 1.0 for expert in chosen]


def test_gates_of_different_sizes_share_a_batch(implementation: Path, num_tokens: int) -> None:
    generator = Generator().manual_seed(0)
    sides = (20, 12)
    units = [draw_goat(experts, 2, top_k, *sides, generator) for experts, top_k in ((2, 1), (8, 3), (1, 1), (5, 5))]
    sequences = [(((slot, 0.5), ((slot + 1) % 4, 2.0)), num_tokens) for slot in range(4)]
    x, y = draw_inputs(4 * num_tokens, sides[0], generator), torch.zeros(4 * num_tokens, sides[1])
    out = apply(table_of(*units, sides=sides), DeltaBatch.from_sequences(sequences), x, y, implementation)
    for n, (members, _) in enumerate(sequences):
        for token in range(n * num_tokens, (n + 1) * num_tokens):
            expected = torch.zeros(sides[1])
            for slot, weight in members:
                unit = units[slot]
                assert unit.a is not None
                assert unit.b is not None
                assert unit.gate is not None
                logits = unit.gate.router @ x[token]
                chosen = sorted(range(len(logits)), key=lambda expert, z=logits: -float(z[expert]))[: unit.gate.top_k]
                for expert, share in zip(chosen, logits[chosen].softmax(0), strict=True):
                    rows = slice(2 * expert, 2 * expert + 2)
                    expected += weight * unit.scaling * share * (unit.a[rows] @ x[token]) @ unit.b[rows]
            assert_close(out[token], expected, torch.float32)


def test_kept_channels_equal_factors_filled_with_zeros(implementation: Path, num_tokens: int) -> None:
    generator = Generator().manual_seed(0)
    kept = torch.tensor([1, 3, 4], dtype=torch.int32)
    a, b = torch.randn(2, 4, generator=generator), torch.randn(2, 3, generator=generator)
    filled_b = torch.zeros(2, 6)
    filled_b[:, kept.long()] = b
    compact, filled = DeltaUnit(a, b, 1.0, outputs=kept), DeltaUnit(a, filled_b, 1.0)
    x = [1.0, -2.0, 3.0, 0.5]
    out = delta(implementation, num_tokens, x, 6, compact)
    assert_close(out, delta(implementation, num_tokens, x, 6, filled), torch.float32)
    assert out[[0, 2, 5]].tolist() == [0.0] * 3
    a, b = torch.randn(2, 3, generator=generator), torch.randn(2, 4, generator=generator)
    filled_a = torch.zeros(2, 6)
    filled_a[:, kept.long()] = a
    compact, filled = DeltaUnit(a, b, 1.0, inputs=kept), DeltaUnit(filled_a, b, 1.0)
    x = [torch.inf, 2.0, torch.nan, 4.0, 5.0, torch.inf]  # what is not kept is not read
    out = delta(implementation, num_tokens, x, 4, compact)
    finite = [value if value < torch.inf else 0.0 for value in x]
    assert_close(out, delta(implementation, num_tokens, finite, 4, filled), torch.float32)


def test_units_of_no_rank_add_nothing(implementation: Path, num_tokens: int) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    empty = [
        DeltaUnit(torch.zeros(0, 4), torch.zeros(0, 3), 1.0),
        DeltaUnit(None, torch.zeros(0, 3), 1.0, inputs=none),
        DeltaUnit(torch.zeros(0, 4), None, 1.0, outputs=none),
        DeltaUnit(torch.ones(2, 0), torch.ones(2, 3), 1.0, inputs=none),
        DeltaUnit(torch.ones(2, 4), torch.ones(2, 0), 1.0, outputs=none),
    ]
    full = DeltaUnit(torch.ones(1, 4), torch.ones(1, 3), 1.0)
    assert delta(implementation, num_tokens, [1.0, 2.0, 3.0, 4.0], 3, *empty).tolist() == [0.0] * 3
    assert delta(implementation, num_tokens, [1.0, 2.0, 3.0, 4.0], 3, *empty, full).tolist() == [10.0] * 3


def test_an_embedding_refuses_all_but_plain_pairs(implementation: Path, num_tokens: int) -> None:
    problem = draw_problem(0, "identical", (8, 6), [num_tokens] * 6, kinds=("goat",))
    ids = torch.zeros(len(problem.x), dtype=torch.int64)
    with pytest.raises(ValueError, match="plain low-rank"):
        add_embedding_delta(problem.y, ids, problem.units, problem.batch, implementation=implementation)


def test_float64_takes_every_kind(implementation: Path, num_tokens: int) -> None:
    problem = draw_problem(1, "uniform", (33, 37), [num_tokens] * 9)
    x, y = problem.x.double(), problem.y.double()
    add_delta(y, x, problem.units, problem.batch)
    assert_close(y.float(), define(problem.units, problem.batch, problem.x, problem.y), torch.float32)


def test_an_expert_that_was_not_chosen_adds_nothing_even_if_infinite(implementation: Path, num_tokens: int) -> None:
    gate = Gate(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1)
    unit = DeltaUnit(torch.tensor([[3e38, 0.0], [1.0, 0.0]]), torch.ones(2, 1), 1.0, gate=gate)
    assert delta(implementation, num_tokens, [10.0, 0.0], 1, unit).tolist() == [10.0]
