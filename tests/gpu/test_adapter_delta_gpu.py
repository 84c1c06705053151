"""The Triton adapter delta on a GPU against its definition, and the promises that only a device can break."""

from __future__ import annotations

from random import Random

import pytest
import torch
from delta_problems import NUM_SLOTS, Problem, define, draw_problem
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta, add_embedding_delta
from motley_kernels.adapter_delta.types import Gate
from motley_kernels.testing import KINDS, ROUTINGS, Kind, Routing, assert_close, draw_kind, draw_unit
from torch import Generator
from triton_deltas import assert_equals_the_definition, assert_neighbours_change_no_bit, run, table_on

CUDA = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [(64, 48), (40, 136), (33, 37), (5, 1), (1, 7), (4096, 1024), (2080, 4096)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_any_mixture_equals_the_definition(dtype: torch.dtype, routing: Routing, widths: tuple[int, int]) -> None:
    rng = Random(0)
    for seed in range(3):
        lengths = [rng.choice([1, 1, 1, 2, 8, 18]) for _ in range(rng.choice([1, 4, 9]))]
        assert_equals_the_definition(draw_problem(seed, routing, widths, lengths, dtype), dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_definition_at_real_widths(kind: Kind, dtype: torch.dtype) -> None:
    problem = draw_problem(1, "uniform", (4096, 4096), [1, 1, 19, 1, 3], dtype, kinds=[kind])
    assert_equals_the_definition(problem, dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(64, 72), (14336, 512), (2080, 4096)], ids=str)
def test_a_tokens_bits_do_not_depend_on_its_neighbours(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    problem = draw_problem(2, "uniform", widths, [1, 1, 30, 1, 1, 1, 200, 1, 9, 1, 1], dtype)
    for kept in ([3], [2], [10, 6, 4], [9, 8, 7, 5, 3, 1], list(range(11))):
        assert_neighbours_change_no_bit(problem, dtype, kept, problem.units, CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_other_units_of_the_table(dtype: torch.dtype) -> None:
    problem = draw_problem(4, "distinct", (4096, 1024), [1, 1, 30, 1], dtype, kinds=["lora", "goat", "s2ft_input"])
    generator = Generator().manual_seed(0)
    others = UnitTable(4096, 1024)
    for slot, unit in reversed(problem.units.units.items()):
        others.bind(slot, unit)
    # Of odd widths, with which no load is aligned any more, and of more experts than any other.
    others.bind(NUM_SLOTS, draw_kind("compact", 5, 4096, 1024, generator))
    plain = draw_unit(40, 4096, 1024, generator)
    others.bind(NUM_SLOTS + 1, DeltaUnit(plain.a, plain.b, 1.0, gate=Gate(torch.ones(20, 4096), 3)))
    whole = run(table_on(problem.units, CUDA, dtype), problem.sequences, problem.x, problem.y, CUDA)
    stranger = (((NUM_SLOTS, 1.0), (NUM_SLOTS + 1, 1.0)), 1)
    x, y = (torch.cat([torch.ones(1, given.shape[1]).to(dtype), given]) for given in (problem.x, problem.y))
    out = run(table_on(others, CUDA, dtype), [stranger, *problem.sequences], x, y, CUDA)
    assert torch.equal(out[1:], whole)


def test_a_nan_reaches_only_its_own_token() -> None:
    problem = draw_problem(3, "skewed", (512, 256), [1, 3, 1, 18, 1], torch.bfloat16)
    units = table_on(problem.units, CUDA, torch.bfloat16)
    expected = run(units, problem.sequences, problem.x, problem.y, CUDA)
    for sick in (0, 5, 23):
        x = problem.x.clone()
        x[sick] = torch.nan
        others = torch.arange(len(x)) != sick
        assert torch.equal(run(units, problem.sequences, x, problem.y, CUDA)[others], expected[others])


def test_tokens_without_a_unit_keep_their_bits() -> None:
    units = UnitTable(64, 48)
    units.bind(0, draw_unit(8, 64, 48, Generator(), torch.bfloat16))
    y = torch.full((12, 48), -0.0, dtype=torch.bfloat16)
    sequences = [((), 1), (((0, 1.0),), 2), (((4, 1.0),), 9)]
    out = run(table_on(units, CUDA, torch.bfloat16), sequences, torch.ones(12, 64).bfloat16(), y, CUDA)
    bare = torch.tensor([0, *range(3, 12)])
    assert torch.equal(out[bare].view(torch.int16), y[bare].view(torch.int16))
    assert out[1:3].count_nonzero()


def test_equal_logits_choose_the_lower_expert() -> None:
    router = torch.tensor([[1.0], [2.0], [2.0], [1.0], [2.0], [0.0]])
    for top_k in range(1, 7):
        units = UnitTable(1, 6)
        units.bind(0, DeltaUnit(torch.ones(6, 1), torch.eye(6), 1.0, gate=Gate(router, top_k)))
        out = run(table_on(units, CUDA, torch.bfloat16), [(((0, 1.0),), 1)], torch.ones(1, 1), torch.zeros(1, 6), CUDA)
        assert set(out[0].nonzero().flatten().tolist()) == set([1, 2, 4, 0, 3, 5][:top_k])


def test_bfloat16_output_is_rounded_once() -> None:
    units = UnitTable(1, 1)
    for slot in range(2):
        units.bind(slot, DeltaUnit(torch.ones(1, 1), torch.full((1, 1), 2.0**-8), 1.0))
    # Together a little over half of y's spacing; each added by itself is a tie and vanishes.
    sets = [(((0, 1.0), (1, 2.0**-10)), 1)]
    out = run(table_on(units, CUDA, torch.float32), sets, torch.ones(1, 1), torch.ones(1, 1).bfloat16(), CUDA)
    assert out.item() == 1 + 2.0**-7


def test_a_captured_graph_replays_the_same_bits() -> None:
    problem = draw_problem(5, "uniform", (1024, 768), [1] * 20, torch.bfloat16)
    units = table_on(problem.units, CUDA, torch.bfloat16)
    batch = DeltaBatch.from_sequences(problem.sequences, torch.device(CUDA))
    x, y = torch.zeros_like(problem.x, device=CUDA), torch.zeros_like(problem.y, device=CUDA)
    add_delta(y, x, units, batch)  # plans and compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_delta(y, x, units, batch)
    for scale in (1.0, -2.0):
        x.copy_(problem.x * scale)
        y.copy_(problem.y)
        graph.replay()
        assert torch.equal(y.cpu(), run(units, problem.sequences, problem.x * scale, problem.y, CUDA))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embeddings_delta_equals_the_definition(dtype: torch.dtype) -> None:
    problem: Problem = draw_problem(6, "uniform", (1000, 512), [1, 9, 1, 30, 1], dtype, kinds=["lora"])
    ids = torch.randint(1000, (len(problem.x),), generator=Generator().manual_seed(0))
    out, expected = problem.y.to(CUDA), problem.y.clone()
    batch = DeltaBatch.from_sequences(problem.sequences, torch.device(CUDA))
    add_embedding_delta(out, ids.to(CUDA), table_on(problem.units, CUDA, dtype), batch, 1.7)
    add_embedding_delta(expected, ids, table_on(problem.units, "cpu", dtype), problem.batch, 1.7)
    assert_close(out.cpu(), expected, dtype)


def test_auto_means_the_kernels() -> None:
    problem = draw_problem(7, "uniform", (256, 128), [1, 1, 9], torch.bfloat16)
    units = table_on(problem.units, CUDA, torch.bfloat16)
    batch = DeltaBatch.from_sequences(problem.sequences, torch.device(CUDA))
    out = problem.y.to(CUDA)
    add_delta(out, problem.x.to(CUDA), units, batch)
    assert torch.equal(out.cpu(), run(units, problem.sequences, problem.x, problem.y, CUDA))
    assert_close(
        out.cpu(), define(table_on(units, "cpu", torch.bfloat16), problem.batch, problem.x, problem.y), out.dtype
    )
