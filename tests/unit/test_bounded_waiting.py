"""The scheduler over a real residency, without a model: whatever keeps coming, everybody gets on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_server.engine.request_adapters import RequestAdapters
from motley_server.engine.scheduler import MAX_OVERTAKEN
from motley_server.engine.sequence import Sequence
from residency_house import LM_HEAD_BYTES, House, make_adapter
from scheduler_house import make_scheduler, make_sequence, run_pass

MAX_RUNNING = 4
NARROW, WIDE = "abcde", "w"  # one and two shares of the arena


@dataclass
class Street:
    """Requests that come, each under the adapters of its letters, to a device with room for so many narrow adapters."""

    room: int
    arrivals: list[Sequence] = field(default_factory=list)
    admissions: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        narrow = [make_adapter(digest, paths=("lm_head",)) for digest in NARROW]
        wide = [make_adapter(digest, rank=8, paths=("lm_head",)) for digest in WIDE]
        self.house = House(*narrow, *wide, num_bytes=self.room * LM_HEAD_BYTES)
        self.adapters = RequestAdapters(self.house.residency, self.house.cache)
        self.scheduler, _ = make_scheduler(
            num_blocks=999, max_running=MAX_RUNNING, token_budget=999, adapters=self.adapters
        )

    def add(self, letters: str) -> Sequence:
        sequence = make_sequence(str(len(self.arrivals)), [1, 2], adapters=letters)
        self.adapters.add(sequence.request)
        self.scheduler.add(sequence)
        self.arrivals.append(sequence)
        return sequence

    def run_pass(self, num_new: int) -> None:
        before = set(self.scheduler.running)
        batch = run_pass(self.scheduler, num_new=num_new)
        self.admissions += [entry.sequence for entry in batch if entry.sequence not in before]
        assert not self.adapters.take_refusals()
        self.house.settle()
        self.house.residency.check_integrity()

    def run_until(self, is_done: Callable[[], bool], *, next_letters: Callable[[], str], num_new: int = 3) -> None:
        """Let one come in each pass."""
        for _ in range(400):
            if is_done():
                return
            self.add(next_letters())
            self.run_pass(num_new)
        raise AssertionError("it starved")

    def num_overtakers(self, sequence: Sequence) -> int:
        """Return how many that came later, and needed adapters, were let in before."""
        place = self.arrivals.index(sequence)
        later = set(self.arrivals[place + 1 :])
        before = self.admissions[: self.admissions.index(sequence)]
        return sum(other in later and bool(other.request.adapters) for other in before)


@pytest.mark.parametrize("traffic", [("b",), ("b", "")])
def test_one_that_finds_no_hole_gets_on_though_users_of_a_part_of_it_keep_coming(traffic: tuple[str, ...]) -> None:
    street = Street(room=3)
    for letters in "abc":  # side by side
        street.add(letters)
        street.run_pass(1)
        street.run_pass(1)
    letters = cycle(traffic)
    street.run_until(lambda: len(street.arrivals) == 8, next_letters=lambda: next(letters))
    fused = street.add("bw")
    street.run_until(lambda: fused in street.admissions, next_letters=lambda: next(letters))
    assert street.num_overtakers(fused) == MAX_OVERTAKEN


def test_one_that_finds_no_hole_gets_on_beside_requests_for_the_base_that_never_cease() -> None:
    street = Street(room=3)
    for letters in "abc":
        street.add(letters)
        street.run_pass(1)
        street.run_pass(1)
    street.house.residency._evict("a")
    street.house.residency._evict("c")
    street.add("")
    street.run_pass(3)
    fused = street.add("bw")
    street.run_until(lambda: fused in street.admissions, next_letters=lambda: "")
    assert street.num_overtakers(fused) == 0


@settings(max_examples=60)
@given(
    room=st.integers(3, 5),
    traffic=st.lists(
        st.lists(st.sampled_from(["", "a", "b", "c", "d", "e", "w", "ab", "bw", "aw", "ce"]), max_size=3),
        min_size=1,
        max_size=12,
    ),
    num_new=st.integers(1, 6),
)
def test_everybody_gets_on_after_a_bounded_number_of_others(room: int, traffic: list[list[str]], num_new: int) -> None:
    street = Street(room)
    waves = deque(traffic * 12)
    bound = 100 + 10 * sum(map(len, waves)) * (num_new + 1)
    num_passes = 0
    while waves or street.scheduler.has_work:
        for letters in waves.popleft() if waves else ():
            street.add(letters)
        street.run_pass(num_new)
        num_passes += 1
        assert num_passes < bound, "somebody starves"
    # What comes for one is on its way for a pass, in which others may pass it uncounted.
    for sequence in street.arrivals:
        assert street.num_overtakers(sequence) <= MAX_OVERTAKEN + 2 * MAX_RUNNING
    assert street.house.residency.num_pins == 0
