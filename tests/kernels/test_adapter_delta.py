"""The adapter delta against its definition, for any mix of adapters, ranks, weights, runs and base-only tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from delta_problems import (
    NUM_SLOTS,
    WIDTHS,
    Problem,
    apply,
    copy_of,
    define,
    draw_problem,
    draw_table,
    pooled,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta, add_embedding_delta
from motley_kernels.errors import DeviceError, ShapeError
from motley_kernels.testing import (
    KINDS,
    ROUTINGS,
    Kind,
    Members,
    Routing,
    assert_close,
    draw_inputs,
    draw_kind,
    draw_sets,
    draw_unit,
)
from torch import Generator

LENGTHS = st.lists(st.sampled_from([1, 1, 1, 1, 2, 7, 8, 9, 21]), min_size=1, max_size=20)


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), widths=st.sampled_from(WIDTHS), lengths=LENGTHS)
@settings(max_examples=25, deadline=None)
def test_grouped_equals_the_definition_for_any_mix_of_kinds(
    dtype: torch.dtype, seed: int, routing: Routing, widths: tuple[int, int], lengths: list[int]
) -> None:
    problem = draw_problem(seed, routing, widths, lengths, dtype)
    batch = problem.batch
    expected = define(problem.units, batch, problem.x, problem.y)
    assert_close(apply(problem.units, batch, problem.x, problem.y), expected, dtype)
    assert_close(apply(pooled(problem.units), problem.batch, problem.x, problem.y), expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), widths=st.sampled_from(WIDTHS), lengths=LENGTHS)
@settings(max_examples=8, deadline=None)
def test_grouped_equals_the_definition_for_each_kind_alone(
    kind: Kind, seed: int, widths: tuple[int, int], lengths: list[int]
) -> None:
    problem = draw_problem(seed, "uniform", widths, lengths, kinds=(kind,))
    expected = define(problem.units, problem.batch, problem.x, problem.y)
    assert_close(apply(problem.units, problem.batch, problem.x, problem.y), expected, torch.float32)


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
    whole = apply(problem.units, problem.batch, problem.x, problem.y)
    kept = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    rows = problem.rows_of(kept)
    part = DeltaBatch.from_sequences([problem.sequences[n] for n in kept])
    for units in (problem.units, pooled(problem.units)):  # wherever the units lie
        assert torch.equal(apply(units, part, problem.x[rows], problem.y[rows]), whole[rows])


@pytest.mark.parametrize(
    ("widths", "rank", "kinds"),
    [
        ((768, 768), 16, ("lora",)),
        ((768, 2048), 16, ("lora", "goat")),
        ((2048, 768), 8, ("lora", "compact", "s2ft_input")),
        ((768, 256), 5, KINDS),
        ((768, 2048), 203, ("s2ft_output", "s2ft_input")),
    ],
)
def test_bits_do_not_depend_on_neighbours_at_real_widths(
    widths: tuple[int, int], rank: int, kinds: tuple[Kind, ...]
) -> None:
    generator = Generator().manual_seed(rank)
    units = draw_table(*widths, generator, ranks=(rank,), kinds=kinds)
    sequences: list[tuple[Members, int]] = [
        (((slot, 1.0),), 1) for slot in (0, 1, 2, 3, 3, 3, 5, 0, 6, 7, 8, 10, 11, 2)
    ]
    sequences += [(((3, 1.0),), length) for length in (70, 9, 333, 10)] + [(((1, 1.0), (2, 0.5)), 8)]
    lengths = [length for _, length in sequences]
    problem = Problem(
        units, sequences, draw_inputs(sum(lengths), widths[0], generator), torch.zeros(sum(lengths), widths[1])
    )
    whole = apply(units, problem.batch, problem.x, problem.y)
    for n, sequence in enumerate(sequences):
        rows = problem.rows_of([n])
        alone = apply(copy_of(units), DeltaBatch.from_sequences([sequence]), problem.x[rows], problem.y[rows])
        assert torch.equal(alone, whole[rows])


@given(seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), lengths=LENGTHS)
@settings(max_examples=25, deadline=None)
def test_tokens_without_a_unit_keep_their_bits(seed: int, routing: Routing, lengths: list[int]) -> None:
    problem = draw_problem(seed, routing, (48, 64), lengths, torch.bfloat16)
    y = torch.full_like(problem.y, -0.0)  # to which even an added zero would show
    out = apply(problem.units, problem.batch, problem.x, y)
    for n, (members, _) in enumerate(problem.sequences):
        if not any(slot in problem.units.units for slot, _ in members):
            assert torch.equal(out[problem.rows_of([n])].view(torch.int16), y[problem.rows_of([n])].view(torch.int16))


@given(seed=st.integers(0, 10**6), lengths=LENGTHS, data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_nan_reaches_only_its_own_token_and_no_later_step(seed: int, lengths: list[int], data: st.DataObject) -> None:
    problem = draw_problem(seed, "skewed", (48, 64), lengths)
    sick = data.draw(st.integers(0, len(problem.x) - 1))
    batch = problem.batch
    expected = apply(problem.units, batch, problem.x, problem.y)
    x = problem.x.clone()
    x[sick] = torch.nan
    out = apply(problem.units, batch, x, problem.y)
    others = torch.arange(len(x)) != sick
    assert torch.equal(out[others], expected[others])
    assert torch.equal(apply(problem.units, batch, problem.x, problem.y), expected)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_unit_of_nan_reaches_only_the_tokens_that_use_it(seed: int) -> None:
    problem = draw_problem(seed, "uniform", (48, 64), [1, 1, 1, 2, 8, 1, 9, 1, 1])
    expected = apply(problem.units, problem.batch, problem.x, problem.y)
    sick = max(problem.units.units)
    poisoned = copy_of(problem.units)
    poisoned.unbind(sick)
    unit = problem.units.units[sick]
    poisoned.bind(sick, unit.with_tensors(t * torch.nan if t.is_floating_point() else t for t in unit.tensors))
    out = apply(poisoned, problem.batch, problem.x, problem.y)
    for n, (members, _) in enumerate(problem.sequences):
        if sick not in dict(members):
            assert torch.equal(out[problem.rows_of([n])], expected[problem.rows_of([n])])


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
                for tensor in gone.tensors:
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
        for slot in range(NUM_SLOTS):
            if slot not in units.units and float(torch.rand((), generator=generator)) < 0.5:
                units.bind(slot, draw_kind(KINDS[(slot + step) % len(KINDS)], (3, 8)[slot % 2], 40, 24, generator))
        if step % 3 == 0 or not batch.num_tokens:  # otherwise the same batch meets other units
            batch = DeltaBatch.from_sets(draw_sets("uniform", 9, NUM_SLOTS, 3, 0.2, generator))
        x, y = draw_inputs(9, 40, generator), torch.randn(9, 24, generator=generator)
        assert_close(apply(units, batch, x, y), define(units, batch, x, y), torch.float32)


def test_bfloat16_factors_are_used_at_their_value() -> None:
    generator = Generator().manual_seed(3)
    units = UnitTable(64, 48)
    for slot in range(4):
        units.bind(slot, draw_unit(8, 64, 48, generator, torch.bfloat16))
    batch = DeltaBatch.from_sequences([(((slot, 1.0),), 1 + 9 * (slot % 2)) for slot in range(4)])
    x, y = torch.randn(batch.num_tokens, 64, generator=generator), torch.zeros(batch.num_tokens, 48)
    assert_close(apply(units, batch, x, y), define(units, batch, x, y), torch.float32)


def test_bfloat16_output_is_rounded_once() -> None:
    units = UnitTable(1, 1)
    for slot in range(2):
        units.bind(slot, DeltaUnit(torch.ones(1, 1), torch.full((1, 1), 2.0**-8), 1.0))
    # Together a little over half of y's spacing; the sum rounded first, or each added by itself, is a tie and vanishes.
    members = ((0, 1.0), (1, 2.0**-10))
    for num_tokens in (1, 8):
        y = torch.ones(num_tokens, 1, dtype=torch.bfloat16)
        out = apply(units, DeltaBatch.from_sequences([(members, num_tokens)]), torch.ones(num_tokens, 1), y)
        assert torch.equal(out, torch.full_like(y, 1 + 2.0**-7))


@pytest.mark.parametrize("num_tokens", [1, 8])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (1, 2, 4), (2, 1, 2)])
def test_members_are_summed_in_the_sets_order(num_tokens: int, ranks: tuple[int, int, int]) -> None:
    units = UnitTable(1, 1)
    for slot, (rank, delta) in enumerate(zip(ranks, (1.0, 2.0**24, -(2.0**24)), strict=True)):
        units.bind(slot, DeltaUnit(torch.ones(rank, 1), torch.full((rank, 1), delta / rank), 1.0))
    for order, expected in (((0, 1, 2), 0.0), ((1, 2, 0), 1.0), ((2, 1, 0), 1.0), ((1, 0, 2), 0.0)):
        members = tuple((slot, 1.0) for slot in order)
        y = torch.zeros(num_tokens, 1)
        out = apply(units, DeltaBatch.from_sequences([(members, num_tokens)]), torch.ones(num_tokens, 1), y)
        assert torch.equal(out, torch.full_like(y, expected))


def test_float64_is_not_narrowed() -> None:
    generator = Generator().manual_seed(0)
    unit = draw_unit(4, 16, 8, generator, torch.float64)
    units = UnitTable(16, 8)
    units.bind(0, unit)
    x, y = torch.randn(1, 16, generator=generator, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
    add_delta(y, x, units, DeltaBatch.from_sets([((0, 1.0),)]))
    assert unit.a is not None
    assert unit.b is not None
    assert_close(y, unit.scaling * x @ unit.a.T @ unit.b, torch.float64)


@given(seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), lengths=LENGTHS)
@settings(max_examples=25, deadline=None)
def test_embedding_delta_equals_the_definition_and_ignores_neighbours(
    seed: int, routing: Routing, lengths: list[int]
) -> None:
    problem = draw_problem(seed, routing, (50, 48), lengths, kinds=("lora", "residual"))
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
    units.bind(0, DeltaUnit(torch.ones(2, 8), torch.ones(2, 4), 1.0))
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
        units.bind(1, DeltaUnit(torch.ones(2, 9), torch.ones(2, 4), 1.0))
    with pytest.raises(ShapeError):
        DeltaUnit(torch.ones(2, 8), torch.ones(3, 4), 1.0)
    with pytest.raises(ValueError, match="taken"):
        units.bind(0, DeltaUnit(torch.ones(2, 8), torch.ones(2, 4), 1.0))
