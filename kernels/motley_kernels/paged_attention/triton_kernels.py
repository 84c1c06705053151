"""The device code of paged attention: store the new keys and values, attend tile by tile, join what was split.

No atomics and no sum whose order depends on the batch. One program owns one tile of queries, of all query heads that
share a key-value head, over one span of keys; rows of a tile are query after query, head after head within. Memory is
addressed through the block table alone, and what lies outside a sequence is masked at the load, so that a NaN there
stays there. Dimension letters: T tokens, H heads, K key-value heads, G = H / K, D head dim. Runs on the device, or in
Triton's interpreter where TRITON_INTERPRET was set at import.
"""

from __future__ import annotations

import triton
import triton.language as tl

from motley_kernels.paged_attention import tiles

TILE_FIELDS = tl.constexpr(tiles.TILE_FIELDS)
JOIN_FIELDS = tl.constexpr(tiles.JOIN_FIELDS)


@triton.jit(do_not_specialize=["num_tokens"])
def store(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    out_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_tokens: int,
    k_token_stride: int,
    k_head_stride: int,
    v_token_stride: int,
    v_head_stride: int,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_heads: tl.constexpr,
    block_dim: tl.constexpr,
) -> None:
    """Write one token's keys and values to its slot, and zero the output row of a token that is padding.

    Shapes: k, v [T, K, D]; key, value flat rows [K * D]; out [T, H, D] contiguous; slots [T], -1 for nowhere. Program
    (t,); the first num_tokens tokens belong to sequences.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads = tl.arange(0, block_heads)[:, None]
    dims = tl.arange(0, block_dim)[None, :]
    is_element = (heads < num_kv_heads) & (dims < head_dim)
    if slot >= 0:
        row = slot * (num_kv_heads * head_dim) + heads * head_dim + dims
        k = tl.load(k_ptr + token * k_token_stride + heads * k_head_stride + dims, mask=is_element)
        tl.store(key_ptr + row, k.to(key_ptr.dtype.element_ty), mask=is_element)
        v = tl.load(v_ptr + token * v_token_stride + heads * v_head_stride + dims, mask=is_element)
        tl.store(value_ptr + row, v.to(value_ptr.dtype.element_ty), mask=is_element)
    if token >= num_tokens:
        zeros = tl.zeros([block_heads, block_dim], dtype=out_ptr.dtype.element_ty)
        for index in range(group):
            out_row = ((token * group + index) * num_kv_heads + heads) * head_dim + dims
            tl.store(out_ptr + out_row, zeros, mask=is_element)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Compute the hyperbolic tangent in float32, to a few units in the last place."""
    square = x * x
    small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))  # where 1 - decay would cancel
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.05, small, tl.where(x < 0, -large, large))


@triton.jit
def load_tile(tile_ptr: tl.tensor) -> tuple[tl.tensor, ...]:
    """Read a tile's fields, in their order in `Tiles`; what is multiplied into an address is 64 bits wide."""
    sequence = tl.load(tile_ptr).to(tl.int64)
    token = tl.load(tile_ptr + 1).to(tl.int64)
    partial = tl.load(tile_ptr + 6).to(tl.int64)
    position, num_queries = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    first_key, end_key = tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    return sequence, token, position, num_queries, first_key, end_key, partial


