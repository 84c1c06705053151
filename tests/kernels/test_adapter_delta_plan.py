"""What the torch path derives from a batch: when it is made, what it shares, and that adapters cost no operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from delta_problems import apply, copy_of, define, draw_problem, draw_table, pooled, table_of
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta
from motley_kernels.adapter_delta.pool import UnitPool, write_units
from motley_kernels.testing import KINDS, Kind, assert_close, draw_inputs, draw_kind, draw_unit
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountedCalls(TorchDispatchMode):
    """Counts every operator that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def calls_of(kinds: tuple[Kind, ...], num_units: int, num_members: int) -> list[str]:
    """Return what a step over so many distinct units, single tokens all, runs of torch once it has been planned."""
    generator = Generator().manual_seed(0)
    table = table_of(
        *(draw_kind(kinds[n % len(kinds)], 8, 48, 40, generator) for n in range(num_units)), sides=(48, 40)
    )
    sets = [tuple(((n + k) % num_units, 1.0) for k in range(num_members)) for n in range(num_units)]
    batch = DeltaBatch.from_sets(sets)
    x, y = draw_inputs(num_units, 48, generator), torch.zeros(num_units, 40)
    table = pooled(table)
    add_delta(y, x, table, batch, implementation="grouped")
    with CountedCalls() as counted:
        add_delta(y, x, table, batch, implementation="grouped")
    return counted.names


def test_single_tokens_run_no_operator_of_torch() -> None:
    assert calls_of(KINDS, 16, num_members=3) == []


def test_units_in_one_pool_are_not_copied() -> None:
    units = pooled(draw_table(48, 40, Generator().manual_seed(0), kinds=KINDS))
    batch = DeltaBatch.from_sets([((slot, 1.0),) for slot in units.units])
    x, y = torch.ones(batch.num_tokens, 48), torch.zeros(batch.num_tokens, 40)
    assert not torch.equal(apply(units, batch, x, y), y)
    for unit in units.units.values():
        for tensor in unit.tensors:
            if tensor.is_floating_point():
                tensor.zero_()
    assert torch.equal(apply(units, batch, x, y), y), "what is read is the pool itself"


@pytest.mark.parametrize("kind", KINDS)
def test_where_units_lie_does_not_change_a_bit(kind: Kind) -> None:
    problem = draw_problem(5, "uniform", (48, 40), [1] * 9 + [8, 9], kinds=(kind,))
    loose = apply(problem.units, problem.batch, problem.x, problem.y)
    in_pool = apply(pooled(problem.units), problem.batch, problem.x, problem.y)
    assert torch.equal(loose, in_pool)
    halves = copy_of(problem.units)  # some in a pool, some not
    for slot, unit in list(pooled(problem.units).units.items())[::2]:
        halves.unbind(slot)
        halves.bind(slot, unit)
    assert torch.equal(apply(halves, problem.batch, problem.x, problem.y), loose)


def test_views_that_are_no_whole_rows_are_read_right() -> None:
    generator = Generator().manual_seed(0)
    memory = torch.randn(4000, generator=generator)
    whole = DeltaUnit(memory[48:432].view(8, 48), memory[440:760].view(8, 40), 1.0)
    shifted = DeltaUnit(memory[49:433].view(8, 48), memory[440:760].view(8, 40), 1.0)
    turned = DeltaUnit(memory[480:864].view(48, 8).T, memory[440:760].view(8, 40), 1.0)
    x, y = draw_inputs(2, 48, generator), torch.zeros(2, 40)
    for unit in (whole, shifted, turned):
        units = table_of(unit, whole, sides=(48, 40))
        batch = DeltaBatch.from_sets([((0, 1.0),), ((0, 1.0), (1, 2.0))])
        assert_close(apply(units, batch, x, y), define(units, batch, x, y), torch.float32)


def test_a_pool_in_a_narrower_dtype_is_read_at_its_value() -> None:
    problem = draw_problem(7, "uniform", (48, 40), [1] * 6)
    given = list(problem.units.units.values())
    pool = UnitPool(1 << 20, device=torch.device("cpu"), dtype=torch.bfloat16)
    placed = pool.place(0, given)
    write_units(placed, given)
    units = UnitTable(48, 40)
    for slot, unit in zip(problem.units.units, placed, strict=True):
        units.bind(slot, unit)
    expected = define(units, problem.batch, problem.x, problem.y)
    assert_close(apply(units, problem.batch, problem.x, problem.y), expected, torch.float32)


def test_another_unit_under_a_slot_is_seen_by_the_same_batch() -> None:
    generator = Generator().manual_seed(0)
    units = table_of(*(draw_unit(4, 16, 8, generator) for _ in range(3)), sides=(16, 8))
    batch = DeltaBatch.from_sets([((slot, 1.0),) for slot in range(3)])
    x, y = draw_inputs(3, 16, generator), torch.zeros(3, 8)
    before = apply(units, batch, x, y)
    units.unbind(1)
    assert torch.equal(apply(units, batch, x, y)[1], y[1])
    units.bind(1, draw_unit(4, 16, 8, generator))
    after = apply(units, batch, x, y)
    assert_close(after, define(units, batch, x, y), torch.float32)
    assert not torch.equal(after[1], before[1])
    assert torch.equal(after[::2], before[::2])
    outlived = units.plan
    units.unbind(1)
    units.bind(1, draw_unit(4, 16, 8, generator))
    units.plan = outlived
    assert_close(apply(units, batch, x, y), define(units, batch, x, y), torch.float32)


