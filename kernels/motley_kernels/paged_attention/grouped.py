"""Paged attention in plain torch: the path on CPUs and on devices without a kernel of ours.

Sequences with one new token are read with one gather and attended in one call; the others one by one. Where scores are
capped the arithmetic is spelled out in float32, elsewhere it is torch's. Dimension letters: T tokens, N sequences, H
heads, K key-value heads, G query heads per key-value head, D head dim, L keys seen. The engine thread runs it; its
scratch lives in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from motley_kernels.paged_attention.layouts import ChunkRows, GatherKey, SingleRows
from motley_kernels.paged_attention.rows import reads_of, writes_of
from motley_kernels.paged_attention.types import LayerKV, PagedBatch

QUERIES_AT_ONCE = 256
"""Bound on the query rows whose capped scores are in memory at a time."""


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
    k, v = k.to(kv.key.dtype), v.to(kv.value.dtype)
    _write(k, v, kv, batch)
    reads = reads_of(batch, sliding_window)
    singles = reads.singles
    if singles is not None and singles.all_tokens:
        return _attend_singles(q, kv, singles, batch, scale, softcap)
    out = torch.zeros_like(q)
    if singles is not None:
        attended = _attend_singles(q.index_select(0, singles.tokens), kv, singles, batch, scale, softcap)
        out.index_copy_(0, singles.tokens, attended)
    for chunk in reads.chunks:
        out[chunk.start : chunk.stop] = _attend_chunk(q, k, v, kv, chunk, scale, softcap)
    return out


def _write(k: Tensor, v: Tensor, kv: LayerKV, batch: PagedBatch) -> None:
    writes = writes_of(batch)
    if writes.tokens is not None:
        k, v = k.index_select(0, writes.tokens), v.index_select(0, writes.tokens)
    _flat(kv.key).index_copy_(0, writes.slots, k.flatten(1))
    _flat(kv.value).index_copy_(0, writes.slots, v.flatten(1))


def _flat(blocks: Tensor) -> Tensor:
    """View blocks as rows, [num_blocks * block_size, K * D]."""
    return blocks.view(-1, blocks.shape[2] * blocks.shape[3])


def _attend_singles(
    q: Tensor, kv: LayerKV, singles: SingleRows, batch: PagedBatch, scale: float, softcap: float | None
) -> Tensor:
    """Attend for sequences with one new token each: q [N, H, D] to [N, H, D]."""
    num_sequences, num_heads, head_dim = q.shape
    num_kv_heads = kv.key.shape[2]
    keys, values = (
        _gather(blocks, singles.rows, batch, name)
        .view(num_sequences, -1, num_kv_heads, head_dim)
        .transpose(1, 2)
        .to(q.dtype)
        for name, blocks in (("key", kv.key), ("value", kv.value))
    )
    if softcap is not None:
        return _attend_capped(q.unsqueeze(2), keys, values, singles.mask, scale, softcap).squeeze(2)
    mask = singles.mask.to(q.dtype)
    if q.dtype == torch.float32:
        out = scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    else:
        # In half precision torch packs the keys once per head it is given: let the heads that share keys be rows of
        # one.
        grouped = q.view(num_sequences, num_kv_heads, -1, head_dim)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(num_sequences, num_heads, head_dim)


def _gather(blocks: Tensor, rows: Tensor, batch: PagedBatch, name: str) -> Tensor:
    """Copy rows out of the blocks.

    Effects: fills scratch that all layers of this shape share, as fresh memory would cost more than the copy.
    """
    source = _flat(blocks)
    key = GatherKey(name, source.shape[1], len(rows), source.dtype)
    scratch = batch.layouts.gathered.get(key)
    if scratch is None:
        scratch = batch.layouts.gathered[key] = source.new_empty(len(rows), source.shape[1])
    return torch.index_select(source, 0, rows, out=scratch)


def _attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, chunk: ChunkRows, scale: float, softcap: float | None
) -> Tensor:
    """Attend for one sequence with several new tokens: [m, H, D]."""
    queries = q[chunk.start : chunk.stop].transpose(0, 1).unsqueeze(0)
    if chunk.rows is None:
        keys, values = k[chunk.start : chunk.stop], v[chunk.start : chunk.stop]
    else:
        keys = _flat(kv.key).index_select(0, chunk.rows).view(-1, *kv.key.shape[2:])
        values = _flat(kv.value).index_select(0, chunk.rows).view(-1, *kv.value.shape[2:])
    keys, values = (rows.to(q.dtype).transpose(0, 1).unsqueeze(0) for rows in (keys, values))
    if softcap is None:
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=chunk.mask, is_causal=chunk.mask is None, scale=scale, enable_gqa=True
        )
    else:
        mask = chunk.mask
        if mask is None:
            mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril_()
        added = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -torch.inf).view(1, 1, *mask.shape)
        out = _attend_capped(queries, keys, values, added, scale, softcap)
    return out.squeeze(0).transpose(0, 1)


def _attend_capped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attend with capped scores.

    Shapes: q [N, H, m, D], keys and values [N, K, L, D], mask [N, 1, m, L], added after the cap; returns [N, H, m, D].
    """
    num_sequences, num_heads, num_queries, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    transposed, values = keys.float().transpose(2, 3), values.float()
    parts = []
    for first in range(0, num_queries, QUERIES_AT_ONCE):
        rows = q[:, :, first : first + QUERIES_AT_ONCE].float().reshape(num_sequences, num_kv_heads, -1, head_dim)
        scores = torch.matmul(rows, transposed).mul_(scale / softcap).tanh_().mul_(softcap)
        scores = scores.view(num_sequences, num_heads, -1, keys.shape[2]).add_(
            mask[:, :, first : first + QUERIES_AT_ONCE]
        )
        weights = torch.softmax(scores, dim=-1).view(num_sequences, num_kv_heads, -1, keys.shape[2])
        parts.append(torch.matmul(weights, values).view(num_sequences, num_heads, -1, head_dim))
    return torch.cat(parts, dim=2).to(q.dtype)
