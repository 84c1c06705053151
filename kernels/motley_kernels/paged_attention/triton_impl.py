"""Paged attention by Triton kernels: the path on CUDA.

Owns which kernels a layer launches, with which tiles and constants; knows nothing of the device beyond that. Importing
this module needs triton. Dimension letters: T tokens, H heads, K key-value heads, G = H / K, D head dim. The engine
thread runs it.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from motley_kernels.errors import DeviceError, KernelError, ShapeError
from motley_kernels.launch import Launch
from motley_kernels.paged_attention import triton_kernels
from motley_kernels.paged_attention.layouts import Tiles, TileShape
from motley_kernels.paged_attention.tiles import tiles_of
from motley_kernels.paged_attention.types import LayerKV, PagedBatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
FEW_ROWS = 16
"""Rows of a tile for sequences with few queries: the fewest that a matrix instruction takes."""
NO_WINDOW = 2**31 - 1
IS_INTERPRETED = not isinstance(triton_kernels.attend, triton.JITFunction)
LOG2_E = math.log2(math.e)
NUM_STAGES = 2


def supports(q: Tensor, kv: LayerKV) -> bool:
    """Say whether the kernels take these types and this head size."""
    return q.dtype in DTYPES and kv.key.dtype in DTYPES and q.shape[2] <= MAX_HEAD_DIM


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
    """Store the new tokens' keys and values, then attend; see the package's `paged_attention`.

    Raises: KernelError if the types or the head size are not supported; ShapeError if `kv` is not contiguous;
    DeviceError if the tensors are not on CUDA.
    """
    if not (q.is_cuda or IS_INTERPRETED):
        raise DeviceError(f"q is on {q.device}: the kernels need CUDA")
    if not supports(q, kv):
        raise KernelError(f"no kernel for {q.dtype} queries over {kv.key.dtype} blocks of head size {q.shape[2]}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with _on(q.device):
        for launch in launches(out, q, k, v, kv, batch, scale=scale, sliding_window=sliding_window, softcap=softcap):
            launch.run()
    return out


def launches(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: LayerKV,
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> list[Launch]:
    """List what is launched, in order, to write a layer's keys and values and `out`."""
    if not (kv.key.is_contiguous() and kv.value.is_contiguous()):
        raise ShapeError("blocks are not contiguous")
    q, k, v = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (q, k, v))
    if not len(q):
        return []
    if IS_INTERPRETED and q.dtype == torch.bfloat16:
        q = q.float()  # the interpreter's own product of bfloat16 is wrong
    group = q.shape[1] // k.shape[1]
    few, many = (max(rows, triton.next_power_of_2(group)) for rows in (FEW_ROWS, _many_rows(out.dtype)))
    shape = TileShape(sliding_window, few // group, many // group)
    planned = [_store_launch(out, k, v, kv, batch)]
    for tiles in tiles_of(batch, shape):
        rows = few if tiles.queries_per_tile == shape.queries_when_few else many
        planned += _attend_launches(out, q, kv, batch, tiles, rows, scale, sliding_window, softcap)
    return planned


def _many_rows(dtype: torch.dtype) -> int:
    return 16 if dtype == torch.float32 else 64  # exact float32 products have no matrix instruction


def _store_launch(out: Tensor, k: Tensor, v: Tensor, kv: LayerKV, batch: PagedBatch) -> Launch:
    num_tokens, num_kv_heads, head_dim = k.shape
    return Launch(
        kernel=triton_kernels.store,
        grid=(num_tokens,),
        arguments={
            "k_ptr": k,
            "v_ptr": v,
            "key_ptr": kv.key,
            "value_ptr": kv.value,
            "out_ptr": out,
            "slots_ptr": batch.slot_mapping.contiguous(),
            "num_tokens": sum(batch.query_lens),
            "k_token_stride": k.stride(0),
            "k_head_stride": k.stride(1),
            "v_token_stride": v.stride(0),
            "v_head_stride": v.stride(1),
        },
        constants={
            **_head_constants(out, num_kv_heads),
            "block_heads": triton.next_power_of_2(num_kv_heads),
            "block_dim": triton.next_power_of_2(head_dim),
        },
        num_stages=NUM_STAGES,
    )


def _attend_launches(
    out: Tensor,
    q: Tensor,
    kv: LayerKV,
    batch: PagedBatch,
    tiles: Tiles,
    block_rows: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> list[Launch]:
    """List one launch over the tiles, and one to join what was split."""
    num_kv_heads = kv.key.shape[2]
    heads = _head_constants(out, num_kv_heads)
    tables = batch.block_tables.contiguous()
    block_dim = max(16, triton.next_power_of_2(q.shape[2]))  # a matrix instruction takes no fewer
    partial = torch.empty(tiles.num_partials, num_kv_heads, block_rows, block_dim, dtype=torch.float32, device=q.device)
    summary = torch.empty(tiles.num_partials, num_kv_heads, 2, block_rows, dtype=torch.float32, device=q.device)
    attend = Launch(
        kernel=triton_kernels.attend,
        grid=(len(tiles.tiles), num_kv_heads),
        arguments={
            "q_ptr": q,
            "key_ptr": kv.key,
            "value_ptr": kv.value,
            "out_ptr": out,
            "partial_ptr": partial,
            "summary_ptr": summary,
            "tables_ptr": tables,
            "tiles_ptr": tiles.tiles,
            "inner_scale": scale * LOG2_E if softcap is None else scale / softcap,
            "outer_scale": 1.0 if softcap is None else softcap * LOG2_E,
            "window": NO_WINDOW if sliding_window is None else sliding_window,
            "table_stride": tables.stride(0),
            "q_token_stride": q.stride(0),
            "q_head_stride": q.stride(1),
        },
        constants={
            **heads,
            "block_size": batch.block_size,
            "has_softcap": softcap is not None,
            "block_rows": block_rows,
            "block_keys": _block_keys(q.dtype, block_dim),
            "block_dim": block_dim,
        },
        num_stages=NUM_STAGES,
    )
    if not tiles.num_partials:
        return [attend]
    join = Launch(
        kernel=triton_kernels.join,
        grid=(len(tiles.joins), num_kv_heads, block_rows),
        arguments={"out_ptr": out, "partial_ptr": partial, "summary_ptr": summary, "joins_ptr": tiles.joins},
        constants={**heads, "block_rows": block_rows, "block_dim": block_dim},
        num_stages=NUM_STAGES,
        num_warps=1,
    )
    return [attend, join]


def _block_keys(dtype: torch.dtype, block_dim: int) -> int:
    """Return how many keys a program holds at a time: 16 KiB of keys, and of values, at most 64 rows of each."""
    return min(64, 2**14 // (block_dim * dtype.itemsize))


def _head_constants(out: Tensor, num_kv_heads: int) -> dict[str, int]:
    _, num_heads, head_dim = out.shape
    return {"num_kv_heads": num_kv_heads, "group": num_heads // num_kv_heads, "head_dim": head_dim}


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
