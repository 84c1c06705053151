"""The definition of paged attention: one query row and head at a time, the oracle of every other implementation.

Float32 arithmetic (float64 where the inputs are); no attention to speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motley_kernels.paged_attention.types import LayerKV, PagedBatch


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: LayerKV,
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Store the new tokens' keys and values, then attend; see the package's `paged_attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    for token, slot in enumerate(batch.slot_mapping.tolist()):
        if slot >= 0:
            block, column = divmod(slot, batch.block_size)
            kv.key[block, column] = k[token].to(kv.key.dtype)
            kv.value[block, column] = v[token].to(kv.value.dtype)

    out = torch.zeros_like(q)
    num_groups = q.shape[1] // k.shape[1]
    token = 0
    for n, (query_len, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        for position in range(seq_len - query_len, seq_len):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = torch.arange(first, position + 1, device=q.device)
            blocks, columns = batch.block_tables[n, seen // batch.block_size], seen % batch.block_size
            for head in range(q.shape[1]):
                keys = kv.key[blocks, columns, head // num_groups].to(dtype)
                values = kv.value[blocks, columns, head // num_groups].to(dtype)
                scores = keys @ q[token, head].to(dtype) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[token, head] = (torch.softmax(scores, dim=0) @ values).to(q.dtype)
            token += 1
    return out