def test_two_batches_taking_turns_at_one_table_stay_right() -> None:
    generator = Generator().manual_seed(0)
    units = draw_table(64, 48, generator, ranks=(8,))
    batches = [DeltaBatch.from_sets([((slot, 1.0),) for slot in slots]) for slots in ([0, 1, 2, 3], [7, 3, 8], [5])]
    for batch in [*batches, *reversed(batches), *batches]:
        x, y = draw_inputs(batch.num_tokens, 64, generator), torch.zeros(batch.num_tokens, 48)
        assert_close(apply(units, batch, x, y), define(units, batch, x, y), torch.float32)


def test_linears_of_one_structure_share_their_layout() -> None:
    generator = Generator().manual_seed(0)
    batch = DeltaBatch.from_sets([((slot, 1.0),) for slot in range(4)])
    tables = []
    for _ in range(5):
        drawn = [draw_unit(8, 64, 48, generator) for _ in range(4)]
        tables.append(table_of(*(DeltaUnit(one.a, one.b, 2.0) for one in drawn), sides=(64, 48)))
    x = draw_inputs(4, 64, generator)
    for _ in range(2):
        for units in tables:
            y = torch.zeros(4, 48)
            assert_close(apply(units, batch, x, y), define(units, batch, x, y), torch.float32)
    assert len(batch.layouts) == 1


def test_a_plan_made_in_inference_mode_serves_outside_it() -> None:
    problem = draw_problem(2, "uniform", (48, 40), [1] * 8 + [9])
    batch = problem.batch
    with torch.inference_mode():
        inside = apply(problem.units, batch, problem.x, problem.y)
    assert torch.equal(apply(problem.units, batch, problem.x, problem.y), inside)


@pytest.mark.parametrize("length", [1, 9])
def test_an_arrival_is_awaited_once_before_first_use(length: int) -> None:
    generator = Generator().manual_seed(0)
    given, late = draw_unit(4, 16, 8, generator), draw_unit(4, 16, 8, generator)
    awaited: list[int] = []

    def arrive() -> None:
        awaited.append(1)
        write_units([late], [given])

    units = UnitTable(16, 8)
    units.bind(0, DeltaUnit(late.a, late.b, 1.0), arrive)
    units.bind(1, DeltaUnit(given.a, given.b, 1.0), lambda: awaited.append(2))
    batch = DeltaBatch.from_sequences([(((0, 1.0),), length)])
    x, y = draw_inputs(length, 16, generator), torch.zeros(length, 8)
    first = apply(units, batch, x, y)
    apply(units, batch, x, y)
    apply(units, DeltaBatch.from_sequences([(((0, 1.0),), length)]), x, y)
    assert awaited == [1]
    assert given.a is not None
    assert given.b is not None
    assert_close(first, x @ given.a.T @ given.b, torch.float32)


def test_a_change_of_one_adapter_looks_at_no_other_again() -> None:
    generator = Generator().manual_seed(0)
    units = table_of(*(draw_unit(8, 64, 48, generator) for _ in range(5)), sides=(64, 48))
    x, y = draw_inputs(4, 64, generator), torch.zeros(4, 48)

    def found(slots: list[int]) -> dict[int, object]:
        apply(units, DeltaBatch.from_sets([((slot, 1.0),) for slot in slots]), x[: len(slots)], y[: len(slots)])
        return dict(units.plan.found)  # type: ignore[union-attr]

    before, after = found([0, 1, 2, 3]), found([0, 4, 2])
    assert before[0] is after[0]
    assert before[2] is after[2]
    assert set(after) == {0, 2, 4}


def test_runs_and_single_tokens_of_one_set_are_segments_apart() -> None:
    one, other = ((3, 1.0),), ((3, 1.0), (5, -0.5))
    batch = DeltaBatch.from_sequences([(one, 1), ((), 2), (one, 8), (other, 7), (one, 1), (one, 9)])
    assert batch.num_tokens == 28
    assert [(segment.members, segment.is_run, segment.token_indices.tolist()) for segment in batch.segments] == [
        (one, False, [0, 18]),
        (one, True, [*range(3, 11), *range(19, 28)]),
        (other, False, list(range(11, 18))),
    ]


def test_every_set_may_be_taken_as_a_run() -> None:
    # As on a device without a kernel of ours.
    problem = draw_problem(3, "uniform", (33, 37), [1, 1, 2, 1, 9, 1, 3, 1])
    segments = tuple(replace(segment, is_run=True) for segment in problem.batch.segments)
    as_runs = DeltaBatch(problem.batch.num_tokens, segments)
    expected = define(problem.units, problem.batch, problem.x, problem.y)
    assert_close(apply(problem.units, as_runs, problem.x, problem.y), expected, torch.float32)


def test_nothing_a_step_makes_is_as_large_as_the_linear() -> None:
    generator = Generator().manual_seed(0)
    units = pooled(table_of(*(draw_kind(kind, 8, 128, 96, generator) for kind in KINDS), sides=(128, 96)))
    batch = DeltaBatch.from_sequences([(((slot, 1.0),), 1) for slot in units.units] + [(((0, 1.0), (3, 0.5)), 8)])
    x, y = draw_inputs(batch.num_tokens, 128, generator), torch.zeros(batch.num_tokens, 96)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(  # type: ignore[no-untyped-def]
            self, func, types, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> object:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            is_new = isinstance(made, Tensor) and made.layout == torch.strided and not func.is_view
            if is_new and not any(isinstance(one, Tensor) and made is one for one in args):
                largest = max(largest, made.untyped_storage().nbytes() // 4)
            return made

    with Sizes():
        apply(units, batch, x, y)
    assert 0 < largest < 96 * 128 // 4
