"""Layouts: in which order a batch's (token, member) pairs are multiplied and summed.

A layout is derived from the batch and from *where* each member lies in the stacks, so Linears with the same structure
share one; it holds no weights. Pure functions of integers plus the index tensors they make; the engine thread calls
them when a composition changes, not on each step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from motley_kernels.adapter_delta.types import DeltaBatch, Segment

RUN_PADDING = 8
"""Rows to which a run is padded.

A product of fewer rows takes another path through the library, and bits would depend on how many there are.
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one member of a set finds its unit: a row of the stack of its rank."""

    slot: int
    rank: int
    row: int
    scale: float  # weight * scaling


@dataclass(frozen=True, slots=True)
class Launch:
    """One batched product: items [start, stop) over as many rows from `row` on, or all over that one row."""

    rank: int
    row: int
    num_rows: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Run:
    """One plain product: a run's tokens, items [start, stop), under the unit of one slot."""

    slot: int
    scale: float
    start: int
    stop: int


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """The items of a batch at Linears of one structure.

    Semantics: item i multiplies token sources[i] by scales[i] times its unit; `targets` are the touched tokens;
    targets[k] sums, in this order, items passes[0][k], passes[1][k], ... of the passes longer than k. None stands for
    the identity, which needs no gather. `target_range` is set when the targets are consecutive rows.
    Shapes: sources [items] or None, scales [items, 1, 1] float32, targets [n], each pass [<= n] int64 or None.
    """

    num_items: int
    launches: tuple[Launch, ...]
    runs: tuple[Run, ...]
    sources: Tensor | None
    scales: Tensor
    targets: Tensor
    target_range: tuple[int, int] | None
    passes: tuple[Tensor | None, ...]


def make_layout(batch: DeltaBatch, places: Sequence[tuple[Place, ...]]) -> Layout:
    """Lay out a batch, given each segment's members that have a unit here, in the set's order."""
    device = batch.segments[0].token_indices.device
    items_of: dict[int, list[int]] = {}
    sources: list[int] = []
    scales: list[float] = []
    launches = _lay_singles(batch.segments, places, sources, scales, items_of)
    runs = _lay_runs(batch.segments, places, sources, scales, items_of)
    # Most members first: then pass j concerns a prefix of the targets, and no token ever adds a zero for a member that
    # it has not.
    targets = sorted(items_of, key=lambda token: (-len(items_of[token]), token))
    depth = len(items_of[targets[0]])
    passes = tuple([items_of[token][j] for token in targets if len(items_of[token]) > j] for j in range(depth))
    is_range = targets == list(range(targets[0], targets[0] + len(targets)))
    return Layout(
        num_items=len(sources),
        launches=launches,
        runs=runs,
        sources=None if sources == list(range(batch.num_tokens)) else torch.tensor(sources, device=device),
        scales=torch.tensor(scales, dtype=torch.float32, device=device).view(-1, 1, 1),
        targets=torch.tensor(targets, device=device),
        target_range=(targets[0], targets[0] + len(targets)) if is_range else None,
        passes=tuple(
            None if items == list(range(len(sources))) else torch.tensor(items, device=device) for items in passes
        ),
    )


def plan_launches(counts: dict[int, int]) -> list[tuple[int, int, int]]:
    """Cover rows with products of single tokens, in as few products as possible.

    Semantics: counts[row] items are due on each row; a triple (row, num_rows, num_items) is one item on each of
    consecutive rows, or several on one. Taken is the better of two plans: rounds (each round gives every row that still
    has items one), or rows with several items by themselves.
    """
    rounds = [
        (start, length, length)
        for depth in range(max(counts.values(), default=0))
        for start, length in _consecutive(row for row, count in counts.items() if count > depth)
    ]
    by_row = [(row, 1, count) for row, count in sorted(counts.items()) if count > 1]
    by_row += [
        (start, length, length) for start, length in _consecutive(row for row, count in counts.items() if count == 1)
    ]
    return min(rounds, by_row, key=len)


def _consecutive(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Cut rows into (first, length) of consecutive ones."""
    spans: list[tuple[int, int]] = []
    for row in sorted(rows):
        if spans and row == sum(spans[-1]):
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((row, 1))
    return spans


def _lay_singles(
    segments: Sequence[Segment],
    places: Sequence[tuple[Place, ...]],
    sources: list[int],
    scales: list[float],
    items_of: dict[int, list[int]],
) -> tuple[Launch, ...]:
    """Lay out the tokens that are taken one at a time, rank by rank."""
    due: dict[int, dict[int, deque[tuple[int, int, float]]]] = {}
    for segment, members in zip(segments, places, strict=True):
        if segment.is_run or not members:
            continue
        for token in segment.token_indices.tolist():
            items_of[token] = [0] * len(members)
            for order, place in enumerate(members):
                due.setdefault(place.rank, {}).setdefault(place.row, deque()).append((token, order, place.scale))
    launches = []
    for rank, by_row in due.items():
        for row, num_rows, num_items in plan_launches({row: len(items) for row, items in by_row.items()}):
            start = len(sources)
            for k in range(num_items):
                token, order, scale = by_row[row if num_rows != num_items else row + k].popleft()
                items_of[token][order] = len(sources)
                sources.append(token)
                scales.append(scale)
            launches.append(Launch(rank, row, num_rows, start, len(sources)))
    return tuple(launches)


def _lay_runs(
    segments: Sequence[Segment],
    places: Sequence[tuple[Place, ...]],
    sources: list[int],
    scales: list[float],
    items_of: dict[int, list[int]],
) -> tuple[Run, ...]:
    """Lay out the runs, member by member, each padded with a token of its own."""
    runs = []
    for segment, members in zip(segments, places, strict=True):
        if not segment.is_run:
            continue
        tokens: list[int] = segment.token_indices.tolist()
        padded = tokens + tokens[-1:] * (-len(tokens) % RUN_PADDING)
        for place in members:
            start = len(sources)
            for item, token in enumerate(tokens, start):
                items_of.setdefault(token, []).append(item)
            sources.extend(padded)
            scales.extend([place.scale] * len(padded))
            runs.append(Run(place.slot, place.scale, start, len(sources)))
    return tuple(runs)
