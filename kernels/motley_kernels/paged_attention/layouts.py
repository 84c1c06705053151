"""What implementations derive from a paged batch, once, and use in every layer.

Plain data: index tensors for the path in torch, tiles for the kernels. Made by rows.py and tiles.py, kept in the batch
itself and gone with it. Dimension letters: T tokens, N sequences. The engine thread alone reads and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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


@dataclass(frozen=True, eq=False, slots=True)
class Tiles:
    """The work of one kernel launch: which queries attend to which keys.

    Shapes: tiles [num_tiles, 8] int32: sequence, packed row of the first query, its position, number of queries, first
    key, end of the keys, partial result (-1: the tile sees all its keys and writes the output), 0. joins [num_joins, 4]
    int32: packed row of the first query, number of queries, first partial result, number of partial results; they lie
    side by side.
    """

    queries_per_tile: int
    tiles: Tensor
    joins: Tensor
    num_partials: int


@dataclass(frozen=True, slots=True)
class TileShape:
    """What decides how sequences are cut into tiles, beside their own lengths."""

    window: int | None
    queries_when_few: int
    queries_when_many: int


@dataclass(frozen=True, slots=True)
class GatherKey:
    """What tells one gathered copy's memory from another's: keys or values, row width and count, dtype."""

    name: str
    width: int
    num_rows: int
    dtype: torch.dtype


@dataclass(eq=False, slots=True)
class Layouts:
    """Everything derived from one batch so far."""

    writes: Writes | None = None
    reads: dict[int | None, Reads] = field(default_factory=dict)
    gathered: dict[GatherKey, Tensor] = field(default_factory=dict)
    tiles: dict[TileShape, tuple[Tiles, ...]] = field(default_factory=dict)
