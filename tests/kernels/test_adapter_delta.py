"""The adapter delta against its definition, for any mix of adapters, ranks, weights, runs and base-only tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta, add_embedding_delta
from motley_kernels.errors import DeviceError, ShapeError
from motley_kernels.testing import ROUTINGS, Members, Routing, assert_close, draw_sets, draw_unit
from torch import Generator, Tensor

RANKS = (1, 2, 3, 4, 7, 8, 13, 16, 24, 33, 64)
WIDTHS = ((64, 48), (48, 192), (40, 24), (33, 37), (5, 1), (192, 64))
NUM_SLOTS = 12


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Problem:
    """A drawn Linear with units, and sequences as (unit set, number of new tokens) with their inputs and outputs."""

    units: UnitTable
    sequences: list[tuple[Members, int]]
    x: Tensor
    y: Tensor

    def rows_of(self, kept: list[int]) -> Tensor:
        """Return the rows of the kept sequences, in the order given."""
        starts = [0]
        for _, length in self.sequences:
            starts.append(starts[-1] + length)
        return torch.tensor([row for n in kept for row in range(starts[n], starts[n + 1])], dtype=torch.int64)


def draw_table(in_features: int, out_features: int, generator: Generator, ranks: tuple[int, ...] = RANKS) -> UnitTable:
    """Draw a table where one slot in five has no unit, and those that have one differ in rank."""
    units = UnitTable(in_features, out_features)
    for slot in range(NUM_SLOTS):
        if slot % 5 != 4:
            rank = ranks[int(torch.randint(len(ranks), (), generator=generator))]
            units.bind(slot, draw_unit(rank, in_features, out_features, generator))
    return units


def draw_problem(
    seed: int, routing: Routing, widths: tuple[int, int], lengths: list[int], dtype: torch.dtype = torch.float32
) -> Problem:
    generator = Generator().manual_seed(seed)
    units = draw_table(*widths, generator)
    sets = draw_sets(routing, len(lengths), NUM_SLOTS, max_members=4, base_share=0.2, generator=generator)
    x = torch.randn(sum(lengths), widths[0], generator=generator).to(dtype)
    y = torch.randn(sum(lengths), widths[1], generator=generator).to(dtype)
    return Problem(units, list(zip(sets, lengths, strict=True)), x, y)


def run(units: UnitTable, batch: DeltaBatch, x: Tensor, y: Tensor, *, by_definition: bool = False) -> Tensor:
    out = y.clone()
    add_delta(out, x, units, batch, implementation="reference" if by_definition else "grouped")
    return out


LENGTHS = st.lists(st.sampled_from([1, 1, 1, 1, 2, 7, 8, 9, 21]), min_size=1, max_size=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), widths=st.sampled_from(WIDTHS), lengths=LENGTHS)
@settings(max_examples=25, deadline=None)
def test_grouped_equals_the_definition(
    dtype: torch.dtype, seed: int, routing: Routing, widths: tuple[int, int], lengths: list[int]
) -> None:
    problem = draw_problem(seed, routing, widths, lengths, dtype)
    batch = DeltaBatch.from_sequences(problem.sequences)
    expected = run(problem.units, batch, problem.x, problem.y, by_definition=True)
    assert_close(run(problem.units, batch, problem.x, problem.y), expected, dtype)


@given(
    seed=st.integers(0, 10**6),
    routing=st.sampled_from(ROUTINGS),
    widths=st.sampled_from([*WIDTHS, (768, 64), (64, 512)]),
    lengths=LENGTHS,
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_tokens_bits_do_not_depend_on_its_neighbours(
    seed: int, routing: Routing, widths: tuple[int, int], lengths: list[int], data: st.DataObject
) -> None:
    problem = draw_problem(seed, routing, widths, lengths)
    whole = run(problem.units, DeltaBatch.from_sequences(problem.sequences), problem.x, problem.y)
    kept = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    rows = problem.rows_of(kept)
    part = DeltaBatch.from_sequences([problem.sequences[n] for n in kept])
    for units in (problem.units, _copy_of(problem.units)):  # with the stacks of the whole batch, and with new ones
        assert torch.equal(run(units, part, problem.x[rows], problem.y[rows]), whole[rows])


@pytest.mark.parametrize(("widths", "rank"), [((768, 768), 16), ((768, 2048), 16), ((2048, 768), 8), ((768, 256), 5)])
def test_bits_do_not_depend_on_neighbours_at_real_widths(widths: tuple[int, int], rank: int) -> None:
    generator = Generator().manual_seed(rank)
    units = draw_table(*widths, generator, ranks=(rank,))
    sequences: list[tuple[Members, int]] = [
        (((slot, 1.0),), 1) for slot in (0, 1, 2, 3, 3, 3, 5, 0, 6, 7, 8, 10, 11, 2)
    ]
    sequences += [(((3, 1.0),), length) for length in (70, 9, 333, 10)] + [(((1, 1.0),), 8)]
    lengths = [length for _, length in sequences]
    x, y = torch.randn(sum(lengths), widths[0], generator=generator), torch.zeros(sum(lengths), widths[1])
    problem = Problem(units, sequences, x, y)
    whole = run(units, DeltaBatch.from_sequences(sequences), x, y)
    for n, sequence in enumerate(sequences):
        rows = problem.rows_of([n])
        alone = run(_copy_of(units), DeltaBatch.from_sequences([sequence]), x[rows], y[rows])
        assert torch.equal(alone, whole[rows])


@given(seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), lengths=LENGTHS)
@settings(max_examples=25, deadline=None)
def test_tokens_without_a_unit_keep_their_bits(seed: int, routing: Routing, lengths: list[int]) -> None:
    problem = draw_problem(seed, routing, (48, 64), lengths, torch.bfloat16)
    y = torch.full_like(problem.y, -0.0)  # to which even an added zero would show
    out = run(problem.units, DeltaBatch.from_sequences(problem.sequences), problem.x, y)
    for n, (members, _) in enumerate(problem.sequences):
        if not any(slot in problem.units.units for slot, _ in members):
            assert torch.equal(out[problem.rows_of([n])].view(torch.int16), y[problem.rows_of([n])].view(torch.int16))


@given(seed=st.integers(0, 10**6), lengths=LENGTHS, data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_nan_reaches_only_its_own_token(seed: int, lengths: list[int], data: st.DataObject) -> None:
    problem = draw_problem(seed, "skewed", (48, 64), lengths)
    sick = data.draw(st.integers(0, len(problem.x) - 1))
    batch = DeltaBatch.from_sequences(problem.sequences)
    expected = run(problem.units, batch, problem.x, problem.y)
    x = problem.x.clone()
    x[sick] = torch.nan
    out = run(problem.units, batch, x, problem.y)
    others = torch.arange(len(x)) != sick
    assert torch.equal(out[others], expected[others])


@given(seed=st.integers(0, 10**6), steps=st.integers(2, 12))
@settings(max_examples=25, deadline=None)
def test_churn_never_leaves_stale_factors(seed: int, steps: int) -> None:
    generator = Generator().manual_seed(seed)
    units = draw_table(40, 24, generator, ranks=(3, 8))
    batch = DeltaBatch.from_sets([])
    for step in range(steps):
        for slot in list(units.units):
            if float(torch.rand((), generator=generator)) < 0.3:
                gone = units.units[slot]
                units.unbind(slot)
                gone.a.fill_(torch.nan)
                gone.b.fill_(torch.nan)
        for slot in range(NUM_SLOTS):
            if slot not in units.units and float(torch.rand((), generator=generator)) < 0.5:
                units.bind(slot, draw_unit((3, 8)[slot % 2], 40, 24, generator))
        if step % 3 == 0 or not batch.num_tokens:  # otherwise the same batch meets other units
            batch = DeltaBatch.from_sets(draw_sets("uniform", 9, NUM_SLOTS, 3, 0.2, generator))
        x, y = torch.randn(9, 40, generator=generator), torch.randn(9, 24, generator=generator)
        expected = run(units, batch, x, y, by_definition=True)
        assert_close(run(units, batch, x, y), expected, torch.float32)


def test_two_batches_taking_turns_at_one_table_stay_right() -> None:
    generator = Generator().manual_seed(0)
    units = draw_table(64, 48, generator, ranks=(8,))
    batches = [DeltaBatch.from_sets([((slot, 1.0),) for slot in slots]) for slots in ([0, 1, 2, 3], [7, 3, 8], [5])]
    for batch in [*batches, *reversed(batches), *batches]:
        x, y = torch.randn(batch.num_tokens, 64, generator=generator), torch.zeros(batch.num_tokens, 48)
        assert_close(run(units, batch, x, y), run(units, batch, x, y, by_definition=True), torch.float32)


def test_a_change_of_one_adapter_copies_at_most_two_rows() -> None:
    generator = Generator().manual_seed(0)
    units = UnitTable(64, 48)
    for slot in range(20):
        units.bind(slot, draw_unit(8, 64, 48, generator))
    x = torch.randn(16, 64, generator=generator)
    slots = list(range(15))

    def copies_made() -> int:
        before = units.stacks[8].num_copies if units.stacks else 0
        run(
            units,
            DeltaBatch.from_sets([((slot, 1.0),) for slot in slots]),
            x[: len(slots)],
            torch.zeros(len(slots), 48),
        )
        return units.stacks[8].num_copies - before

    assert copies_made() == 15
    assert copies_made() == 0
    slots.append(15)
    assert copies_made() == 1, "one adapter came"
    slots[3] = 16
    assert copies_made() == 1, "one went and another came"
    del slots[5]
    assert copies_made() <= 1, "one went"


def test_stacks_are_freed_with_their_last_unit() -> None:
    generator = Generator().manual_seed(0)
    units = UnitTable(64, 48)
    for slot in range(3):
        units.bind(slot, draw_unit(8, 64, 48, generator))
    run(units, DeltaBatch.from_sets([((slot, 1.0),) for slot in range(3)]), torch.ones(3, 64), torch.zeros(3, 48))
    assert units.stacks
    for slot in range(3):
        units.unbind(slot)
    assert not units.stacks


def test_linears_of_one_structure_share_their_layout() -> None:
    generator = Generator().manual_seed(0)
    batch = DeltaBatch.from_sets([((slot, 1.0),) for slot in range(4)])
    for _ in range(5):
        units = UnitTable(64, 48)
        for slot in range(4):
            drawn = draw_unit(8, 64, 48, generator)
            units.bind(slot, DeltaUnit(drawn.a, drawn.b, 2.0))
        run(units, batch, torch.ones(4, 64), torch.zeros(4, 48))
    assert len(batch.layouts) == 5 + 1, "a plan for each Linear, one layout for all"


def test_runs_and_single_tokens_of_one_set_are_segments_apart() -> None:
    one, other = ((3, 1.0),), ((3, 1.0), (5, -0.5))
    batch = DeltaBatch.from_sequences([(one, 1), ((), 2), (one, 8), (other, 7), (one, 1), (one, 9)])
    assert batch.num_tokens == 28
    assert [(segment.members, segment.is_run, segment.token_indices.tolist()) for segment in batch.segments] == [
        (one, False, [0, 18]),
        (one, True, [*range(3, 11), *range(19, 28)]),
        (other, False, list(range(11, 18))),
    ]


def test_bfloat16_factors_are_used_at_their_value() -> None:
    generator = Generator().manual_seed(3)
    units = UnitTable(64, 48)
    for slot in range(4):
        units.bind(slot, draw_unit(8, 64, 48, generator, torch.bfloat16))
    batch = DeltaBatch.from_sequences([(((slot, 1.0),), 1 + 9 * (slot % 2)) for slot in range(4)])
    x, y = torch.randn(batch.num_tokens, 64, generator=generator), torch.zeros(batch.num_tokens, 48)
    assert_close(run(units, batch, x, y), run(units, batch, x, y, by_definition=True), torch.float32)


def test_bfloat16_output_is_rounded_once() -> None:
    units = UnitTable(1, 1)
    for slot in range(2):
        units.bind(slot, DeltaUnit(torch.ones(1, 1), torch.full((1, 1), 2.0**-8), 1.0))
    # Together a little over half of y's spacing; the sum rounded first, or each added by itself, is a tie and vanishes.
    members = ((0, 1.0), (1, 2.0**-10))
    for num_tokens in (1, 8):
        y = torch.ones(num_tokens, 1, dtype=torch.bfloat16)
        out = run(units, DeltaBatch.from_sequences([(members, num_tokens)]), torch.ones(num_tokens, 1), y)
        assert torch.equal(out, torch.full_like(y, 1 + 2.0**-7))


@pytest.mark.parametrize("num_tokens", [1, 8])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (1, 2, 3), (2, 1, 2)])
def test_members_are_summed_in_the_sets_order(num_tokens: int, ranks: tuple[int, int, int]) -> None:
    units = UnitTable(1, 1)
    for slot, (rank, delta) in enumerate(zip(ranks, (1.0, 2.0**24, -(2.0**24)), strict=True)):
        units.bind(slot, DeltaUnit(torch.ones(rank, 1), torch.full((1, rank), delta / rank), 1.0))
    for order, expected in (((0, 1, 2), 0.0), ((1, 2, 0), 1.0), ((2, 1, 0), 1.0), ((1, 0, 2), 0.0)):
        members = tuple((slot, 1.0) for slot in order)
        y = torch.zeros(num_tokens, 1)
        out = run(units, DeltaBatch.from_sequences([(members, num_tokens)]), torch.ones(num_tokens, 1), y)
        assert torch.equal(out, torch.full_like(y, expected))


def test_float64_is_not_narrowed() -> None:
    generator = Generator().manual_seed(0)
    unit = draw_unit(4, 16, 8, generator, torch.float64)
    units = UnitTable(16, 8)
    units.bind(0, unit)
    x, y = torch.randn(1, 16, generator=generator, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    add_delta(y, x, units, DeltaBatch.from_sets([((0, 1.0),)]))
    assert_close(y, unit.scaling * x @ unit.a.T @ unit.b.T, torch.float64)


@given(seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), lengths=LENGTHS)
@settings(max_examples=25, deadline=None)
def test_embedding_delta_equals_the_definition_and_ignores_neighbours(
    seed: int, routing: Routing, lengths: list[int]
) -> None:
    problem = draw_problem(seed, routing, (50, 48), lengths)
    ids = torch.randint(50, (sum(lengths),), generator=Generator().manual_seed(seed))
    batch = DeltaBatch.from_sequences(problem.sequences)
    out, expected = problem.y.clone(), problem.y.clone()
    add_embedding_delta(out, ids, problem.units, batch, 1.7)
    add_embedding_delta(expected, ids, problem.units, batch, 1.7, implementation="reference")
    assert_close(out, expected, torch.float32)
    one_hot = problem.y.clone()
    add_delta(one_hot, torch.nn.functional.one_hot(ids, 50) * 1.7, problem.units, batch, implementation="reference")
    assert_close(out, one_hot, torch.float32)
    for n, sequence in enumerate(problem.sequences):
        rows = problem.rows_of([n])
        alone = problem.y[rows]
        add_embedding_delta(alone, ids[rows], problem.units, DeltaBatch.from_sequences([sequence]), 1.7)
        assert torch.equal(alone, out[rows])


def test_disagreeing_shapes_and_devices_are_errors() -> None:
    units = UnitTable(8, 4)
    units.bind(0, DeltaUnit(torch.ones(2, 8), torch.ones(4, 2), 1.0))
    batch = DeltaBatch.from_sets([((0, 1.0),)] * 3)
    for y, x in (
        (torch.zeros(3, 4), torch.zeros(3, 7)),
        (torch.zeros(3, 5), torch.zeros(3, 8)),
        (torch.zeros(2, 4),) * 2,
    ):
        with pytest.raises(ShapeError):
            add_delta(y, x, units, batch)
    with pytest.raises(ShapeError):
        add_embedding_delta(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), units, batch)
    with pytest.raises(DeviceError):
        add_delta(torch.zeros(3, 4), torch.zeros(3, 8, device="meta"), units, batch)
    with pytest.raises(ShapeError):
        units.bind(1, DeltaUnit(torch.ones(2, 9), torch.ones(4, 2), 1.0))
    with pytest.raises(ShapeError):
        DeltaUnit(torch.ones(2, 8), torch.ones(4, 3), 1.0)
    with pytest.raises(ValueError, match="taken"):
        units.bind(0, DeltaUnit(torch.ones(2, 8), torch.ones(4, 2), 1.0))


def _copy_of(units: UnitTable) -> UnitTable:
    copy = UnitTable(units.in_features, units.out_features)
    for slot, unit in units.units.items():
        copy.bind(slot, unit)
    return copy
