"""When LoQT merges: a function of its settings and of how many steps there are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from motley_trainer.errors import SettingsError
from motley_trainer.methods.loqt_schedule import check_interval, interval_of, merge_steps
from motley_trainer.spec.settings import LoqtSchedule, LoqtSettings

EXPONENTIAL, STATIC, LINEAR, NEVER = LoqtSchedule


def schedule(num_steps: int, **settings: Any) -> tuple[int, ...]:
    return merge_steps(LoqtSettings(**settings), num_steps)


def test_intervals_grow_by_powers() -> None:
    assert schedule(506) == (0, 100, 201, 302, 403, 505)
    assert schedule(505) == (0, 100, 201, 302, 403)  # none after the last step
    for num_steps, num_merges in ((10_000, 40), (20_000, 45), (60_000, 52), (100_000, 55)):
        found = schedule(num_steps)
        assert len(found) == num_merges
        gaps = [after - before for before, after in pairwise(found)]
        assert gaps == sorted(gaps)
        assert gaps == [100, *(100 + int(1.2**merge) for merge in range(1, num_merges - 1))]


def test_an_interval_that_is_not_asked_is_a_hundred_or_a_fifth_of_fewer_steps() -> None:
    found = [interval_of(LoqtSettings(), num_steps) for num_steps in (1, 9, 10, 14, 15, 100, 499, 500, 10**6)]
    assert found == [2, 2, 2, 2, 3, 20, 99, 100, 100]
    assert interval_of(LoqtSettings(merge_interval=7), 3) == 7
    assert schedule(20) == (0, 4, 9, 14, 19)


@pytest.mark.parametrize("num_steps", [1, 6, 7])
def test_an_interval_that_is_asked_and_never_over_is_refused_by_its_field(num_steps: int) -> None:
    asked = LoqtSettings(merge_interval=7)
    with pytest.raises(
        SettingsError, match=rf"is 7, and there are {num_steps} steps.*a\.path\.schedule never"
    ) as refused:
        check_interval(asked, num_steps, "a.path")
    assert (refused.value.reason, refused.value.field) == ("BAD_SPEC", "a.path.merge_interval")
    check_interval(asked, 8, "a.path")
    check_interval(LoqtSettings(), 1, "a.path")


def test_the_others_are_even_grow_evenly_or_never_come() -> None:
    assert schedule(11, schedule=STATIC, merge_interval=3) == (0, 3, 6, 9)
    assert schedule(40, schedule=LINEAR, merge_interval=5, growth=2.5) == (0, 5, 12, 22, 34)
    assert schedule(10**6, schedule=NEVER) == (0,)
    assert schedule(1) == (0,)


def test_growth_beyond_all_steps_ends_the_merges() -> None:
    assert schedule(1000, growth=1e30) == (0, 100)
