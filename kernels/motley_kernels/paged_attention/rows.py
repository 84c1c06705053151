"""Which rows of the block memory a forward pass reads and writes.

Index tensors, derived once per batch and window and used in every layer. Rows are flat: block * block_size + column.
Only rows that a sequence owns and has written are ever named: what would be padding repeats the sequence's own last
row, so garbage elsewhere in the memory cannot reach a result even through a weight of zero. The engine thread runs it.
"""

from __future__ import annotations

import torch

from motley_kernels.paged_attention.layouts import ChunkRows, Reads, SingleRows, Writes
from motley_kernels.paged_attention.types import PagedBatch


def writes_of(batch: PagedBatch) -> Writes:
    """Return where the batch's new tokens are stored."""
    if batch.layouts.writes is None:
        batch.layouts.writes = _make_writes(batch)
    return batch.layouts.writes


def reads_of(batch: PagedBatch, sliding_window: int | None) -> Reads:
    """Return what the batch reads under a window."""
    hides = sliding_window is not None and sliding_window < max(batch.seq_lens, default=0)
    window = sliding_window if hides else None  # where it hides nothing, share the full layers' rows
    if window not in batch.layouts.reads:
        batch.layouts.reads[window] = _make_reads(batch, window)
    return batch.layouts.reads[window]


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
