"""The adapter delta in plain torch: the path on CPUs and on devices without a kernel of ours.

Semantics are those of `reference`; what differs is the order of work. Single tokens are multiplied one row at a time in
batched products over stacked units, never several rows of one unit at once: a one-row product has the same bits
wherever it stands, whatever stands beside it, and reads a unit just as fast. Runs (prefill) take one plain product per
unit. The engine thread runs it; its scratch lives in the batch and in the unit table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from motley_kernels.adapter_delta.layout import RUN_PADDING, Layout, Place, make_layout
from motley_kernels.adapter_delta.stacks import RankStack, aligned, stack_view
from motley_kernels.adapter_delta.types import DeltaBatch, DeltaUnit, UnitTable


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """One batch at one Linear, ready to run: views of the factors for each product of the layout.

    Semantics: `launches` and `runs` are (A^T, B^T, first item, end); `stacks` are those looked at, with the version
    that the views belong to. A plan without a layout is that of a batch none of whose members has a unit here.
    """

    generation: int
    stacks: tuple[tuple[RankStack, int], ...]
    layout: Layout | None
    launches: tuple[tuple[Tensor, Tensor, int, int], ...] = ()
    runs: tuple[tuple[Tensor, Tensor, int, int], ...] = ()


def add_delta(y: Tensor, x: Tensor, units: UnitTable, batch: DeltaBatch) -> None:
    """Add each token's adapter delta to `y`, in place; see the package's `add_delta`."""
    plan = _plan_for(units, batch)
    layout = plan.layout
    if layout is None:
        return
    rows = x if layout.sources is None else x.index_select(0, layout.sources)
    rows = rows.to(torch.float32)
    if aligned(units.in_features) != units.in_features:
        rows = pad(rows, (0, aligned(units.in_features) - units.in_features))
    deltas = _multiply(rows.unsqueeze(1), plan, layout, aligned(units.out_features))
    _sum_into(y, deltas[:, : units.out_features], layout)


def add_embedding_delta(y: Tensor, input_ids: Tensor, units: UnitTable, batch: DeltaBatch, output_scale: float) -> None:
    """Add each token's embedding delta to `y`, in place; see the package's `add_embedding_delta`."""
    for segment in batch.segments:
        members = [(units.units[slot], weight) for slot, weight in segment.members if slot in units.units]
        if not members:
            continue
        tokens = segment.token_indices
        ids = input_ids.index_select(0, tokens)
        total: Tensor | None = None
        for unit, weight in members:
            hidden = unit.a.index_select(1, ids).t().to(torch.float32) * (weight * unit.scaling * output_scale)
            factor = unit.b.to(torch.float32).t().expand(len(tokens), -1, -1)
            delta = torch.bmm(hidden.unsqueeze(1), factor).squeeze(1)
            total = delta if total is None else total.add_(delta)
        assert total is not None
        y.index_copy_(0, tokens, y.index_select(0, tokens).add_(total))


def _multiply(rows: Tensor, plan: Plan, layout: Layout, out_features: int) -> Tensor:
    """Return every item's scaled delta, [items, O'] float32."""
    if len(plan.launches) == 1 and not plan.runs:
        a, b, _, _ = plan.launches[0]
        return torch.bmm(torch.bmm(rows, a).mul_(layout.scales), b).squeeze(1)
    deltas = rows.new_empty(layout.num_items, 1, out_features)
    for a, b, start, stop in plan.launches:
        hidden = torch.bmm(rows[start:stop], a).mul_(layout.scales[start:stop])
        torch.bmm(hidden, b, out=deltas[start:stop])
    deltas = deltas.squeeze(1)
    for (a, b, start, stop), run in zip(plan.runs, layout.runs, strict=True):
        hidden = torch.mm(rows[start:stop].squeeze(1), a).mul_(run.scale)
        torch.mm(hidden, b, out=deltas[start:stop])
    return deltas


def _sum_into(y: Tensor, deltas: Tensor, layout: Layout) -> None:
    """Sum the items of each target in its set's order, and add the sums to `y` with one rounding."""
    first = layout.passes[0]
    total = deltas if first is None else deltas.index_select(0, first)
    for items in layout.passes[1:]:
        assert items is not None, "a later pass never holds every item"
        total[: len(items)].add_(deltas.index_select(0, items))
    if layout.target_range is not None:
        start, stop = layout.target_range
        y[start:stop].add_(total)
    else:
        y.index_copy_(0, layout.targets, y.index_select(0, layout.targets).add_(total))


def _plan_for(units: UnitTable, batch: DeltaBatch) -> Plan:
    """Return the plan of this batch here, made anew if a unit or a stack's row has changed since."""
    plan = batch.layouts.get(units)
    if (
        isinstance(plan, Plan)
        and plan.generation == units.generation
        and all(stack.version == version for stack, version in plan.stacks)
    ):
        return plan
    plan = _make_plan(units, batch)
    batch.layouts[units] = plan
    return plan


def _make_plan(units: UnitTable, batch: DeltaBatch) -> Plan:
    stacks = _hold_units(units, batch)
    places = tuple(
        tuple(
            Place(slot, unit.rank, -1 if segment.is_run else stacks[unit.rank].rows[unit], weight * unit.scaling)
            for slot, weight in segment.members
            if (unit := units.units.get(slot)) is not None
        )
        for segment in batch.segments
    )
    versions = tuple((stack, stack.version) for stack in stacks.values())
    if not any(places):
        return Plan(units.generation, versions, None)
    layout = batch.layouts.get(places)
    if not isinstance(layout, Layout):
        layout = make_layout(batch, places)
        batch.layouts[places] = layout
    launches = tuple(
        (*stack_view(stacks[it.rank], it.row, it.num_rows, it.stop - it.start), it.start, it.stop)
        for it in layout.launches
    )
    runs = tuple((*_run_factors(units.units[run.slot]), run.start, run.stop) for run in layout.runs)
    return Plan(units.generation, versions, layout, launches, runs)


def _hold_units(units: UnitTable, batch: DeltaBatch) -> dict[int, RankStack]:
    """Bring the units of single tokens into the stacks of their ranks.

    Semantics: units of runs keep a row that they have, as they will be wanted when the run ends.
    """
    singles: dict[int, list[DeltaUnit]] = {}
    others: list[DeltaUnit] = []
    for segment in batch.segments:
        for slot, _ in segment.members:
            if (unit := units.units.get(slot)) is not None:
                (others if segment.is_run else singles.setdefault(unit.rank, [])).append(unit)
    held = {}
    for rank, wanted in singles.items():
        stack = units.stacks.get(rank)
        if stack is None:
            stack = RankStack(rank, units.in_features, units.out_features, wanted[0].a.device)
            units.stacks[rank] = stack
        stack.hold(wanted, also_keep=others)
        held[rank] = stack
    return held


def _run_factors(unit: DeltaUnit) -> tuple[Tensor, Tensor]:
    """Return A^T [I', R'] and B^T [R', O'] of a unit, without a copy where it is aligned and in float32 already."""
    a, b = unit.a.to(torch.float32), unit.b.to(torch.float32)
    more_rank = -unit.rank % RUN_PADDING
    more_in, more_out = aligned(a.shape[1]) - a.shape[1], aligned(b.shape[0]) - b.shape[0]
    if more_rank or more_in:
        a = pad(a, (0, more_in, 0, more_rank))
    if more_rank or more_out:
        b = pad(b, (0, more_rank, 0, more_out))
    return a.t(), b.t()
