"""Paged attention against its definition, for ragged batches over scattered blocks whose unowned memory is poisoned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_kernels.errors import DeviceError, ShapeError
from motley_kernels.paged_attention import LayerKV, PagedBatch, grouped, paged_attention, triton_impl
from motley_kernels.testing import PagedCase, assert_close, draw_paged_case
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

HEADS = st.sampled_from([(4, 4), (4, 2), (6, 2), (4, 1), (3, 1)])
SEQUENCES = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 5, 18]), st.sampled_from([0, 0, 1, 7, 15, 16, 17, 40])),
    min_size=1,
    max_size=6,
)
WINDOWS = st.sampled_from([None, None, 1, 3, 16, 21, 1000])
SOFTCAPS = st.sampled_from([None, None, 2.0, 50.0])


def attend(
    case: PagedCase, *, window: int | None = None, softcap: float | None = None, by_definition: bool = False
) -> tuple[Tensor, LayerKV]:
    kv = case.fresh_kv()
    out = paged_attention(
        case.q,
        case.k,
        case.v,
        kv,
        replace(case.batch),
        scale=case.q.shape[2] ** -0.5,
        sliding_window=window,
        softcap=softcap,
        implementation="reference" if by_definition else "grouped",
    )
    return out, kv


def draw(seed: int, sequences: list[tuple[int, int]], heads: tuple[int, int] = (4, 2), **options: object) -> PagedCase:
    query_lens, cached_lens = zip(*sequences, strict=True)
    drawn = {"num_heads": heads[0], "num_kv_heads": heads[1], **options}
    return draw_paged_case(query_lens, cached_lens, Generator().manual_seed(seed), **drawn)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    seed=st.integers(0, 10**6),
    sequences=SEQUENCES,
    heads=HEADS,
    head_dim=st.sampled_from([16, 16, 24, 64, 256]),
    block_size=st.sampled_from([4, 16]),
    padding=st.sampled_from([0, 0, 3]),
    window=WINDOWS,
    softcap=SOFTCAPS,
)
@settings(max_examples=30, deadline=None)
def test_grouped_equals_the_definition(
    dtype: torch.dtype,
    seed: int,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    padding: int,
    window: int | None,
    softcap: float | None,
) -> None:
    case = draw(seed, sequences, heads, head_dim=head_dim, block_size=block_size, padding=padding, dtype=dtype)
    out, kv = attend(case, window=window, softcap=softcap)
    expected, expected_kv = attend(case, window=window, softcap=softcap, by_definition=True)
    assert_close(out, expected, dtype)
    assert torch.equal(out[len(out) - padding :], torch.zeros_like(out[len(out) - padding :]))
    for memory, expected_memory in ((kv.key, expected_kv.key), (kv.value, expected_kv.value)):
        assert torch.equal(memory.nan_to_num(7.0), expected_memory.nan_to_num(7.0))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 6, 16])
@pytest.mark.parametrize("chunks", [(13, 20), (32, 1), (1, 32), (5, 6, 7, 15), (1,) * 33])
def test_chunked_prefill_and_decode_equal_whole_prefill(
    chunks: tuple[int, ...], window: int | None, softcap: float | None
) -> None:
    whole = draw(1, [(33, 0)])
    expected, _ = attend(whole, window=window, softcap=softcap)
    kv, done, parts = whole.fresh_kv(), 0, []
    for length in chunks:
        rows = slice(done, done + length)
        batch = replace(
            whole.batch,
            slot_mapping=whole.batch.slot_mapping[rows],
            query_lens=(length,),
            seq_lens=(done + length,),
        )
        parts.append(
            paged_attention(
                *(whole.q[rows], whole.k[rows], whole.v[rows], kv, batch),
                scale=whole.q.shape[2] ** -0.5,
                sliding_window=window,
                softcap=softcap,
            )
        )
        done += length
    assert_close(torch.cat(parts), expected, torch.float32)


def test_layers_of_one_batch_share_their_rows() -> None:
    case = draw(2, [(1, 30), (1, 8), (5, 3)], padding=2)
    expected, _ = attend(case, by_definition=True)
    expected_windowed, _ = attend(case, window=4, by_definition=True)
    for _ in range(3):  # full and windowed layers by turns, over one batch's scratch
        for window, right in ((None, expected), (4, expected_windowed)):
            out = paged_attention(
                case.q, case.k, case.v, case.fresh_kv(), case.batch, scale=0.25, sliding_window=window, softcap=None
            )
            assert_close(out, right, torch.float32)


@given(seed=st.integers(0, 10**6), sequences=SEQUENCES, window=WINDOWS, softcap=SOFTCAPS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_neighbours_do_not_matter(
    seed: int, sequences: list[tuple[int, int]], window: int | None, softcap: float | None, data: st.DataObject
) -> None:
    case = draw(seed, sequences)
    out, _ = attend(case, window=window, softcap=softcap)
    kept = data.draw(st.lists(st.sampled_from(range(len(sequences))), min_size=1, unique=True))
    starts = [sum(length for length, _ in sequences[:n]) for n in range(len(sequences))]
    rows = torch.tensor([row for n in kept for row in range(starts[n], starts[n] + sequences[n][0])])
    batch = PagedBatch(
        case.batch.block_size,
        case.batch.block_tables[kept],
        case.batch.slot_mapping[rows],
        tuple(case.batch.query_lens[n] for n in kept),
        tuple(case.batch.seq_lens[n] for n in kept),
    )
    part = PagedCase(case.q[rows], case.k[rows], case.v[rows], case.kv, batch)
    alone, _ = attend(part, window=window, softcap=softcap)
    torch.testing.assert_close(alone, out[rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_nan_reaches_only_its_own_sequence(softcap: float | None) -> None:
    case = draw(3, [(1, 30), (4, 9), (1, 3), (2, 0)])
    expected, _ = attend(case, softcap=softcap)
    for sick in ([0], [1, 2, 3, 4], [5], [6, 7]):
        k, v = case.k.clone(), case.v.clone()
        k[sick], v[sick] = torch.nan, torch.nan
        out, _ = attend(replace(case, k=k, v=v), softcap=softcap)
        healthy = [row for row in range(8) if row not in sick]
        assert torch.equal(out[healthy], expected[healthy])
        assert out[sick[-1]].isnan().all()


def test_a_window_reads_only_the_rows_in_it() -> None:
    case = draw(4, [(1, 63), (1, 40), (3, 50)])
    expected, _ = attend(case, window=5)
    for n, length in enumerate(case.batch.seq_lens):
        oldest_seen = length - case.batch.query_lens[n] - 4
        for position in range(oldest_seen):
            block, column = case.batch.block_tables[n, position // 16], position % 16
            case.kv.key[block, column], case.kv.value[block, column] = torch.nan, torch.nan
    out, _ = attend(case, window=5)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_long_prefill_equals_torchs_own_attention(softcap: float | None) -> None:
    case = draw(5, [(600, 0)], heads=(2, 1))
    out, _ = attend(case, softcap=softcap)
    scores = torch.einsum("qhd,kd->hqk", case.q, case.k[:, 0]) * case.q.shape[2] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(torch.ones(600, 600, dtype=torch.bool).triu(1), -torch.inf)
    assert_close(out, torch.einsum("hqk,kd->qhd", scores.softmax(-1), case.v[:, 0]), torch.float32)


def test_sequences_without_new_tokens_are_skipped() -> None:
    case = draw(6, [(1, 5), (0, 9), (3, 2)])
    assert_close(attend(case)[0], attend(case, by_definition=True)[0], torch.float32)


def test_a_batch_of_padding_alone_is_zero_and_writes_nothing() -> None:
    case = draw_paged_case([], [], Generator().manual_seed(0), padding=4)
    out, kv = attend(case)
    assert not out.any()
    assert kv.key.isnan().all()
    assert kv.value.isnan().all()


def test_disagreeing_shapes_and_devices_are_errors() -> None:
    case = draw(7, [(2, 3), (1, 4)])
    wrong = [
        replace(case, k=case.k[:2]),
        replace(case, v=case.v[:, :1]),
        replace(case, q=case.q[:, :3]),
        replace(case, kv=LayerKV(case.kv.key[:, :8], case.kv.value[:, :8])),
        replace(case, batch=replace(case.batch, query_lens=(2, 2))),
        replace(case, batch=replace(case.batch, query_lens=(2,))),
        replace(case, batch=replace(case.batch, slot_mapping=case.batch.slot_mapping[:2])),
    ]
    for each in wrong:
        with pytest.raises(ShapeError):
            attend(each)
    with pytest.raises(DeviceError):
        attend(replace(case, q=case.q.to("meta")))


def test_the_kernels_are_refused_by_name_without_a_gpu() -> None:
    case = draw(8, [(2, 3)])
    with pytest.raises(DeviceError, match="need CUDA"):
        paged_attention(
            *(case.q, case.k, case.v, case.kv, case.batch),
            scale=1.0,
            sliding_window=None,
            softcap=None,
            implementation="triton",
        )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "chosen"),
    [
        (torch.bfloat16, 128, "triton"),
        (torch.float32, 256, "triton"),
        (torch.float64, 64, "grouped"),
        (torch.float16, 512, "grouped"),
    ],
)
def test_auto_takes_the_kernels_on_cuda_where_they_know_the_types(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, chosen: str
) -> None:
    calls: list[str] = []
    for name, module in (("triton", triton_impl), ("grouped", grouped)):
        monkeypatch.setattr(module, "paged_attention", lambda *_, _name=name, **__: calls.append(_name))
    with FakeTensorMode():
        rows, blocks = torch.empty(4, 2, head_dim, dtype=dtype, device="cuda:0"), (1, 16, 2, head_dim)
        kv = LayerKV(rows.new_empty(blocks), rows.new_empty(blocks))
        tables, slots = (torch.empty(shape, dtype=torch.int64, device="cuda:0") for shape in ((1, 1), (4,)))
        batch = PagedBatch(16, tables, slots, (4,), (4,))
        paged_attention(rows, rows, rows, kv, batch, scale=1.0, sliding_window=None, softcap=None)
    assert calls == [chosen]
