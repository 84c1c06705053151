"""The adapter delta on CPUs, and on devices without a kernel of ours.

Semantics are those of `reference`; what differs is the order of work. Single tokens go through one compiled loop,
whatever kinds and ranks their units have: no row is copied, padded or moved, and a token's bits depend on its own rows
alone. Runs (prefill) take plain products. The engine thread runs it; what it derives lies in the unit table and in the
batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from motley_kernels.adapter_delta.places import Found, Member, find_unit
from motley_kernels.adapter_delta.reference import embedding_factors
from motley_kernels.adapter_delta.runs import Run, RunRows, add_run, make_member, make_rows
from motley_kernels.adapter_delta.types import DeltaBatch, Segment, UnitTable

if TYPE_CHECKING:
    from motley_kernels.adapter_delta.singles import Singles


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """One batch at one Linear, ready to run; without `singles` no single token has a unit here.

    `found` is what was looked up, by slot: a later plan takes from it what is still the same unit.
    """

    batch: DeltaBatch
    generation: int
    singles: Singles | None
    runs: tuple[Run, ...]
    found: dict[int, Found]


def add_delta(y: Tensor, x: Tensor, units: UnitTable, batch: DeltaBatch) -> None:
    """Add each token's adapter delta to `y`, in place; see the package's `add_delta`."""
    plan = units.plan
    if not isinstance(plan, Plan) or plan.batch is not batch or plan.generation != units.generation:
        units.plan = plan = _make_plan(units, batch, plan.found if isinstance(plan, Plan) else {})
    if plan.singles is not None:
        plan.singles.add_to(y, x)
    if plan.runs:
        y, x = y.view(-1, units.out_features), x.reshape(-1, units.in_features)
        for run in plan.runs:
            add_run(y, x, run)


def add_embedding_delta(y: Tensor, input_ids: Tensor, units: UnitTable, batch: DeltaBatch, output_scale: float) -> None:
    """Add each token's embedding delta to `y`, in place; see the package's `add_embedding_delta`."""
    for segment in batch.segments:
        tokens = segment.token_indices
        total: Tensor | None = None
        for slot, weight in segment.members:
            if (unit := units.units.get(slot)) is None:
                continue
            units.await_arrival(slot)
            a, b = embedding_factors(unit)
            hidden = a.index_select(1, input_ids.index_select(0, tokens)).t().to(torch.float32)
            hidden = hidden * (weight * unit.scaling * output_scale)
            delta = torch.bmm(hidden.unsqueeze(1), b.to(torch.float32).expand(len(tokens), -1, -1)).squeeze(1)
            total = delta if total is None else total.add_(delta)
        if total is not None:
            y.index_copy_(0, tokens, y.index_select(0, tokens).add_(total))


def _make_plan(units: UnitTable, batch: DeltaBatch, known: dict[int, Found]) -> Plan:
    """Plan a batch here, given what an older plan knew of the units; those that add nothing have no part in it."""
    found = _find_units(units, batch, known)
    singles: list[list[Member]] = []
    runs: list[Run] = []
    for index, segment in enumerate(batch.segments):
        members = [
            Member(slot, found[slot], weight * found[slot].unit.scaling)
            for slot, weight in segment.members
            if slot in found and len(segment.token_indices)
        ]
        if segment.is_run or segment.token_indices.device.type != "cpu":
            singles.append([])
            if members:
                rows = _run_rows(batch, index, segment)
                runs.append(Run(rows, tuple([make_member(member.found.unit, member.scale) for member in members])))
        else:
            singles.append(members)
    return Plan(batch, units.generation, _lay_singles(units, batch, singles), tuple(runs), found)


def _lay_singles(units: UnitTable, batch: DeltaBatch, members: list[list[Member]]) -> Singles | None:
    if not any(members):
        return None
    from motley_kernels.adapter_delta.singles import make_singles  # only here, as a GPU needs no numba

    return make_singles(batch, members, (units.in_features, units.out_features))


def _find_units(units: UnitTable, batch: DeltaBatch, known: dict[int, Found]) -> dict[int, Found]:
    """Look up the units that the batch uses here, each once it has arrived."""
    found = {}
    for slot in batch.slots & units.units.keys():
        unit = units.units[slot]
        one = known.get(slot)
        if one is None or one.unit is not unit:
            units.await_arrival(slot)
            one = find_unit(unit, (units.in_features, units.out_features))
        if not one.is_empty:
            found[slot] = one
    return found


def _run_rows(batch: DeltaBatch, index: int, segment: Segment) -> RunRows:
    rows = batch.layouts.get(index)
    if not isinstance(rows, RunRows):
        batch.layouts[index] = rows = make_rows(segment)
    return rows
