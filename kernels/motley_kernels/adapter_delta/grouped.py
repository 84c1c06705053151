"""The adapter delta in plain torch: the path on CPUs and on devices without a kernel of ours.

Semantics are those of `reference`; what differs is the order of work. Single tokens are taken together, whatever kinds
and ranks their units have: the memory in which the units lie is seen as rows of one width, every (token, row) pair that
some unit needs is one inner product of a sampled product, and every token's output is one weighted sum of rows. No row
is copied, padded or moved, no product knows where one unit ends, and a token's bits depend on its own rows alone. Runs
(prefill) take plain products. The engine thread runs it; what it derives lies in the unit table and in the batch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from motley_kernels.adapter_delta.layout import Expand, Gates, Layout, Member, Shrink, make_layout
from motley_kernels.adapter_delta.places import Found, find_channels, find_rows, find_unit
from motley_kernels.adapter_delta.reference import embedding_factors
from motley_kernels.adapter_delta.routing import share_out
from motley_kernels.adapter_delta.runs import Run, RunRows, add_run, make_member, make_rows
from motley_kernels.adapter_delta.types import DeltaBatch, Segment, UnitTable


@dataclass(frozen=True, eq=False, slots=True)
class ShrinkPlan:
    """A shrink at one Linear: the pattern of pairs, the rows transposed, and what to gather of the tokens."""

    shrink: Shrink
    pattern: Tensor  # sparse [N or items, rows of the memory], whose values are the shrink's products
    columns: Tensor
    gather: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class ExpandPlan:
    """An expand at one Linear: the rows to sum, which of them, and where in the outputs the sums belong."""

    expand: Expand
    rows: Tensor | None
    indices: Tensor | None
    scatter: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """One batch at one Linear, ready to run; without a layout no single token has a unit here."""

    batch: DeltaBatch
    generation: int
    layout: Layout | None
    shrinks: tuple[ShrinkPlan, ...]
    copies: Tensor | None
    expands: tuple[ExpandPlan, ...]
    runs: tuple[Run, ...]
    found: dict[int, Found]


def add_delta(y: Tensor, x: Tensor, units: UnitTable, batch: DeltaBatch) -> None:
    """Add each token's adapter delta to `y`, in place; see the package's `add_delta`."""
    plan = units.plan
    if not isinstance(plan, Plan) or plan.batch is not batch or plan.generation != units.generation:
        # Outside inference mode, so that scratch made under it can be written without it.
        with torch.inference_mode(False):
            plan = _make_plan(units, batch, plan.found if isinstance(plan, Plan) else {})
        units.plan = plan
    if plan.layout is not None:
        _add_singles(y, x, plan, plan.layout)
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


def _add_singles(y: Tensor, x: Tensor, plan: Plan, layout: Layout) -> None:
    rows = x if layout.is_whole else x.index_select(0, layout.targets)
    rows = rows.to(torch.float32).contiguous()
    products = _shrink(rows, plan)
    if layout.gates is not None:
        _route(products, layout.gates)
    total = _expand(products, plan, layout, y.shape[1])
    if layout.is_whole:
        y.add_(total)
    elif layout.span is not None:
        y[layout.span[0] : layout.span[1]].add_(total)
    else:
        y.index_copy_(0, layout.targets, y.index_select(0, layout.targets).add_(total))


def _shrink(rows: Tensor, plan: Plan) -> Tensor:
    """Return every product, [K] float32."""
    pieces = []
    for one in plan.shrinks:
        products = one.shrink.products
        read = rows if one.gather is None else rows.view(-1).index_select(0, one.gather).view(-1, len(one.columns))
        # A zero factor before what was there is no shield: NaN times 0 is NaN, and the next token's.
        products.zero_()
        torch.sparse.sampled_addmm(one.pattern, read, one.columns, beta=0.0, out=one.pattern)
        pieces.append(products)
    if plan.copies is not None:
        pieces.append(rows.view(-1).index_select(0, plan.copies))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _route(products: Tensor, gates: Gates) -> None:
    """Fill the shares of every gated (token, unit)."""
    logits = products.index_select(0, gates.logits).view(gates.beyond.shape)
    if gates.padding is not None:
        logits.masked_fill_(gates.padding, -torch.inf)
    share_out(logits, gates.beyond, gates.by_expert)


def _expand(products: Tensor, plan: Plan, layout: Layout, out_features: int) -> Tensor:
    """Return the tokens' deltas, [N, O] float32."""
    total: Tensor | None = None
    for one in plan.expands:
        expand = one.expand
        weights = products if expand.takes is None else products.index_select(0, expand.takes)
        weights = weights.mul_(expand.scales)
        if expand.shares is not None:
            assert layout.gates is not None
            weights = weights.mul_(layout.gates.shares.index_select(0, expand.shares))
        if one.rows is not None:
            # The sum of a bag of rows: the operator under F.embedding_bag, without its checks of every call.
            weights = torch.ops.aten._embedding_bag_forward_only(
                one.rows, one.indices, expand.offsets, False, 0, False, weights, False, -1
            )[0]
        if one.scatter is None:
            total = weights
        else:
            total = products.new_zeros(layout.num_tokens, out_features) if total is None else total
            total.view(-1).index_add_(0, one.scatter, weights.view(-1))
    assert total is not None, "a layout has an expand"
    return total


