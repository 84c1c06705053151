"""How single tokens are covered with batched products: every item once, in few launches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from motley_kernels.adapter_delta.layout import plan_launches


@given(st.dictionaries(st.integers(0, 12), st.integers(1, 6)))
def test_every_item_is_covered_once(counts: dict[int, int]) -> None:
    covered = dict.fromkeys(counts, 0)
    for row, num_rows, num_items in plan_launches(counts):
        assert num_rows == num_items or num_rows == 1
        for k in range(num_items):
            covered[row + k if num_rows == num_items else row] += 1
    assert covered == counts


def test_distinct_adapters_take_one_launch() -> None:
    assert plan_launches(dict.fromkeys(range(16), 1)) == [(0, 16, 16)]


def test_one_adapter_for_all_takes_one_launch() -> None:
    assert plan_launches({0: 16}) == [(0, 1, 16)]


def test_pairs_take_two_rounds() -> None:
    assert len(plan_launches(dict.fromkeys(range(8), 2))) == 2


def test_a_hot_adapter_among_single_ones_takes_two_launches() -> None:
    assert sorted(plan_launches({0: 12, 1: 1, 2: 1, 3: 1})) == [(0, 1, 12), (1, 3, 3)]
