"""The scheduler, without a model: a fake pass computes what was scheduled and appends a token to whoever caught up."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from counting_observer import CountingObserver
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_server.engine.block_pool import BlockPool
from motley_server.engine.scheduler import MAX_OVERTAKEN, Scheduled, Scheduler
from motley_server.engine.sequence import Sequence
from motley_server.engine.types import GenerateRequest, SamplingParams, ServedAdapter

BLOCK_SIZE = 4


@dataclass
class FakePin:
    """One sequence's hold on its adapters."""

    book: FakeAdapters
    digests: frozenset[str]
    members: tuple[tuple[int, float], ...] = ()

    def release(self) -> None:
        self.book.pinned.remove(self)


@dataclass
class FakeAdapters:
    """Room for so many adapters at once; what is asked for arrives, if there is room then, before the next pass."""

    room: int = 10**6
    absent: set[str] = field(default_factory=set)  # never arrive
    pinned: list[FakePin] = field(default_factory=list)
    resident: set[str] = field(default_factory=set)
    looks: list[list[str]] = field(default_factory=list)
    line: list[frozenset[str]] = field(default_factory=list)

    def look_ahead(self, waiting: list[GenerateRequest]) -> None:
        self.looks.append([request.request_id for request in waiting])
        self.line = [digests_of(request) for request in waiting]

    def try_pin(self, request: GenerateRequest, place: int) -> FakePin | None:
        if not self.prefetch(request, place):
            return None
        self.pinned.append(FakePin(self, digests_of(request)))
        return self.pinned[-1]

    def prefetch(self, request: GenerateRequest, place: int) -> bool:
        wanted = digests_of(request)
        if wanted <= self.resident:
            return True
        stays = wanted.union(*(pin.digests for pin in self.pinned), *self.line[:place]) & (self.resident | wanted)
        if not wanted & self.absent and len(stays) <= self.room:
            idle = sorted(self.resident - stays)
            self.resident = stays | set(idle[: self.room - len(stays)])
        return False


def digests_of(request: GenerateRequest) -> frozenset[str]:
    return frozenset(adapter.digest for adapter in request.adapters)


def make_scheduler(
    *,
    num_blocks: int = 64,
    max_running: int = 8,
    token_budget: int = 16,
    prefix_cache: bool = True,
    adapters: FakeAdapters | None = None,
) -> tuple[Scheduler, CountingObserver]:
    observer = CountingObserver()
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(
        pool,
        adapters or FakeAdapters(),
        observer,
        max_running=max_running,
        token_budget=token_budget,
        prefix_cache=prefix_cache,
    )
    return scheduler, observer


def make_sequence(name: str, prompt: list[int], seed: bytes = b"base", adapters: str = "") -> Sequence:
    """Make a sequence under adapters that have a letter each."""
    served = tuple(ServedAdapter(letter, 1, letter, 1.0, "undeclared", "lora") for letter in adapters)
    request = GenerateRequest(name, "local", tuple(prompt), SamplingParams(max_new_tokens=8), served)
    return Sequence(request, 0, seed + adapters.encode())


def run_pass(scheduler: Scheduler, *, num_new: int = 8) -> list[Scheduled]:
    """Compute one pass; a sequence with `num_new` answered tokens is done."""
    batch = scheduler.schedule()
    scheduler.complete(batch)
    for entry in batch:
        sequence = entry.sequence
        if sequence.num_uncomputed_tokens == 0:
            sequence.token_ids.append(sequence.num_tokens)
            if sequence.num_output_tokens == num_new:
                scheduler.remove(sequence)
    scheduler.check_integrity()
    return batch


def shape(batch: list[Scheduled]) -> dict[str, int]:
    return {entry.sequence.request.request_id: entry.num_tokens for entry in batch}


