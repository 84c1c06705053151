"""Runs: many tokens of one set, each unit taken by plain products over all of them.

The prefill side of the CPU path, and the whole of it on a device without a kernel of ours. Runs are padded to whole
multiples of RUN_PADDING rows, ranks and widths likewise, as a product of other shapes takes another path through the
library and bits would depend on how many tokens there are. It knows nothing of how single tokens are laid out; the
engine thread runs it.
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
    """One unit of a run's set, ready to multiply: a^T [I', R'], b [R', O'], both padded.

    `num_products` and `num_outputs` are the true sizes; channels are int64.
    """

    scale: float
    num_products: int
    num_outputs: int
    a: Tensor | None
    b: Tensor | None
    inputs: Tensor | None
    outputs: Tensor | None
    router: Tensor | None  # [I', E'] padded
    num_experts: int
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


def make_member(unit: DeltaUnit, weight: float) -> RunMember:
    """Prepare a unit; factors that are float32 and of whole multiples already are not copied."""
    gate = unit.gate
    a = None if unit.a is None else _padded(unit.a, RUN_PADDING, WIDTH_PADDING).t()
    b = None if unit.b is None else _padded(unit.b, RUN_PADDING, WIDTH_PADDING)
    router = None if gate is None else _padded(gate.router, RUN_PADDING, WIDTH_PADDING).t()
    beyond = None if gate is None else torch.arange(gate.num_experts, device=unit.device) >= gate.top_k
    return RunMember(
        scale=weight * unit.scaling,
        num_products=unit.rank,
        num_outputs=unit.rank if unit.b is None else unit.b.shape[1],
        a=a,
        b=b,
        inputs=None if unit.inputs is None else unit.inputs.long(),
        outputs=None if unit.outputs is None else unit.outputs.long(),
        router=router,
        num_experts=0 if gate is None else gate.num_experts,
        beyond=beyond,
    )


def add_run(y: Tensor, x: Tensor, run: Run) -> None:
    """Add the deltas of one run to `y`, in place, with one rounding."""
    span, count = run.rows.span, len(run.rows.targets)
    x = x.index_select(0, run.rows.sources).to(torch.float32)
    padded = _widened(x, WIDTH_PADDING)
    total: Tensor | None = None
    for member in run.members:
        written = _multiply(x, padded, member)
        if member.outputs is None:
            total = written if total is None else total.add_(written)
        else:
            total = x.new_zeros(len(x), y.shape[1]) if total is None else total
            total.index_add_(1, member.outputs, written)
    if total is None:
        return
    if span is not None:
        y[span[0] : span[1]].add_(total[:count])
    else:
        y.index_copy_(0, run.rows.targets, y.index_select(0, run.rows.targets).add_(total[:count]))


def _multiply(x: Tensor, padded: Tensor, member: RunMember) -> Tensor:
    """Return what one member writes, [n', O'] float32, for inputs [n', I] and the same padded."""
    if member.inputs is None:
        assert member.a is not None
        products = torch.mm(padded, member.a).mul_(member.scale)
    else:
        gathered = x.index_select(1, member.inputs)
        products = gathered if member.a is None else torch.mm(_widened(gathered, WIDTH_PADDING), member.a)
        products = products.mul_(member.scale)
    if member.router is not None:
        assert member.beyond is not None
        logits = torch.mm(padded, member.router)[:, : member.num_experts]
        shares = torch.empty_like(logits)
        share_out(logits, member.beyond, shares)
        expert_rank = member.num_products // member.num_experts
        products[:, : member.num_products].unflatten(1, (-1, expert_rank)).mul_(shares.unsqueeze(2))
    if member.b is None:
        return products[:, : member.num_products]
    return torch.mm(_widened(products, RUN_PADDING), member.b)[:, : member.num_outputs]


def _padded(factor: Tensor, row_multiple: int, width_multiple: int) -> Tensor:
    factor = factor.to(torch.float32)
    more_rows, more_width = -factor.shape[0] % row_multiple, -factor.shape[1] % width_multiple
    return pad(factor, (0, more_width, 0, more_rows)) if more_rows or more_width else factor


def _widened(rows: Tensor, multiple: int) -> Tensor:
    more = -rows.shape[1] % multiple
    return pad(rows, (0, more)) if more else rows
