"""The Triton adapter delta against its definition, in the interpreter: any mix of kinds, ranks, sets and runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from delta_problems import NUM_SLOTS, Problem, apply, define, draw_problem, draw_table, pooled, table_of
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_embedding_delta
from motley_kernels.adapter_delta.triton_plan import UnitRows
from motley_kernels.adapter_delta.types import Gate
from motley_kernels.errors import KernelError
from motley_kernels.testing import (
    KINDS,
    ROUTINGS,
    Kind,
    Members,
    Routing,
    assert_close,
    draw_kind,
    draw_sets,
    draw_unit,
)
from torch import Generator, Tensor
from triton_deltas import assert_equals_the_definition, assert_neighbours_change_no_bit, run, table_on

WIDTHS = ((64, 48), (40, 136), (33, 37), (5, 1))
LENGTHS = st.lists(st.sampled_from([1, 1, 1, 2, 8, 18]), min_size=1, max_size=7)


@pytest.fixture(autouse=True, scope="module")
def _poisoned_scratch() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # under which torch.empty is NaN
    yield
    torch.use_deterministic_algorithms(False)


def test_scratch_is_poisoned() -> None:
    assert torch.empty(100).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), widths=st.sampled_from(WIDTHS), lengths=LENGTHS)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_mixture_equals_the_definition(
    dtype: torch.dtype, seed: int, routing: Routing, widths: tuple[int, int], lengths: list[int]
) -> None:
    assert_equals_the_definition(draw_problem(seed, routing, widths, lengths, dtype), dtype)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_definition(kind: Kind, routing: Routing) -> None:
    assert_equals_the_definition(draw_problem(1, routing, (64, 80), [1, 1, 19, 1, 3], kinds=[kind]), torch.float32)


@pytest.mark.parametrize("kind", ["lora", "goat", "compact"])
def test_inputs_summed_in_parts_equal_the_definition(kind: Kind) -> None:
    problem = draw_problem(2, "uniform", (2080, 24), [1, 1, 17], kinds=[kind])
    assert_equals_the_definition(problem, torch.float32)
    assert_neighbours_change_no_bit(problem, torch.float32, [1], problem.units)


@pytest.mark.parametrize(("x_type", "dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_activations_and_factors_may_differ_in_dtype(x_type: torch.dtype, dtype: torch.dtype) -> None:
    assert_equals_the_definition(draw_problem(3, "uniform", (48, 40), [1, 9, 1], x_type), dtype)


@given(
    seed=st.integers(0, 10**6),
    routing=st.sampled_from(ROUTINGS),
    widths=st.sampled_from(WIDTHS),
    lengths=LENGTHS,
    data=st.data(),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_a_tokens_bits_do_not_depend_on_its_neighbours(
    seed: int, routing: Routing, widths: tuple[int, int], lengths: list[int], data: st.DataObject
) -> None:
    problem = draw_problem(seed, routing, widths, lengths)
    kept = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    assert_neighbours_change_no_bit(problem, torch.float32, kept, problem.units)


def test_bits_do_not_depend_on_other_units_of_the_table() -> None:
    problem = draw_problem(4, "distinct", (64, 72), [1, 1, 12, 1], kinds=["lora", "goat"])
    others = UnitTable(64, 72)
    for slot, unit in reversed(problem.units.units.items()):
        others.bind(slot, unit)
    more = Generator().manual_seed(0)
    others.bind(NUM_SLOTS, draw_kind("compact", 5, 64, 72, more))  # of odd widths: nothing is aligned any more
    others.bind(NUM_SLOTS + 1, DeltaUnit(*draw_unit(40, 64, 72, more).tensors, 1.0, gate=Gate(torch.ones(20, 64), 3)))
    whole = run(problem.units, problem.sequences, problem.x, problem.y)
    stranger = (((NUM_SLOTS, 1.0), (NUM_SLOTS + 1, 1.0)), 1)
    x, y = (torch.cat([torch.ones(1, given.shape[1]), given]) for given in (problem.x, problem.y))
    assert torch.equal(run(others, [stranger, *problem.sequences], x, y)[1:], whole)


@pytest.mark.parametrize("seed", range(3))
def test_a_nan_reaches_only_its_own_token(seed: int) -> None:
    problem = draw_problem(seed, "skewed", (48, 64), [1, 3, 1, 18, 1])
    expected = run(problem.units, problem.sequences, problem.x, problem.y)
    x = problem.x.clone()
    sick = (0, 5, 23)[seed]
    x[sick] = torch.nan
    others = torch.arange(len(x)) != sick
    assert torch.equal(run(problem.units, problem.sequences, x, problem.y)[others], expected[others])


def test_nothing_beside_a_unit_is_read() -> None:
    problem = draw_problem(5, "uniform", (40, 48), [1, 2, 17, 1])
    expected = run(problem.units, problem.sequences, problem.x, problem.y)
    assert torch.equal(run(pooled(problem.units), problem.sequences, problem.x, problem.y), expected)


def test_tokens_without_a_unit_keep_their_bits() -> None:
    units = draw_table(48, 64, Generator().manual_seed(6))
    sequences: list[tuple[Members, int]] = [((), 1), (((0, 1.0),), 3), (((4, 1.0),), 2), (((4, 1.0), (9, 1.0)), 9)]
    assert 0 in units.units
    assert not {4, 9} & units.units.keys()
    y = torch.full((15, 64), -0.0, dtype=torch.bfloat16)  # to which even an added zero would show
    out = run(table_on(units, "cpu", torch.bfloat16), sequences, torch.ones(15, 48).bfloat16(), y)
    bare = torch.tensor([0, *range(4, 15)])
    assert torch.equal(out[bare].view(torch.int16), y[bare].view(torch.int16))
    assert out[1:4].count_nonzero()


def test_equal_logits_choose_the_lower_expert() -> None:
    router = torch.tensor([[1.0], [2.0], [2.0], [1.0], [2.0], [0.0]])
    for top_k in range(1, 7):
        unit = DeltaUnit(torch.ones(6, 1), torch.eye(6), 1.0, gate=Gate(router, top_k))
        problem = Problem(
            table_of(unit, sides=(1, 6)), [(((0, 1.0),), 2)], torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 6)
        )
        out = run(problem.units, problem.sequences, problem.x, problem.y)
        assert_close(out, define(problem.units, problem.batch, problem.x, problem.y), torch.float32)
        chosen = [set((row != 0).nonzero().flatten().tolist()) for row in out]
        assert chosen == [set([1, 2, 4, 0, 3, 5][:top_k]), set([5, 0, 3, 1, 2, 4][:top_k])]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_an_expert_that_was_not_chosen_adds_nothing_even_if_infinite() -> None:
    gate = Gate(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1)
    unit = DeltaUnit(torch.tensor([[3e38, 0.0], [1.0, 0.0]]), torch.ones(2, 1), 1.0, gate=gate)
    out = run(table_of(unit, sides=(2, 1)), [(((0, 1.0),), 1)], torch.tensor([[10.0, 0.0]]), torch.zeros(1, 1))
    assert out.tolist() == [[10.0]]


def test_logits_are_not_rounded_to_the_activations_dtype() -> None:
    router = torch.tensor([[1.0], [1.0 + 2.0**-12]])  # equal in half precision
    unit = DeltaUnit(torch.ones(2, 1).half(), torch.eye(2).half(), 1.0, gate=Gate(router, 1))
    out = run(table_of(unit, sides=(1, 2)), [(((0, 1.0),), 1)], torch.ones(1, 1).half(), torch.zeros(1, 2).half())
    assert out.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0), (1, 0, 2)])
def test_members_are_summed_in_the_sets_order(order: tuple[int, int, int]) -> None:
    deltas = (1.0, 2.0**24, -(2.0**24))
    units = table_of(*(DeltaUnit(torch.ones(1, 1), torch.full((1, 1), d), 1.0) for d in deltas), sides=(1, 1))
    out = run(units, [(tuple((slot, 1.0) for slot in order), 1)], torch.ones(1, 1), torch.zeros(1, 1))
    assert out.item() == (0.0 if order.index(0) < 2 else 1.0)


def test_the_output_is_rounded_once() -> None:
    unit = DeltaUnit(torch.ones(1, 1), torch.full((1, 1), 2.0**-11), 1.0)
    units = table_of(unit, unit, sides=(1, 1))
    # Together a little over half of y's spacing; each added by itself is a tie and vanishes. (The interpreter cuts
    # bfloat16 off instead of rounding.)
    out = run(units, [(((0, 1.0), (1, 2.0**-10)), 1)], torch.ones(1, 1), torch.ones(1, 1).half())
    assert out.item() == 1 + 2.0**-10


def test_strided_tensors_equal_the_definition() -> None:
    generator = Generator().manual_seed(7)
    a, b = torch.randn(40, 6, generator=generator).T, torch.randn(24, 6, generator=generator).T
    units = table_of(DeltaUnit(a, b, 0.3), sides=(40, 24))
    x, y = torch.randn(3, 80, generator=generator)[:, ::2], torch.randn(24, 3, generator=generator).T
    batch = DeltaBatch.from_sets([((0, 1.0),)] * 3)
    expected = define(units, batch, x, y)
    assert_close(apply(units, batch, x, y, "triton"), expected, torch.float32)


def test_churn_never_leaves_stale_addresses() -> None:
    generator = Generator().manual_seed(8)
    units = draw_table(40, 24, generator, ranks=(3, 8))
    batch = DeltaBatch.from_sets([])
    next_slot = NUM_SLOTS
    for step in range(8):
        for slot in list(units.units)[: step % 3]:
            gone = units.units[slot]
            units.unbind(slot)
            for tensor in gone.tensors:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)
            units.bind(next_slot, draw_kind(KINDS[next_slot % len(KINDS)], 8, 40, 24, generator))
            next_slot += 1
        if step % 3 != 2:  # otherwise the same batch meets other units
            slots = list(units.units)
            sets = draw_sets("uniform", 9, len(slots), 3, 0.2, generator)
            batch = DeltaBatch.from_sets([tuple((slots[s], w) for s, w in members) for members in sets])
        x, y = torch.randn(9, 40, generator=generator), torch.randn(9, 24, generator=generator)
        assert_close(apply(units, batch, x, y, "triton"), define(units, batch, x, y), torch.float32)


def test_a_unit_that_goes_takes_no_other_units_row_along() -> None:
    generator = Generator().manual_seed(11)
    units = table_of(*(draw_kind(kind, 8, 40, 24, generator) for kind in KINDS), sides=(40, 24))
    batch = DeltaBatch.from_sets([((slot, 1.0),) for slot in range(len(KINDS))])
    x, y = torch.randn(len(KINDS), 40, generator=generator), torch.zeros(len(KINDS), 24)
    before = apply(units, batch, x, y, "triton")
    rows = units.plan
    assert isinstance(rows, UnitRows)
    told = dict(rows.by_slot)
    units.unbind(2)
    without = apply(units, batch, x, y, "triton")
    assert torch.equal(without[2], y[2])
    units.bind(99, draw_kind("goat", 8, 40, 24, generator))  # in the place of the one that is gone
    apply(units, DeltaBatch.from_sets([((99, 1.0),)]), x[:1], y[:1], "triton")
    assert units.plan is rows
    assert rows.by_slot[99].shape.row == told[2].shape.row
    assert len(rows.table) == len(KINDS)
    assert all(rows.by_slot[slot] is told[slot] for slot in told if slot != 2)
    after = apply(units, batch, x, y, "triton")
    others = torch.arange(len(KINDS)) != 2
    assert torch.equal(after[2], y[2]), "a batch that still names the slot finds nothing"
    assert torch.equal(after[others], before[others])


def test_another_unit_under_a_slot_is_seen_by_the_same_batch() -> None:
    generator = Generator().manual_seed(12)
    units = table_of(*(draw_unit(4, 16, 8, generator) for _ in range(2)), sides=(16, 8))
    batch = DeltaBatch.from_sets([((0, 1.0),), ((1, 1.0),)])
    x, y = torch.randn(2, 16, generator=generator), torch.zeros(2, 8)
    with torch.inference_mode():
        apply(units, batch, x, y, "triton")
    units.unbind(1)
    units.bind(1, draw_unit(4, 16, 8, generator))
    assert_close(apply(units, batch, x, y, "triton"), define(units, batch, x, y), torch.float32)


def test_factors_that_are_refused_leave_nothing_half_told() -> None:
    generator = Generator().manual_seed(13)
    units = table_of(*(draw_unit(4, 16, 8, generator) for _ in range(2)), sides=(16, 8))
    units.bind(2, draw_unit(4, 16, 8, generator, torch.float16))
    x, y = torch.randn(1, 16, generator=generator), torch.zeros(1, 8)
    first, mixed, second = (DeltaBatch.from_sets([members]) for members in (
        ((0, 1.0),), ((1, 1.0), (2, 1.0)), ((1, 1.0),)
    ))  # fmt: skip
    apply(units, first, x, y, "triton")
    with pytest.raises(KernelError, match="one dtype"):
        apply(units, mixed, x, y, "triton")
    assert_close(apply(units, second, x, y, "triton"), define(units, second, x, y), torch.float32)


def test_a_unit_is_awaited_once_and_before_use() -> None:
    generator = Generator().manual_seed(9)
    units = UnitTable(16, 8)
    a = torch.full((4, 16), torch.nan)
    arrivals: list[int] = []

    def arrive() -> None:
        arrivals.append(0)
        a.copy_(torch.ones(4, 16))

    units.bind(0, DeltaUnit(a, torch.ones(4, 8), 1.0), arrive)
    units.bind(1, draw_unit(4, 16, 8, generator), lambda: arrivals.append(1))
    for _ in range(2):
        out = run(units, [(((0, 1.0),), 1)], torch.ones(1, 16), torch.zeros(1, 8))
        assert arrivals == [0], "not the unit that no token uses"
        assert torch.equal(out, torch.full((1, 8), 64.0))


def test_linears_of_one_shape_share_their_layout() -> None:
    generator = Generator().manual_seed(10)
    batch = DeltaBatch.from_sets([((slot, 1.0),) for slot in range(3)])
    for _ in range(4):
        units = table_of(*(draw_unit(8, 16, 8, generator) for _ in range(3)), sides=(16, 8))
        apply(units, batch, torch.ones(3, 16), torch.zeros(3, 8), "triton")
    assert len(batch.layouts) == 4 + 1, "a plan for each, one layout for all"


@given(seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), lengths=LENGTHS)
@settings(max_examples=5, deadline=None, derandomize=True)
def test_the_embeddings_delta_equals_the_definition(seed: int, routing: Routing, lengths: list[int]) -> None:
    problem = draw_problem(seed, routing, (50, 48), lengths, kinds=["lora"])
    ids = torch.randint(50, (sum(lengths),), generator=Generator().manual_seed(seed))
    out, expected = problem.y.clone(), problem.y.clone()
    add_embedding_delta(out, ids, problem.units, problem.batch, 1.7, implementation="triton")
    add_embedding_delta(expected, ids, problem.units, problem.batch, 1.7, implementation="reference")
    assert_close(out, expected, torch.float32)


def test_factors_that_the_kernels_cannot_take_are_errors() -> None:
    one, other = draw_unit(4, 8, 8, Generator()), draw_unit(4, 8, 8, Generator(), torch.float16)
    wide = draw_unit(4, 8, 8, Generator(), torch.float64)
    batch = DeltaBatch.from_sets([((0, 1.0), (1, 1.0))])
    for units in (table_of(one, other, sides=(8, 8)), table_of(wide, sides=(8, 8))):
        with pytest.raises(KernelError, match="one dtype"):
            apply(units, batch, torch.ones(1, 8), torch.zeros(1, 8), "triton")
    gated = DeltaUnit(*one.tensors, 1.0, gate=Gate(torch.ones(2, 8), 1))
    with pytest.raises(ValueError, match="plain"):
        add_embedding_delta(
            torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), table_of(gated, sides=(8, 8)),
            DeltaBatch.from_sets([((0, 1.0),)]), implementation="triton",
        )  # fmt: skip


def test_a_unit_of_rank_zero_adds_nothing() -> None:
    units = table_of(DeltaUnit(torch.empty(0, 8), torch.empty(0, 4), 1.0), sides=(8, 4))
    out: Tensor = run(units, [(((0, 1.0),), 2)], torch.ones(2, 8), torch.full((2, 4), -0.0))
    assert torch.equal(out, torch.zeros(2, 4))