def _make_plan(units: UnitTable, batch: DeltaBatch, known: dict[int, Found]) -> Plan:
    """Plan a batch here, given what an older plan knew of the units; those that add nothing have no part in it."""
    found = _find_units(units, batch, known)
    singles: list[tuple[Member, ...]] = []
    runs: list[Run] = []
    for index, segment in enumerate(batch.segments):
        members = [(found[slot], slot, weight) for slot, weight in segment.members if slot in found]
        if segment.is_run or segment.token_indices.device.type != "cpu":
            singles.append(())
            if members:
                rows = _run_rows(batch, index, segment)
                runs.append(Run(rows, tuple(make_member(one.unit, weight) for one, _, weight in members)))
        else:
            singles.append(tuple([Member(slot, weight * one.unit.scaling, one.form) for one, slot, weight in members]))
    if not any(singles):
        return Plan(batch, units.generation, None, (), None, (), tuple(runs), found)
    sides = (units.in_features, units.out_features)
    key = (sides, tuple(singles))
    layout = batch.layouts.get(key)
    if not isinstance(layout, Layout):
        batch.layouts[key] = layout = make_layout(batch.segments, singles, batch.num_tokens, sides)
    return Plan(
        batch,
        units.generation,
        layout,
        tuple([_plan_shrink(found, shrink) for shrink in layout.shrinks]),
        None if layout.copies is None else find_channels(found, layout.copies, "inputs"),
        tuple([_plan_expand(found, expand) for expand in layout.expands]),
        tuple(runs),
        found,
    )


def _find_units(units: UnitTable, batch: DeltaBatch, known: dict[int, Found]) -> dict[int, Found]:
    """Look up the units that the batch uses here, each once it has arrived."""
    found = {}
    for slot in batch.slots & units.units.keys():
        unit = units.units[slot]
        one = known.get(slot)
        if one is None or one.unit is not unit:
            units.await_arrival(slot)
            if (one := find_unit(unit)) is None:
                continue
        found[slot] = one
    return found


def _run_rows(batch: DeltaBatch, index: int, segment: Segment) -> RunRows:
    rows = batch.layouts.get(index)
    if not isinstance(rows, RunRows):
        batch.layouts[index] = rows = make_rows(segment)
    return rows


def _plan_shrink(found: dict[int, Found], shrink: Shrink) -> ShrinkPlan:
    memory, indices = find_rows(found, shrink.rows)
    with warnings.catch_warnings():
        # Said once by torch, of every such tensor; of its operators this uses the one.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(
            shrink.offsets,
            indices,
            shrink.products,
            (len(shrink.offsets) - 1, len(memory)),
            check_invariants=False,
        )
    gather = None if shrink.channels is None else find_channels(found, shrink.channels, "inputs")
    return ShrinkPlan(shrink, pattern, memory.t(), gather)


def _plan_expand(found: dict[int, Found], expand: Expand) -> ExpandPlan:
    memory, indices = (None, None) if expand.rows is None else find_rows(found, expand.rows)
    scatter = None if expand.channels is None else find_channels(found, expand.channels, "outputs")
    return ExpandPlan(expand, memory, indices, scatter)
