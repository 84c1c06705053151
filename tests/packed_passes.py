"""Drive a base's forward pass by hand: sequences packed side by side, in chunks, over blocks that are not in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from motley_bases.base import Base
from motley_bases.kv_cache import KVCache
from motley_kernels.adapter_delta.types import DeltaBatch
from motley_kernels.paged_attention.types import PagedBatch
from torch import Tensor

BLOCK_SIZE = 4
PADDING = 8  # rows of Linears do not depend on their neighbours when passes are multiples of this

UnitSet = tuple[tuple[int, float], ...]


def run_packed(
    base: Base, sequences: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]], sets: Sequence[UnitSet] = ()
) -> list[Tensor]:
    """Return each sequence's logits [length, V], computed in packed passes.

    Semantics: `cuts[p][n]` is how far sequence n has come after pass p; the last row must be the lengths. `sets[n]` is
    the unit set of sequence n.
    """
    sets = sets or [()] * len(sequences)
    blocks_each = -(-max(map(len, sequences)) // BLOCK_SIZE)
    num_blocks = len(sequences) * blocks_each
    tables = torch.arange(num_blocks).flip(0).view(blocks_each, -1).T.contiguous()
    kv = KVCache.allocate(base.spec, num_blocks, BLOCK_SIZE, base.dtype, base.device)
    pieces: list[list[Tensor]] = [[] for _ in sequences]
    starts = [0] * len(sequences)
    for ends in cuts:
        active = [n for n in range(len(sequences)) if ends[n] > starts[n]]
        spans = {n: range(starts[n], ends[n]) for n in active}
        rows = [(n, position) for n in active for position in spans[n]]
        padding = -len(rows) % PADDING
        slots = [int(tables[n, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for n, p in rows]
        paged = PagedBatch(
            block_size=BLOCK_SIZE,
            block_tables=tables[active],
            slot_mapping=torch.tensor(slots + [-1] * padding),
            query_lens=tuple(len(spans[n]) for n in active),
            seq_lens=tuple(ends[n] for n in active),
        )
        row_sets = [sets[n] for n, _ in rows]
        base.sites.set_batch(DeltaBatch.from_sets(row_sets + [()] * padding), DeltaBatch.from_sets(row_sets))
        logits = base.forward(
            torch.tensor([sequences[n][position] for n, position in rows] + [0] * padding),
            torch.tensor([position for _, position in rows] + [0] * padding),
            paged,
            kv,
            torch.arange(len(rows)),
        )
        for n, part in zip(active, torch.split(logits, [len(spans[n]) for n in active]), strict=True):
            pieces[n].append(part)
        starts = list(ends)
    return [torch.cat(piece) for piece in pieces]
