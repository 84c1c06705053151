"""Which rows of the block memory a forward pass reads and writes.

Index tensors, derived once per batch and window and used in every layer. Rows are flat: block * block_size + column.
Only rows that a sequence owns and has written are ever named: what would be padding repeats the sequence's own last
row, so garbage elsewhere in the memory cannot reach a result even through a weight of zero. The engine thread runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from motley_kernels.paged_attention.types import PagedBatch

Row = TypeVar("Row")


@dataclass(frozen=True, eq=False, slots=True)
class Writes:
    """Where new tokens are stored: tokens [m] or None for all, slots [m]."""

    tokens: Tensor | None
    slots: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class SingleRows:
    """The sequences that bring one new token, read together.

    Shapes: tokens [n] rows of the packed batch, rows [n * L] flat rows, mask [n, 1, 1, L] float32, 0 where seen and
    -inf where not. `all_tokens` says that tokens is all of them.
    """

    tokens: Tensor
    all_tokens: bool
    rows: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class ChunkRows:
    """A sequence that brings several new tokens, packed rows [start, stop).

    Semantics: `rows` None means that nothing older is seen: the new keys and values are all. `mask` [stop - start, L]
    is True where seen; None means causal.
    """

    start: int
    stop: int
    rows: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class Reads:
    """All that one forward pass reads under one window."""

    singles: SingleRows | None
    chunks: tuple[ChunkRows, ...]


def writes_of(batch: PagedBatch) -> Writes:
    """Return where the batch's new tokens are stored."""
    return _once(batch, "writes", lambda: _make_writes(batch))


def reads_of(batch: PagedBatch, sliding_window: int | None) -> Reads:
    """Return what the batch reads under a window."""
    if sliding_window is not None and sliding_window >= max(batch.seq_lens, default=0):
        sliding_window = None  # it hides nothing here: share the full layers' rows
    return _once(batch, ("reads", sliding_window), lambda: _make_reads(batch, sliding_window))


def _once(batch: PagedBatch, key: object, make: Callable[[], Row]) -> Row:
    if key not in batch.layouts:
        batch.layouts[key] = make()
    return batch.layouts[key]  # type: ignore[return-value]  # each key has one maker


def _make_writes(batch: PagedBatch) -> Writes:
    kept = torch.nonzero(batch.slot_mapping >= 0).squeeze(1)
    if len(kept) == len(batch.slot_mapping):
        return Writes(None, batch.slot_mapping)
    return Writes(kept, batch.slot_mapping[kept])


def _make_reads(batch: PagedBatch, window: int | None) -> Reads:
    singles: list[tuple[int, int]] = []
    chunks: list[ChunkRows] = []
    start = 0
    for n, query_len in enumerate(batch.query_lens):
        if query_len == 1:
            singles.append((n, start))
        elif query_len > 1:
            chunks.append(_make_chunk(batch, n, start, window))
        start += query_len
    return Reads(_make_singles(batch, singles, window) if singles else None, tuple(chunks))


def _make_singles(batch: PagedBatch, singles: list[tuple[int, int]], window: int | None) -> SingleRows:
    device = batch.block_tables.device
    sequences = torch.tensor([n for n, _ in singles], device=device)
    lens = torch.tensor([batch.seq_lens[n] for n, _ in singles], device=device).unsqueeze(1)
    firsts = torch.zeros_like(lens) if window is None else (lens - window).clamp_(min=0)
    longest = int((lens - firsts).max())
    longest += (
        -longest % batch.block_size
    )  # few different lengths: a step more or less does not change what the library does
    positions = firsts + torch.arange(longest, device=device)
    is_seen = positions < lens
    positions = torch.minimum(positions, lens - 1)
    blocks = batch.block_tables[sequences].gather(1, positions // batch.block_size)
    mask = torch.zeros(len(singles), 1, 1, longest, device=device).masked_fill_(~is_seen[:, None, None], -torch.inf)
    return SingleRows(
        tokens=torch.tensor([start for _, start in singles], device=device),
        all_tokens=len(singles) == len(batch.slot_mapping),
        rows=(blocks * batch.block_size + positions % batch.block_size).view(-1),
        mask=mask,
    )


def _make_chunk(batch: PagedBatch, n: int, start: int, window: int | None) -> ChunkRows:
    device = batch.block_tables.device
    query_len, seq_len = batch.query_lens[n], batch.seq_lens[n]
    oldest = seq_len - query_len
    first = 0 if window is None else max(0, oldest - window + 1)
    stop = start + query_len
    hides = window is not None and window < query_len
    if first == oldest and not hides:
        return ChunkRows(start, stop, None, None)
    keys = torch.arange(first, seq_len, device=device)
    queries = torch.arange(oldest, seq_len, device=device).unsqueeze(1)
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    rows = batch.block_tables[n, keys // batch.block_size] * batch.block_size + keys % batch.block_size
    return ChunkRows(start, stop, rows, mask)