@triton.jit
def locate(
    keys: tl.tensor,
    is_key: tl.tensor,
    table_ptr: tl.tensor,
    kv_head: tl.tensor,
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
) -> tl.tensor:
    """Return where in the blocks the first elements of keys, and of their values, lie; [keys] to [keys]."""
    blocks = tl.load(table_ptr + keys // block_size, mask=is_key, other=0).to(tl.int64)
    return ((blocks * block_size + keys % block_size) * num_kv_heads + kv_head) * head_dim


@triton.jit
def score(
    q: tl.tensor,
    k: tl.tensor,
    is_seen: tl.tensor,
    inner_scale: tl.tensor,
    outer_scale: tl.tensor,
    has_softcap: tl.constexpr,
) -> tl.tensor:
    """Return the scores [rows, keys] times log2(e), which the scales hold; -inf where not seen.

    Semantics: inner_scale * q k, or outer_scale * tanh(inner_scale * q k) under a soft cap.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * inner_scale
    if has_softcap:
        scores = outer_scale * tanh(scores)
    return tl.where(is_seen, scores, float("-inf"))


@triton.jit
def accumulate(
    scores: tl.tensor, v: tl.tensor, best: tl.tensor, total: tl.tensor, acc: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take more keys into a softmax to base 2: best, total [rows] and the sum of values [rows, dims]."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum: -inf - -inf would be NaN.
    origin = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - origin[:, None])
    fade = tl.exp2(best - origin)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_best, total, acc


@triton.jit(do_not_specialize=["window", "table_stride"])
def attend(
    q_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    summary_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    inner_scale: float,
    outer_scale: float,
    window: int,
    table_stride: int,
    q_token_stride: int,
    q_head_stride: int,
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    has_softcap: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
) -> None:
    """Attend from one tile of queries to one span of keys.

    Semantics: products are of q's type, sums in float32.
    Shapes: q [T, H, D]; key, value [num_blocks, block_size, K, D]; out [T, H, D]; partial, summary as `keep` has them;
    tables [N, table_stride]; tiles as in `Tiles`. Program (tile, kv head).
    """
    sequence, token, position, num_queries, first, end, partial = load_tile(tiles_ptr + tl.program_id(0) * TILE_FIELDS)
    kv_head = tl.program_id(1)
    rows, dims = tl.arange(0, block_rows), tl.arange(0, block_dim)
    queries, heads = rows // group, kv_head * group + rows % group
    is_output = (queries < num_queries)[:, None] & (dims < head_dim)[None, :]
    q_rows = (token + queries) * q_token_stride + heads * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=is_output, other=0.0)
    best = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    acc = tl.zeros([block_rows, block_dim], tl.float32)
    for start in range(first, end, block_keys):
        keys = start + tl.arange(0, block_keys)
        is_key = keys < end
        kv_rows = locate(
            keys, is_key, tables_ptr + sequence * table_stride, kv_head, block_size, num_kv_heads, head_dim
        )
        addresses, is_element = kv_rows[:, None] + dims[None, :], is_key[:, None] & (dims < head_dim)[None, :]
        k = tl.load(key_ptr + addresses, mask=is_element, other=0.0).to(q.dtype)
        distance = (position + queries)[:, None] - keys[None, :]
        is_seen = (distance >= 0) & (distance < window) & is_key[None, :]
        scores = score(q, k, is_seen, inner_scale, outer_scale, has_softcap)
        v = tl.load(value_ptr + addresses, mask=is_element, other=0.0).to(q.dtype)
        best, total, acc = accumulate(scores, v, best, total, acc)
    if partial < 0:
        out_rows = ((token + queries) * (num_kv_heads * group) + heads) * head_dim
        total = tl.where(total == 0, 1.0, total)  # rows beyond the queries, which are not stored
        result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_rows[:, None] + dims[None, :], result, mask=is_output)
    else:
        keep(partial_ptr, summary_ptr, partial * num_kv_heads + kv_head, best, total, acc)


@triton.jit
def keep(
    partial_ptr: tl.tensor, summary_ptr: tl.tensor, place: tl.tensor, best: tl.tensor, total: tl.tensor, acc: tl.tensor
) -> None:
    """Write a tile's partial result: its unnormalised sum, and the maximum and the sum of its weights.

    Shapes: partial [P, K, block_rows, block_dim] and summary [P, K, 2, block_rows] float32; place is p * K + kv head.
    """
    block_rows: tl.constexpr = acc.shape[0]
    block_dim: tl.constexpr = acc.shape[1]
    rows, dims = tl.arange(0, block_rows), tl.arange(0, block_dim)
    tl.store(partial_ptr + ((place * block_rows + rows) * block_dim)[:, None] + dims[None, :], acc)
    tl.store(summary_ptr + place * 2 * block_rows + rows, best)
    tl.store(summary_ptr + (place * 2 + 1) * block_rows + rows, total)


@triton.jit
def join(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    summary_ptr: tl.tensor,
    joins_ptr: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_rows: tl.constexpr,
    block_dim: tl.constexpr,
) -> None:
    """Join the partial results of one row of a tile, in the order of their keys.

    Shapes: as in `attend`; joins as in `Tiles`. Program (join, kv head, row of the tile).
    """
    join_ptr = joins_ptr + tl.program_id(0) * JOIN_FIELDS
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    token = tl.load(join_ptr).to(tl.int64)
    num_queries = tl.load(join_ptr + 1)
    first = tl.load(join_ptr + 2).to(tl.int64)
    num_partials = tl.load(join_ptr + 3)
    dims = tl.arange(0, block_dim)
    is_dim = dims < head_dim
    if row // group < num_queries:
        best = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([block_dim], tl.float32)
        for index in range(num_partials):
            place = (first + index) * num_kv_heads + kv_head
            part_best = tl.load(summary_ptr + place * 2 * block_rows + row)
            part_total = tl.load(summary_ptr + (place * 2 + 1) * block_rows + row)
            part = tl.load(partial_ptr + (place * block_rows + row) * block_dim + dims, mask=is_dim, other=0.0)
            new_best = tl.maximum(best, part_best)
            origin = tl.where(new_best == float("-inf"), 0.0, new_best)
            fade = tl.exp2(best - origin)
            part_fade = tl.exp2(part_best - origin)
            total = total * fade + part_total * part_fade
            acc = acc * fade + part * part_fade
            best = new_best
        out_row = (token + row // group) * (num_kv_heads * group) + kv_head * group + row % group
        tl.store(out_ptr + out_row * head_dim + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=is_dim)
