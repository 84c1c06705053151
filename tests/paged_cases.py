"""Run a drawn case of paged attention by the Triton kernels, on a GPU or in the interpreter, beside its definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from motley_kernels.paged_attention import Implementation, LayerKV, PagedBatch, paged_attention
from motley_kernels.testing import PagedCase, assert_close, draw_paged_case
from torch import Generator, Tensor

MIXED = [(1, 40), (18, 0), (1, 0), (5, 17), (33, 7), (1, 16)]
"""New and stored tokens of sequences: decoding, prompts and chunks of prompts, on and beside the edges of blocks."""


def draw(
    seed: int, sequences: Sequence[tuple[int, int]], heads: tuple[int, int] = (4, 2), **options: object
) -> PagedCase:
    """Draw sequences of (new, stored) tokens with so many query and key-value heads."""
    query_lens, cached_lens = zip(*sequences, strict=True)
    drawn = {"num_heads": heads[0], "num_kv_heads": heads[1], **options}
    return draw_paged_case(query_lens, cached_lens, Generator().manual_seed(seed), **drawn)  # type: ignore[arg-type]


def attend(
    case: PagedCase,
    *,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation = "triton",
    device: str = "cpu",
) -> tuple[Tensor, LayerKV]:
    """Run a case over a copy of its memory on a device, and bring back the output and the memory."""
    kv = LayerKV(case.kv.key.to(device, copy=True), case.kv.value.to(device, copy=True))
    batch = replace(
        case.batch,
        block_tables=case.batch.block_tables.to(device),
        slot_mapping=case.batch.slot_mapping.to(device),
    )
    out = paged_attention(
        *(case.q.to(device), case.k.to(device), case.v.to(device), kv, batch),
        scale=case.q.shape[2] ** -0.5,
        sliding_window=window,
        softcap=softcap,
        implementation=implementation,
    )
    return out.cpu(), LayerKV(kv.key.cpu(), kv.value.cpu())


def assert_equals_the_definition(
    case: PagedCase, *, window: int | None = None, softcap: float | None = None, device: str = "cpu"
) -> None:
    """Assert that output, padding and written memory are those of the definition."""
    out, kv = attend(case, window=window, softcap=softcap, device=device)
    expected, expected_kv = attend(case, window=window, softcap=softcap, implementation="reference")
    assert_close(out, expected, case.q.dtype)
    assert not out[sum(case.batch.query_lens) :].any()
    for memory, expected_memory in ((kv.key, expected_kv.key), (kv.value, expected_kv.value)):
        assert torch.equal(memory.nan_to_num(7.0), expected_memory.nan_to_num(7.0))


def keep_sequences(case: PagedCase, kept: Sequence[int]) -> tuple[PagedCase, Tensor]:
    """Return some of a case's sequences, in this order, and which rows of the whole theirs were."""
    lens = case.batch.query_lens
    rows = torch.tensor([sum(lens[:n]) + index for n in kept for index in range(lens[n])])
    batch = PagedBatch(
        case.batch.block_size,
        case.batch.block_tables[list(kept)],
        case.batch.slot_mapping[rows],
        tuple(lens[n] for n in kept),
        tuple(case.batch.seq_lens[n] for n in kept),
    )
    return PagedCase(case.q[rows], case.k[rows], case.v[rows], case.kv, batch), rows
