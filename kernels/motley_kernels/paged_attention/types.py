"""The data of paged attention: one layer's key-value blocks, and how packed tokens map to sequences and blocks.

Dimension letters: T tokens, N sequences, H heads, K key-value heads, D head dim. Tokens of one forward pass are packed
in one row, sequence after sequence; each sequence brings `query_lens[n]` new tokens, which are the last ones of its
`seq_lens[n]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from motley_kernels.paged_attention.layouts import Layouts


@dataclass(frozen=True, eq=False, slots=True)
class LayerKV:
    """One layer's keys and values, by block.

    Shapes: key, value [num_blocks, block_size, K, D].
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class PagedBatch:
    """Where one forward pass's tokens read and write keys and values.

    Semantics: token j of sequence n stands at position seq_lens[n] - query_lens[n] + j; position p of sequence n lives
    in row block_tables[n, p // block_size], column p % block_size. Rows beyond sum(query_lens) are padding: written
    nowhere, their output is zero.
    Shapes: block_tables [N, max_blocks] int64, unused entries 0; slot_mapping [T] int64, the flat row (block *
    block_size + column) of each new token, -1 for padding.
    `layouts` is what implementations derive from all this, once, and use in every layer; a copy starts without.
    """

    block_size: int
    block_tables: Tensor
    slot_mapping: Tensor
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    layouts: Layouts = field(default_factory=Layouts, init=False, repr=False)
