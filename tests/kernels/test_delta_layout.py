"""Layouts: every product and every output of every (token, member) pair is named once, and nothing else is."""

from __future__ import annotations

import numpy as np
import torch
from delta_problems import draw_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_kernels.adapter_delta import DeltaBatch, UnitTable
from motley_kernels.adapter_delta.layout import ALL, Form, Layout, Member, make_layout
from motley_kernels.testing import ROUTINGS, Routing

LORA = Form(3, True, True, ALL, ALL, 0, 0)
EXPERTS = Form(4, True, True, ALL, ALL, 2, 1)
S2FT_INPUT = Form(5, False, True, 5, ALL, 0, 0)
S2FT_OUTPUT = Form(2, True, False, ALL, 2, 0, 0)
COMPACT = Form(3, True, True, 6, 7, 0, 0)


def laid_out(sets: list[tuple[Member, ...]], sides: tuple[int, int] = (10, 20)) -> Layout:
    batch = DeltaBatch.from_sets(tuple((one.slot, one.scale) for one in members) for members in sets)
    by_members = {tuple((one.slot, one.scale) for one in members): members for members in sets}
    members = [by_members[segment.members] for segment in batch.segments]
    return make_layout(batch.segments, members, batch.num_tokens, sides)


def test_plain_units_need_neither_gathers_nor_selections() -> None:
    layout = laid_out([(Member(slot, 2.0, LORA),) for slot in (4, 1, 4)])
    (shrink,), (expand,) = layout.shrinks, layout.expands
    assert shrink.offsets.tolist() == [0, 3, 6, 9]
    assert shrink.rows.factors == ((1, "a"), (4, "a"))
    assert shrink.rows.indices(np.array([100, 200])).tolist() == [200, 201, 202, 100, 101, 102, 200, 201, 202]
    assert expand.rows is not None
    assert expand.rows.factors == ((1, "b"), (4, "b"))
    assert expand.takes is None
    assert expand.shares is None
    assert expand.channels is None
    assert expand.offsets.tolist() == [0, 3, 6]
    assert expand.scales.tolist() == [2.0] * 9
    assert layout.is_whole


def test_base_only_tokens_at_the_ends_leave_a_range_and_between_a_selection() -> None:
    one = (Member(1, 1.0, LORA),)
    layout = laid_out([(), one, one, ()])
    assert (layout.targets.tolist(), layout.span, layout.is_whole) == ([1, 2], (1, 3), False)
    layout = laid_out([one, (), one])
    assert (layout.targets.tolist(), layout.span, layout.is_whole) == ([0, 2], None, False)


def test_routers_share_the_product_of_the_factors() -> None:
    layout = laid_out([(Member(1, 1.0, EXPERTS), Member(2, 1.0, LORA)), (Member(1, 1.0, EXPERTS),)])
    (shrink,) = layout.shrinks
    assert shrink.offsets.tolist() == [0, 4 + 2 + 3, 4 + 2 + 3 + 4 + 2]
    assert layout.gates is not None
    assert layout.gates.logits.tolist() == [4, 5, 13, 14]
    (expand,) = layout.expands
    assert expand.takes is not None
    assert expand.takes.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12]
    assert expand.shares is not None
    assert expand.shares.tolist() == [0, 0, 1, 1, 4, 4, 4, 2, 2, 3, 3]  # the last is the 1 of those ungated


def test_channels_are_addressed_in_their_tokens_row() -> None:
    layout = laid_out([(Member(1, 1.0, S2FT_OUTPUT),), (Member(3, 1.0, S2FT_INPUT), Member(2, 1.0, COMPACT))])
    assert layout.copies is not None
    channels = torch.tensor([1, 3, 5, 7, 9])
    assert layout.copies.slots == (3,)
    assert layout.copies.indices([channels]).tolist() == [11, 13, 15, 17, 19]
    whole, scattered, kept = layout.expands
    assert whole.channels is None
    assert whole.offsets.tolist() == [0, 0]  # the first token has no rows to sum
    assert scattered.rows is None
    assert scattered.channels is not None
    assert scattered.channels.indices([torch.tensor([4, 8])]).tolist() == [4, 8]
    assert kept.channels is not None
    assert kept.channels.indices([torch.arange(7)]).tolist() == list(range(20, 27))


@given(
    seed=st.integers(0, 10**6),
    routing=st.sampled_from(ROUTINGS),
    lengths=st.lists(st.sampled_from([1, 2, 7]), min_size=1, max_size=9),
)
@settings(max_examples=30, deadline=None)
def test_every_product_is_consumed_once(seed: int, routing: Routing, lengths: list[int]) -> None:
    problem = draw_problem(seed, routing, (33, 37), lengths)
    batch, units = problem.batch, problem.units
    sets = [
        tuple(Member(slot, weight, form_of(units, slot)) for slot, weight in segment.members if slot in units.units)
        for segment in batch.segments
    ]
    if not any(sets):
        return
    layout = make_layout(batch.segments, sets, batch.num_tokens, (33, 37))
    num_products = sum(len(shrink.products) for shrink in layout.shrinks)
    num_products += 0 if layout.copies is None else len(layout.copies.picks)
    used = np.zeros(num_products, dtype=np.int64)
    for expand in layout.expands:
        np.add.at(used, slice(None) if expand.takes is None else expand.takes.numpy(), 1)
    if layout.gates is not None:
        real = torch.ones_like(layout.gates.beyond) if layout.gates.padding is None else ~layout.gates.padding
        np.add.at(used, layout.gates.logits[real.flatten()].numpy(), 1)
    assert (used == 1).all()
    expected = sum(
        len(segment.token_indices) * sum(one.form.rank + one.form.num_experts for one in members)
        for segment, members in zip(batch.segments, sets, strict=True)
    )
    assert num_products == expected


def form_of(units: UnitTable, slot: int) -> Form:
    unit = units.units[slot]
    return Form(
        unit.rank,
        unit.a is not None,
        unit.b is not None,
        ALL if unit.inputs is None else len(unit.inputs),
        ALL if unit.outputs is None else len(unit.outputs),
        0 if unit.gate is None else unit.gate.num_experts,
        0 if unit.gate is None else unit.gate.top_k,
    )
