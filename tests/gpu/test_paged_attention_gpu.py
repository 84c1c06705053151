"""The Triton paged attention on a GPU against its definition, and the promises that only a device can break."""

from __future__ import annotations

import random

import pytest
import torch
from motley_kernels.paged_attention import LayerKV, PagedBatch, paged_attention, triton_impl
from motley_kernels.paged_attention.tiles import SPAN_KEYS
from motley_kernels.testing import PagedCase, assert_close, draw_paged_case
from paged_cases import MIXED, assert_equals_the_definition, attend, draw, keep_sequences
from torch import Generator

CUDA = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 5.0), (16, 50.0)])
def test_a_mixed_batch_equals_the_definition(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    assert_equals_the_definition(draw(1, MIXED, padding=3, dtype=dtype), window=window, softcap=softcap, device=CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2), (32, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_every_head_size_and_ratio_equals_the_definition(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> None:
    case = draw(2, [(1, 20), (19, 3)], heads, head_dim=head_dim, padding=1, dtype=dtype)
    assert_equals_the_definition(case, device=CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [4, 8, 64])
def test_keys_that_are_split_into_spans_equal_the_definition(dtype: torch.dtype, block_size: int) -> None:
    sequences = [(1, 3 * SPAN_KEYS + 9), (1, 5), (9, 2 * SPAN_KEYS)]
    case = draw(3, sequences, block_size=block_size, dtype=dtype)
    assert_equals_the_definition(case, device=CUDA)
    assert_equals_the_definition(case, window=400, softcap=30.0, device=CUDA)


@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_batches_equal_the_definition(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    for seed in range(20):
        sequences = [(rng.choice([1, 1, 2, 5, 18, 70]), rng.choice([0, 1, 15, 16, 17, 90])) for _ in range(4)]
        case = draw(seed, sequences, rng.choice([(4, 2), (3, 1)]), padding=rng.choice([0, 3]), dtype=dtype)
        assert_equals_the_definition(
            case, window=rng.choice([None, 1, 21]), softcap=rng.choice([None, 2.0]), device=CUDA
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
def test_neighbours_do_not_change_a_bit(dtype: torch.dtype, window: int | None) -> None:
    sequences = [(1, 2 * SPAN_KEYS), (70, 3), (1, 7), (5, SPAN_KEYS), (2, 0), (200, 0), (1, 5000)]
    case = draw(4, sequences, (8, 2), head_dim=128, dtype=dtype, padding=2)
    whole, _ = attend(case, window=window, device=CUDA)
    rng = random.Random(0)
    for kept in [[n] for n in range(len(sequences))] + [rng.sample(range(len(sequences)), 4) for _ in range(6)]:
        part, rows = keep_sequences(case, kept)
        assert torch.equal(attend(part, window=window, device=CUDA)[0], whole[rows]), kept


def test_the_same_batch_has_the_same_bits_every_time() -> None:
    case = draw(5, [(1, 9 * SPAN_KEYS), *MIXED] * 3, (8, 2), head_dim=128, dtype=torch.bfloat16)
    first, _ = attend(case, device=CUDA)
    assert all(torch.equal(attend(case, device=CUDA)[0], first) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_reaches_only_its_own_sequence(dtype: torch.dtype) -> None:
    case = draw(6, [(1, 30), (4, 9), (1, 3), (2, SPAN_KEYS)], dtype=dtype)
    expected, _ = attend(case, device=CUDA)
    for sick in ([0], [1, 2, 3, 4], [5], [6, 7]):
        k, v = case.k.clone(), case.v.clone()
        k[sick], v[sick] = torch.nan, torch.nan
        out, _ = attend(PagedCase(case.q, k, v, case.kv, case.batch), device=CUDA)
        healthy = [row for row in range(8) if row not in sick]
        assert torch.equal(out[healthy], expected[healthy])
        assert out[sick[-1]].isnan().all()


def test_a_batch_of_padding_alone_is_zero_and_writes_nothing() -> None:
    case = draw_paged_case([], [], Generator().manual_seed(0), padding=4)
    assert_equals_the_definition(case, device=CUDA)


def test_auto_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = draw(7, MIXED), []
    launches = triton_impl.launches
    monkeypatch.setattr(triton_impl, "launches", lambda *args, **how: calls.append(1) or launches(*args, **how))
    out, _ = attend(case, implementation="auto", device=CUDA)
    assert_close(out, attend(case, implementation="reference")[0], torch.float32)
    assert calls


@pytest.mark.parametrize("num_cached", [0, 1536])
def test_a_long_prompt_of_a_real_size_equals_torchs_own_attention(num_cached: int) -> None:
    torch.manual_seed(8)
    num_tokens, num_heads, num_kv_heads, head_dim = 2048, 32, 8, 128
    q = torch.randn(num_tokens, num_heads, head_dim, device=CUDA, dtype=torch.bfloat16)
    k, v = (torch.randn(num_tokens, num_kv_heads, head_dim, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    order = torch.randperm(num_tokens // 16, device=CUDA)
    slots = (order[:, None] * 16 + torch.arange(16, device=CUDA)).view(-1)
    blocks = torch.full((num_tokens // 16, 16, num_kv_heads, head_dim), torch.nan, device=CUDA, dtype=torch.bfloat16)
    kv = LayerKV(blocks, blocks.clone())
    scale = head_dim**-0.5
    outs = []
    for start, stop in ((0, num_cached), (num_cached, num_tokens)):
        if start == stop:
            continue
        batch = PagedBatch(16, order[None], slots[start:stop], (stop - start,), (stop,))
        outs.append(
            paged_attention(
                *(q[start:stop], k[start:stop], v[start:stop], kv, batch),
                scale=scale,
                sliding_window=None,
                softcap=None,
                implementation="triton",
            )
        )
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(rows.float().transpose(0, 1)[None] for rows in (q, k, v)), is_causal=True, scale=scale, enable_gqa=True
    )
    assert_close(torch.cat(outs), expected[0].transpose(0, 1), torch.bfloat16)