def test_a_prompt_beyond_the_budget_is_computed_in_chunks() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    scheduler.add(make_sequence("long", list(range(40))))
    assert [shape(run_pass(scheduler)) for _ in range(4)] == [{"long": 16}, {"long": 16}, {"long": 8}, {"long": 1}]


def test_a_stream_goes_on_in_every_pass_while_a_long_prompt_is_computed() -> None:
    scheduler, _ = make_scheduler(token_budget=16)
    scheduler.add(make_sequence("stream", [1, 2, 3]))
    run_pass(scheduler)
    scheduler.add(make_sequence("long", list(range(100, 160))))
    assert [shape(run_pass(scheduler)) for _ in range(3)] == [{"stream": 1, "long": 15}] * 3


def test_a_prefix_is_shared_only_under_the_same_seed() -> None:
    scheduler, observer = make_scheduler(token_budget=64)
    prompt = list(range(13))
    scheduler.add(make_sequence("first", prompt))
    run_pass(scheduler)
    scheduler.add(make_sequence("same", prompt))
    scheduler.add(make_sequence("other", prompt, seed=b"adapter"))
    assert shape(run_pass(scheduler)) == {"first": 1, "same": 1, "other": 13}
    assert observer.num_hit_tokens == 12


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    scheduler, _ = make_scheduler(token_budget=64)
    prompt = list(range(8))
    scheduler.add(make_sequence("first", prompt))
    run_pass(scheduler)
    scheduler.add(make_sequence("again", prompt))
    assert shape(run_pass(scheduler))["again"] == 4


def test_the_youngest_is_preempted_when_blocks_run_out_and_comes_back_first() -> None:
    scheduler, observer = make_scheduler(num_blocks=4, token_budget=32)
    old, young = make_sequence("old", list(range(8))), make_sequence("young", list(range(50, 58)))
    scheduler.add(old)
    scheduler.add(young)
    assert shape(run_pass(scheduler, num_new=99)) == {"old": 8, "young": 8}
    assert shape(run_pass(scheduler, num_new=99)) == {"old": 1}
    assert observer.num_preemptions == 1
    assert list(scheduler.waiting) == [young]
    assert young.num_computed_tokens == 0


def test_removing_a_waiting_or_running_sequence_gives_everything_back() -> None:
    scheduler, _ = make_scheduler(max_running=1)
    running, waiting = make_sequence("running", [1] * 9), make_sequence("waiting", [2] * 9)
    scheduler.add(running)
    scheduler.add(waiting)
    run_pass(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 0
    assert not scheduler.has_work


@settings(max_examples=80, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2), st.integers(1, 12)), min_size=1, max_size=10),
    num_blocks=st.integers(13, 40),
    token_budget=st.integers(1, 48),
    max_running=st.integers(1, 6),
    prefix_cache=st.booleans(),
    room=st.integers(2, 4),
)
def test_every_sequence_finishes_whatever_the_sizes(
    prompts: list[tuple[int, int, int]],
    num_blocks: int,
    token_budget: int,
    max_running: int,
    prefix_cache: bool,
    room: int,
) -> None:
    adapters = FakeAdapters(room)
    scheduler, _ = make_scheduler(
        num_blocks=num_blocks,
        token_budget=token_budget,
        max_running=max_running,
        prefix_cache=prefix_cache,
        adapters=adapters,
    )
    for index, (length, kind, which) in enumerate(prompts):
        scheduler.add(make_sequence(str(index), [kind] * length, adapters=("", "a", "bc", "c", "d")[which % 5]))
    for _ in range(2000):
        if not scheduler.has_work:
            break
        batch = run_pass(scheduler)
        assert sum(entry.num_tokens for entry in batch) <= token_budget
        assert len(scheduler.running) <= max_running
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0
    assert not adapters.pinned


def admitted(batch: list[Scheduled]) -> str:
    return "".join(entry.sequence.request.request_id[0] for entry in batch)


