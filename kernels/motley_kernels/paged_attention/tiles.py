"""How packed queries and their keys are cut into tiles of work, one per program of the attention kernel.

A sequence is cut by its own lengths and window alone, never by what shares its batch: the order of its sums, and so its
bits, are its own. Long keys of few queries are cut into spans, attended apart and joined, so that one sequence can fill
a device. Knows no kernel and no tensor but the two it makes. The engine thread runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from motley_kernels.paged_attention.layouts import Tiles, TileShape
from motley_kernels.paged_attention.types import PagedBatch

SPAN_KEYS = 256
"""Keys in a span where a sequence has one tile of queries; with more tiles a device is filled without short spans."""
MAX_SPANS = 64
"""Bound on the spans that one tile's results are joined from."""
TILE_FIELDS = 8
JOIN_FIELDS = 4


@dataclass(eq=False, slots=True)
class _Draft:
    """Rows of tiles and joins under way."""

    queries_per_tile: int
    tiles: list[tuple[int, ...]] = field(default_factory=list)
    joins: list[tuple[int, ...]] = field(default_factory=list)
    num_partials: int = 0

    def add(self, sequence: int, token: int, query_len: int, seq_len: int, window: int | None) -> None:
        """Cut one sequence, whose queries begin at packed row `token`."""
        span = _span(query_len, seq_len, self.queries_per_tile)
        for first in range(0, query_len, self.queries_per_tile):
            num_queries = min(self.queries_per_tile, query_len - first)
            position = seq_len - query_len + first
            oldest = 0 if window is None else max(0, position - window + 1)
            self._add_tile((sequence, token + first, position, num_queries), oldest, position + num_queries, span)

    def _add_tile(self, queries: tuple[int, int, int, int], first_key: int, end: int, span: int) -> None:
        if end - first_key <= span:
            self.tiles.append((*queries, first_key, end, -1, 0))
            return
        starts = range(first_key, end, span)
        for index, start in enumerate(starts):
            self.tiles.append((*queries, start, min(start + span, end), self.num_partials + index, 0))
        self.joins.append((queries[1], queries[3], self.num_partials, len(starts)))
        self.num_partials += len(starts)

    def finish(self, device: torch.device) -> Tiles:
        """Move the rows to the device, in one copy."""
        packed = torch.tensor([value for row in (*self.tiles, *self.joins) for value in row], dtype=torch.int32)
        packed = packed.to(device)
        boundary = len(self.tiles) * TILE_FIELDS
        return Tiles(
            queries_per_tile=self.queries_per_tile,
            tiles=packed[:boundary].view(-1, TILE_FIELDS),
            joins=packed[boundary:].view(-1, JOIN_FIELDS),
            num_partials=self.num_partials,
        )


def tiles_of(batch: PagedBatch, shape: TileShape) -> tuple[Tiles, ...]:
    """Return the batch's tiles: those of sequences with few queries, then those of the others; none that is empty."""
    if shape not in batch.layouts.tiles:
        batch.layouts.tiles[shape] = _make_tiles(batch, shape)
    return batch.layouts.tiles[shape]


def _make_tiles(batch: PagedBatch, shape: TileShape) -> tuple[Tiles, ...]:
    few, many = _Draft(shape.queries_when_few), _Draft(shape.queries_when_many)
    token = 0
    for sequence, (query_len, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        draft = few if query_len <= shape.queries_when_few else many
        draft.add(sequence, token, query_len, seq_len, shape.window)
        token += query_len
    return tuple(draft.finish(batch.block_tables.device) for draft in (few, many) if draft.tiles)


def _span(query_len: int, seq_len: int, queries_per_tile: int) -> int:
    """Return how many keys a program takes at a time: a function of the sequence's own lengths."""
    num_tiles = -(-query_len // queries_per_tile)
    shortest = max(1, -(-seq_len // (MAX_SPANS * SPAN_KEYS))) * SPAN_KEYS
    return shortest * num_tiles
