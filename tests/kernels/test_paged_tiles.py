"""How queries and keys are cut into tiles: every pair once, bounded, and by a sequence's own lengths alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motley_kernels.paged_attention.layouts import TileShape
from motley_kernels.paged_attention.tiles import MAX_SPANS, SPAN_KEYS, tiles_of
from motley_kernels.paged_attention.types import PagedBatch

Cut = tuple[int, list[list[int]], list[list[int]]]

SEQUENCES = st.lists(st.tuples(st.integers(0, 70), st.sampled_from([0, 3, 500, 5000, 40_000])), min_size=1, max_size=4)
WINDOWS = st.sampled_from([None, 1, 100, 3000])


def cut(sequences: list[tuple[int, int]], window: int | None) -> list[Cut]:
    """Cut sequences of (new, stored) tokens; return each launch's queries per tile, tiles and joins."""
    num_sequences = len(sequences)
    batch = PagedBatch(
        16,
        torch.zeros(num_sequences, 1, dtype=torch.int64),
        torch.zeros(sum(new for new, _ in sequences), dtype=torch.int64),
        tuple(new for new, _ in sequences),
        tuple(new + stored for new, stored in sequences),
    )
    launches = tiles_of(batch, TileShape(window, 4, 16))
    return [(tiles.queries_per_tile, tiles.tiles.tolist(), tiles.joins.tolist()) for tiles in launches]


@given(sequences=SEQUENCES, window=WINDOWS)
def test_every_query_meets_the_keys_in_its_tiles_window_once(
    sequences: list[tuple[int, int]], window: int | None
) -> None:
    met: Counter[int] = Counter()
    for queries_per_tile, tiles, joins in cut(sequences, window):
        for _, token, position, num_queries, first, end, partial, _ in tiles:
            assert 0 < num_queries <= queries_per_tile
            assert first < end <= position + num_queries
            met[token] += end - first
            assert (partial >= 0) == any(start <= partial < start + count for _, _, start, count in joins)
    expected: Counter[int] = Counter()
    token = 0
    for new, stored in sequences:
        step = 4 if new <= 4 else 16
        for first in range(0, new, step):
            position = stored + first
            oldest = 0 if window is None else max(0, position - window + 1)
            expected[token + first] = position + min(step, new - first) - oldest
        token += new
    assert met == expected


@given(sequences=SEQUENCES, window=WINDOWS)
def test_a_sequence_is_cut_as_if_it_were_alone(sequences: list[tuple[int, int]], window: int | None) -> None:
    together = cut(sequences, window)
    token = 0
    for index, (new, stored) in enumerate(sequences):
        alone = [(step, [tile[2:6] for tile in tiles]) for step, tiles, _ in cut([(new, stored)], window)]
        among = [(step, [tile[2:6] for tile in tiles if tile[0] == index]) for step, tiles, _ in together]
        assert [launch for launch in among if launch[1]] == alone
        first_tokens = {tile[1] for _, tiles, _ in together for tile in tiles if tile[0] == index}
        assert all(token <= first < token + new for first in first_tokens)
        token += new


def test_partial_results_of_a_tile_lie_side_by_side_in_the_order_of_their_keys() -> None:
    ((_, tiles, joins),) = cut([(1, 3 * SPAN_KEYS), (1, 5), (2, 2 * SPAN_KEYS)], None)
    assert [tile[6] for tile in tiles] == [0, 1, 2, 3, -1, 4, 5, 6]
    assert joins == [[0, 1, 0, 4], [2, 2, 4, 3]]
    assert all(before[5] == after[4] for before, after in pairwise(tiles) if 0 <= before[6] == after[6] - 1 != 3)


@pytest.mark.parametrize(("num_new", "num_stored"), [(1, 10**6), (4, 10**6), (64, 10**5)])
def test_the_number_of_spans_is_bounded(num_new: int, num_stored: int) -> None:
    ((_, tiles, joins),) = cut([(num_new, num_stored)], None)
    assert 1 < max(count for *_, count in joins) <= MAX_SPANS
    assert len(tiles) <= MAX_SPANS + len(joins)


def test_a_long_prompt_is_not_split() -> None:
    ((_, tiles, joins),) = cut([(4096, 0)], None)
    assert (len(tiles), joins) == (256, [])
