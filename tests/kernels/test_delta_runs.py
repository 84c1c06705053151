"""Runs of tokens over units of awkward sizes: nothing of a unit is kept twice, and bits know no number of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from delta_problems import pooled, table_of
from motley_kernels.adapter_delta import DeltaUnit, Segment
from motley_kernels.adapter_delta.runs import Run, add_run, make_member, make_rows
from motley_kernels.testing import KINDS, Kind, draw_inputs, draw_kind
from torch import Generator, Tensor

NUM_TOKENS = 333
AWKWARD = [(5, 100, 100), (5, 33, 37), (203, 768, 256), (13, 48, 5), (4, 2049, 64), (8, 5, 1), (24, 767, 768)]


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def run_of(tokens: Tensor, *units: DeltaUnit) -> Run:
    members = tuple((slot, 1.0) for slot in range(len(units)))
    return Run(make_rows(Segment(members, tokens, is_run=True)), tuple(make_member(unit, 0.5) for unit in units))


def tensors_in(held: object) -> Iterator[Tensor]:
    """Return every tensor of a dataclass, its tuples and their dataclasses."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, tuple):
        for one in held:
            yield from tensors_in(one)
    elif dataclasses.is_dataclass(held):
        for field in dataclasses.fields(held):
            yield from tensors_in(getattr(held, field.name))


@pytest.mark.parametrize("rank", [5, 203])
def test_a_run_holds_nothing_of_a_factors_size_beside_the_pool(rank: int) -> None:
    generator = Generator().manual_seed(0)
    drawn = [draw_kind(kind, rank, 500, 300, generator) for kind in KINDS]
    units = list(pooled(table_of(*drawn, sides=(500, 300))).units.values())
    memory = units[0].tensors[0].untyped_storage().data_ptr()
    run = run_of(torch.arange(9), *units)
    y = torch.zeros(9, 300)
    add_run(y, draw_inputs(9, 500, generator), run)
    assert y.count_nonzero()
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors_in(run.members)}
    assert held.pop(memory), "the members name the pool"
    assert sum(held.values()) < 100 * len(units), "no more than a flag for each expert"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "in_features", "out_features"), AWKWARD)
def test_bits_do_not_depend_on_how_many_tokens_there_are(
    kind: Kind, rank: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    generator = Generator().manual_seed(rank)
    unit = draw_kind(kind, rank, in_features, out_features, generator, dtype)
    x, y = draw_inputs(NUM_TOKENS, in_features, generator), torch.zeros(NUM_TOKENS, out_features)
    whole = y.clone()
    add_run(whole, x, run_of(torch.arange(NUM_TOKENS), unit))
    for first, count in ((0, 8), (3, 9), (40, 70), (1, 256), (NUM_TOKENS - 21, 21)):
        rows = torch.arange(first, first + count)
        alone = y.clone()
        add_run(alone, x, run_of(rows, unit))
        assert torch.equal(alone[rows], whole[rows]), f"{count} tokens"
