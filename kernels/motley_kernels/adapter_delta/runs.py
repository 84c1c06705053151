"""Runs: many tokens of one set, each unit taken by plain products over all of them.

The prefill side of the CPU path, and the whole of it on a device without a kernel of ours. Runs are padded to whole
multiples of RUN_PADDING rows, ranks and widths likewise, as a product of other shapes takes another path through the
library and bits would depend on how many tokens there are. Of a factor only what is over a whole multiple is copied,
for the length of one product: what a run keeps are the units' own tensors. It knows nothing of how single tokens are
laid out; the engine thread runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from motley_kernels.adapter_delta.routing import share_out
from motley_kernels.adapter_delta.types import DeltaUnit, Segment

RUN_PADDING = 8
WIDTH_PADDING = 16
"""Elements to which channels are padded, with zeros: every row then starts on a cache line."""


@dataclass(frozen=True, eq=False, slots=True)
class RunRows:
    """The rows of one run: `sources` [n'] padded with its last token, `targets` [n], of which `span` is the range."""

    sources: Tensor
    targets: Tensor
    span: tuple[int, int] | None


@dataclass(frozen=True, eq=False, slots=True)
class RunMember:
    """One unit of a run's set, and what its products are multiplied by."""

    unit: DeltaUnit
    scale: float
    beyond: Tensor | None  # [E] bool


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """One run at one Linear."""

    rows: RunRows
    members: tuple[RunMember, ...]


def make_rows(segment: Segment) -> RunRows:
    """Pad a run's tokens and look whether they are consecutive."""
    targets = segment.token_indices
    count = len(targets)
    first, last = int(targets[0]), int(targets[-1])
    steps = targets[1:] > targets[:-1]
    is_span = last - first + 1 == count and bool(steps.all())
    sources = torch.cat((targets, targets[-1:].expand(-count % RUN_PADDING)))
    return RunRows(sources, targets, (first, last + 1) if is_span else None)


def make_member(unit: DeltaUnit, scale: float) -> RunMember:
    """Prepare a unit, given its weight in the set times its own scaling."""
    gate = unit.gate
    beyond = None if gate is None else torch.arange(gate.num_experts, device=unit.device) >= gate.top_k
    return RunMember(unit, scale, beyond)


def add_run(y: Tensor, x: Tensor, run: Run) -> None:
    """Add the deltas of one run to `y`, in place, with one rounding."""
    span, count = run.rows.span, len(run.rows.targets)
    x = x.index_select(0, run.rows.sources).to(torch.float32)
    padded = _widened(x, WIDTH_PADDING)
    total: Tensor | None = None
    for member in run.members:
        written = _multiply(x, padded, member)
        if member.unit.outputs is None:
            total = written if total is None else total.add_(written)
        else:
            total = x.new_zeros(len(x), y.shape[1]) if total is None else total
            total.index_add_(1, member.unit.outputs.long(), written)  # several times as fast as by int32
    if total is None:
        return
    if span is not None:
        y[span[0] : span[1]].add_(total[:count])
    else:
        y.index_copy_(0, run.rows.targets, y.index_select(0, run.rows.targets).add_(total[:count]))


def _multiply(x: Tensor, padded: Tensor, member: RunMember) -> Tensor:
    """Return what one member writes, [n', O'] float32, for inputs [n', I] and the same padded."""
    unit = member.unit
    gathered = None if unit.inputs is None else x.index_select(1, unit.inputs)
    if unit.a is not None:
        products = _shrink(padded if gathered is None else _widened(gathered, WIDTH_PADDING), unit.a)
    else:
        assert gathered is not None, "a unit without a has inputs"
        products = _widened(gathered, RUN_PADDING)
    products = products.mul_(member.scale)
    if unit.gate is not None:
        assert member.beyond is not None
        logits = _shrink(padded, unit.gate.router)[:, : unit.gate.num_experts]
        shares = torch.empty_like(logits)
        share_out(logits, member.beyond, shares)
        expert_rank = unit.rank // unit.gate.num_experts
        by_expert, shares = products[:, : unit.rank].unflatten(1, (-1, expert_rank)), shares.unsqueeze(2)
        by_expert.mul_(shares).masked_fill_(shares == 0, 0)
    return products[:, : unit.rank] if unit.b is None else _expand(products, unit.b)


def _shrink(x: Tensor, factor: Tensor) -> Tensor:
    """Return the products of inputs [n', I''] with the rows of a factor [R, I'], [n', R'']; '' is padded."""
    rank, whole = factor.shape[0], _whole_rows(factor)
    products = x.new_empty(len(x), rank + -rank % RUN_PADDING)
    if whole:
        torch.mm(x, factor[:whole].t(), out=products[:, :whole])
    if whole < rank:
        torch.mm(x, _padded(factor[whole:]).t(), out=products[:, whole:])
    return products


def _expand(products: Tensor, factor: Tensor) -> Tensor:
    """Return the sums of the rows of a factor [R, O'] weighed by products [n', R''], [n', O']; '' is padded."""
    rank, whole = factor.shape[0], _whole_rows(factor)
    if whole == rank:
        return torch.mm(products, factor)
    rest = torch.mm(products[:, whole:], _padded(factor[whole:]))
    return rest.addmm_(products[:, :whole], factor[:whole]) if whole else rest[:, : factor.shape[1]]


def _whole_rows(factor: Tensor) -> int:
    """Return how many rows can be multiplied where they lie: none if their width or dtype is not the library's."""
    is_whole = factor.dtype == torch.float32 and factor.shape[1] % WIDTH_PADDING == 0
    return factor.shape[0] // RUN_PADDING * RUN_PADDING if is_whole else 0


def _padded(factor: Tensor) -> Tensor:
    """Return a copy in float32, padded to whole multiples with zeros."""
    more_rows, more_width = -factor.shape[0] % RUN_PADDING, -factor.shape[1] % WIDTH_PADDING
    return pad(factor.to(torch.float32), (0, more_width, 0, more_rows))


def _widened(rows: Tensor, multiple: int) -> Tensor:
    more = -rows.shape[1] % multiple
    return pad(rows, (0, more)) if more else rows
