"""The Triton paged attention against its definition, in the interpreter: the same arithmetic, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from architectures import build_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_bases import attention
from motley_bases.loader import load_base
from motley_kernels.errors import KernelError, ShapeError
from motley_kernels.paged_attention import LayerKV, PagedBatch, paged_attention, triton_impl
from motley_kernels.paged_attention.layouts import TileShape
from motley_kernels.paged_attention.tiles import SPAN_KEYS, tiles_of
from motley_kernels.testing import assert_close, draw_paged_case
from packed_passes import run_packed
from paged_cases import MIXED, assert_equals_the_definition, attend, draw, keep_sequences
from torch import Generator

HEADS = [(2, 2), (3, 1), (4, 1), (8, 2)]
SEQUENCES = st.lists(
    st.tuples(st.sampled_from([1, 1, 2, 5, 18]), st.sampled_from([0, 1, 7, 15, 16, 17, 40])), min_size=1, max_size=4
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 5.0), (16, 50.0)])
def test_a_mixed_batch_equals_the_definition(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    assert_equals_the_definition(draw(1, MIXED, padding=3, dtype=dtype), window=window, softcap=softcap)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_every_head_size_and_ratio_equals_the_definition(heads: tuple[int, int], head_dim: int) -> None:
    assert_equals_the_definition(draw(2, [(1, 20), (19, 3)], heads, head_dim=head_dim, padding=1))


@given(
    seed=st.integers(0, 10**6),
    sequences=SEQUENCES,
    heads=st.sampled_from(HEADS),
    block_size=st.sampled_from([4, 8, 16, 64]),
    padding=st.sampled_from([0, 3]),
    window=st.sampled_from([None, 1, 3, 16, 21, 1000]),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
@settings(max_examples=25)
def test_drawn_batches_equal_the_definition(
    seed: int,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    padding: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    case = draw(seed, sequences, heads, block_size=block_size, padding=padding, dtype=dtype)
    assert_equals_the_definition(case, window=window, softcap=softcap)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (400, 30.0)])
def test_keys_that_are_split_into_spans_equal_the_definition(window: int | None, softcap: float | None) -> None:
    case = draw(3, [(1, 3 * SPAN_KEYS + 9), (1, 5), (9, 2 * SPAN_KEYS), (2, SPAN_KEYS - 1)], (4, 2))
    (tiles, *_) = tiles_of(case.batch, TileShape(window, 8, 32))
    assert tiles.num_partials > 2
    assert_equals_the_definition(case, window=window, softcap=softcap)


def test_chunks_and_decoding_equal_a_whole_prefill() -> None:
    whole = draw(4, [(33, 0)])
    expected, _ = attend(whole, window=16)
    kv, done, parts = whole.fresh_kv(), 0, []
    for length in (13, 1, 1, 18):
        rows = slice(done, done + length)
        batch = PagedBatch(16, whole.batch.block_tables, whole.batch.slot_mapping[rows], (length,), (done + length,))
        parts.append(
            paged_attention(
                *(whole.q[rows], whole.k[rows], whole.v[rows], kv, batch),
                scale=whole.q.shape[2] ** -0.5,
                sliding_window=16,
                softcap=None,
                implementation="triton",
            )
        )
        done += length
    assert_close(torch.cat(parts), expected, torch.float32)


@given(
    seed=st.integers(0, 10**6),
    window=st.sampled_from([None, 5, 300]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    data=st.data(),
)
@settings(max_examples=8)
def test_neighbours_do_not_change_a_bit(seed: int, window: int | None, dtype: torch.dtype, data: st.DataObject) -> None:
    sequences = [(1, 2 * SPAN_KEYS), (18, 3), (1, 7), (5, SPAN_KEYS), (2, 0)]
    case = draw(seed, sequences, dtype=dtype, padding=2)
    out, _ = attend(case, window=window)
    kept = data.draw(st.lists(st.sampled_from(range(len(sequences))), min_size=1, unique=True))
    part, rows = keep_sequences(case, kept)
    alone, _ = attend(part, window=window)
    assert torch.equal(alone, out[rows])


def test_a_nan_reaches_only_its_own_sequence() -> None:
    case = draw(5, [(1, 30), (4, 9), (1, 3), (2, SPAN_KEYS)])
    expected, _ = attend(case)
    for sick in ([0], [1, 2, 3, 4], [5], [6, 7]):
        k, v = case.k.clone(), case.v.clone()
        k[sick], v[sick] = torch.nan, torch.nan
        out, _ = attend(replace(case, k=k, v=v))
        healthy = [row for row in range(8) if row not in sick]
        assert torch.equal(out[healthy], expected[healthy])
        assert out[sick[-1]].isnan().all()


def test_a_window_reads_only_the_rows_in_it() -> None:
    case = draw(6, [(1, 63), (1, 40), (3, 50)])
    expected, _ = attend(case, window=5)
    for n, length in enumerate(case.batch.seq_lens):
        for position in range(length - case.batch.query_lens[n] - 4):
            block, column = case.batch.block_tables[n, position // 16], position % 16
            case.kv.key[block, column], case.kv.value[block, column] = torch.nan, torch.nan
    out, _ = attend(case, window=5)
    assert torch.equal(out, expected)


def test_layers_of_one_batch_share_their_tiles() -> None:
    case = draw(7, [(1, 30), (5, 3)], padding=2)
    for _ in range(2):
        for window in (None, 4):
            out = paged_attention(
                *(case.q, case.k, case.v, case.fresh_kv(), case.batch),
                scale=0.25,
                sliding_window=window,
                softcap=None,
                implementation="triton",
            )
            assert_close(out, attend(case, window=window, implementation="reference")[0], torch.float32)
    assert {shape.window for shape in case.batch.layouts.tiles} == {None, 4}


def test_rows_as_a_model_hands_them_over_are_read_in_place() -> None:
    case = draw(8, MIXED)
    expected, _ = attend(case)
    by_head = {name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in ("q", "k", "v")}
    out, _ = attend(replace(case, **by_head))
    assert torch.equal(out, expected)


def test_index_tensors_may_be_views_with_gaps() -> None:
    case = draw(8, MIXED)
    tables, slots = case.batch.block_tables, case.batch.slot_mapping
    gapped = replace(
        case.batch,
        block_tables=torch.stack([tables, tables + 1], dim=2)[:, :, 0],
        slot_mapping=torch.stack([slots, slots + 1], dim=1)[:, 0],
    )
    assert_equals_the_definition(replace(case, batch=gapped))


def test_queries_and_blocks_of_two_types_meet_in_the_queries_type() -> None:
    case = draw(9, MIXED)
    kv = LayerKV(case.kv.key.half(), case.kv.value.half())
    assert_equals_the_definition(replace(case, kv=kv))


def test_a_batch_of_padding_alone_is_zero_and_writes_nothing() -> None:
    case = draw_paged_case([], [], Generator().manual_seed(0), padding=4)
    assert_equals_the_definition(case)
    assert attend(case)[1].key.isnan().all()


def test_sequences_without_new_tokens_are_skipped() -> None:
    assert_equals_the_definition(draw(10, [(1, 5), (0, 9), (3, 2)]))


def test_what_the_kernels_do_not_know_is_refused() -> None:
    with pytest.raises(KernelError, match="float64"):
        attend(draw(11, [(2, 3)], dtype=torch.float64))
    with pytest.raises(KernelError, match="head size 512"):
        attend(draw(11, [(2, 3)], head_dim=512))
    case = draw(11, [(2, 3)])
    strided = LayerKV(*(memory.transpose(2, 3).contiguous().transpose(2, 3) for memory in (case.kv.key, case.kv.value)))
    with pytest.raises(ShapeError, match="not contiguous"):
        triton_impl.paged_attention(
            case.q, case.k, case.v, strided, case.batch, scale=1.0, sliding_window=None, softcap=None
        )


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # the second has windows, soft caps and full layers
def test_a_model_answers_the_same_through_the_kernels(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(build_checkpoint(architecture, tmp_path), dtype="float32", device=torch.device("cpu"))
    rng = Random(0)
    sequences = [[rng.randrange(10, base.spec.vocab_size) for _ in range(length)] for length in (23, 5, 40)]
    cuts = [(7, 4, 20), (22, 5, 39), (23, 5, 40)]
    with torch.inference_mode():
        expected = run_packed(base, sequences, cuts)
        monkeypatch.setattr(attention, "paged_attention", partial(paged_attention, implementation="triton"))
        logits = run_packed(base, sequences, cuts)
    for alone, right in zip(logits, expected, strict=True):
        torch.testing.assert_close(alone, right, rtol=1e-4, atol=1e-4)
