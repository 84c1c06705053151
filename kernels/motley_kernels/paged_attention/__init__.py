"""Paged attention: causal attention of packed sequences over keys and values that lie in blocks.

This package checks what it is given, chooses an implementation and knows only tokens, sequences and blocks: no
requests, no scheduler, no model. `reference` is the definition. It is called by the engine thread, once per layer and
step, and records no gradient.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal, Protocol

from torch import Tensor

from motley_kernels.errors import DeviceError, ShapeError
from motley_kernels.paged_attention import grouped, reference
from motley_kernels.paged_attention.types import LayerKV, PagedBatch

__all__ = ["Implementation", "LayerKV", "PagedBatch", "paged_attention"]

Implementation = Literal["auto", "reference", "grouped", "triton"]


class _Attend(Protocol):
    """What every implementation offers under the same name."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: LayerKV,
        batch: PagedBatch,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


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
    implementation: Implementation = "auto",
) -> Tensor:
    """Store the new tokens' keys and values, then attend to all of each sequence's.

    Semantics: first k[t] and v[t] go to flat row slot_mapping[t] of `kv`, nowhere for -1. Then a query at position p of
    sequence n sees the positions max(0, p - sliding_window + 1) .. p of n alone: out = softmax(cap(scale * q k)) v,
    where cap(s) = softcap * tanh(s / softcap), and no cap or window where None. Query head h reads key-value head h //
    (H / K). Softmax is in float32. Memory that no sequence owns is never read into a result, whatever it holds.
    Shapes: q [T, H, D], k and v [T, K, D], returns [T, H, D] in q's dtype; rows of padding are zero.
    `auto` takes the Triton kernels for CUDA tensors of a type and head size that they know, and `grouped` elsewhere.
    Effects: writes `kv` at slot_mapping, and `batch.layouts`.
    Raises: ShapeError if the dimensions disagree; DeviceError if tensors live on two devices; KernelError if `triton`
    is asked for by name and has no kernel for these types.
    Source: PagedAttention, arXiv:2309.06180; reference.py is the definition.
    """
    _check(q, k, v, kv, batch)
    attend = _choose(implementation, q, kv)
    return attend(q, k, v, kv, batch, scale=scale, sliding_window=sliding_window, softcap=softcap)


def _choose(implementation: Implementation, q: Tensor, kv: LayerKV) -> _Attend:
    if implementation == "reference":
        return reference.paged_attention
    if implementation == "grouped" or (implementation == "auto" and not (q.is_cuda and _has_triton())):
        return grouped.paged_attention
    # Imported here: where no kernel runs, triton need not be installed.
    from motley_kernels.paged_attention import triton_impl

    if implementation == "auto" and not triton_impl.supports(q, kv):
        return grouped.paged_attention
    return triton_impl.paged_attention


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _check(q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, batch: PagedBatch) -> None:
    num_tokens, num_heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != num_tokens or k.shape[2] != head_dim:
        raise ShapeError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} disagree")
    if num_heads % k.shape[1]:
        raise ShapeError(f"{num_heads} query heads do not divide over {k.shape[1]} key-value heads")
    if kv.key.shape != kv.value.shape or kv.key.shape[1:] != (batch.block_size, *k.shape[1:]):
        raise ShapeError(
            f"blocks are {tuple(kv.key.shape)}, expected (*, {batch.block_size}, {k.shape[1]}, {head_dim})"
        )
    if batch.slot_mapping.shape != (num_tokens,) or sum(batch.query_lens) > num_tokens:
        raise ShapeError(
            f"{num_tokens} tokens, {sum(batch.query_lens)} of them in sequences, disagree with slot_mapping"
        )
    if not len(batch.query_lens) == len(batch.seq_lens) == batch.block_tables.shape[0]:
        raise ShapeError("query_lens, seq_lens and block_tables disagree on the number of sequences")
    if not (q.device == k.device == v.device == kv.key.device == kv.value.device == batch.slot_mapping.device):
        raise DeviceError(
            f"q is on {q.device}, the blocks on {kv.key.device}, slot_mapping on {batch.slot_mapping.device}"
        )