def test_one_whose_adapter_is_not_there_is_passed_and_begins_when_it_is() -> None:
    adapters = FakeAdapters(absent={"x"})
    scheduler, _ = make_scheduler(adapters=adapters)
    for name in ("x", "a", "-"):
        scheduler.add(make_sequence(name, [1], adapters=name.strip("-")))
    assert admitted(scheduler.schedule()) == "-"
    assert scheduler.num_waiting_for_adapters == 2
    assert admitted(scheduler.schedule()) == "-a"
    assert adapters.looks == [["x", "a", "-"], ["x", "a"]]
    adapters.absent.clear()
    scheduler.schedule()
    assert admitted(scheduler.schedule()) == "-ax"
    assert scheduler.num_waiting_for_adapters == 0


def test_one_that_was_overtaken_too_often_lets_only_its_own_adapters_and_none_pass() -> None:
    adapters = FakeAdapters(absent={"x"}, resident={"a", "b", "y"})
    scheduler, _ = make_scheduler(adapters=adapters, max_running=99, num_blocks=99, token_budget=99)
    scheduler.add(make_sequence("x", [1], adapters="xy"))
    for _ in range(MAX_OVERTAKEN + 3):
        scheduler.add(make_sequence("a", [1], adapters="a"))
    assert len(scheduler.schedule()) == MAX_OVERTAKEN
    for name, own in (("b", "b"), ("y", "y"), ("-", "")):
        scheduler.add(make_sequence(name, [1], adapters=own))
    assert admitted(scheduler.schedule())[MAX_OVERTAKEN:] == "y-"
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["x", "a", "a", "a", "b"]
    adapters.absent.clear()
    scheduler.schedule()
    assert admitted(scheduler.schedule())[-5:] == "xaaab"


def test_pins_are_released_once_by_preemption_and_once_by_removal() -> None:
    adapters = FakeAdapters(resident={"a", "b"})
    scheduler, observer = make_scheduler(num_blocks=4, token_budget=32, adapters=adapters)
    old, young = (make_sequence(name, list(range(8)), adapters=name) for name in "ab")
    scheduler.add(old)
    scheduler.add(young)
    run_pass(scheduler, num_new=99)
    assert len(adapters.pinned) == 2
    run_pass(scheduler, num_new=99)
    assert observer.num_preemptions == 1
    assert [pin.digests for pin in adapters.pinned] == [{"a"}]
    scheduler.remove(young)
    scheduler.remove(old)
    assert not adapters.pinned


def test_one_that_lacks_blocks_holds_no_pins_and_is_passed_by_nobody() -> None:
    adapters = FakeAdapters(resident={"a", "b"})
    scheduler, _ = make_scheduler(num_blocks=4, token_budget=32, adapters=adapters)
    scheduler.add(make_sequence("a", [1] * 8, adapters="a"))
    scheduler.add(make_sequence("b", [2] * 12, adapters="b"))
    scheduler.add(make_sequence("c", [3]))
    assert admitted(scheduler.schedule()) == "a"
    assert [pin.digests for pin in adapters.pinned] == [{"a"}]
    scheduler.check_integrity()


def test_those_that_wait_for_room_to_run_have_their_adapters_fetched() -> None:
    adapters = FakeAdapters()
    scheduler, _ = make_scheduler(max_running=1, adapters=adapters)
    scheduler.add(make_sequence("-", [1]))
    scheduler.add(make_sequence("a", [1], adapters="a"))
    run_pass(scheduler)
    assert adapters.resident == {"a"}


@pytest.mark.parametrize("damage", ["waiting", "running"])
def test_the_integrity_check_sees_pins_that_are_not_where_they_belong(damage: str) -> None:
    scheduler, _ = make_scheduler(max_running=1)
    running, waiting = make_sequence("running", [1]), make_sequence("waiting", [1])
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    running.pins, waiting.pins = (None, None) if damage == "running" else (running.pins, running.pins)
    with pytest.raises(AssertionError, match="pins"):
        scheduler.check_integrity()
