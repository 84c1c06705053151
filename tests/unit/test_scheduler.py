"""The scheduler: who takes part in a pass, with how many tokens, and who waits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from motley_server.engine.scheduler import MAX_OVERTAKEN, Scheduled
from motley_server.engine.waiting_line import WINDOW
from scheduler_house import FakeAdapters, make_scheduler, make_sequence, run_pass, shape


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


def test_behind_one_that_found_no_room_too_often_only_those_without_adapters_come_in() -> None:
    adapters = FakeAdapters(room=2, resident={"a", "y"})
    scheduler, _ = make_scheduler(adapters=adapters, max_running=99, num_blocks=99, token_budget=99)
    scheduler.add(make_sequence("a", [1], adapters="a"))
    scheduler.schedule()
    late = make_sequence("x", [1], adapters="xy")
    scheduler.add(late)
    for name, own in [("-", "")] * MAX_OVERTAKEN + [("a", "a")] * (MAX_OVERTAKEN + 3):
        scheduler.add(make_sequence(name, [1], adapters=own))
    assert admitted(scheduler.schedule()) == "a" + "-" * MAX_OVERTAKEN + "a" * MAX_OVERTAKEN
    assert late.num_overtaken == MAX_OVERTAKEN
    for name, own in (("y", "y"), ("-", "")):
        scheduler.add(make_sequence(name, [1], adapters=own))
    assert admitted(scheduler.schedule())[2 * MAX_OVERTAKEN + 1 :] == "-"
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["x", "a", "a", "a", "y"]
    for sequence in list(scheduler.running):
        scheduler.remove(sequence)
    scheduler.schedule()
    assert admitted(scheduler.schedule()) == "yx"


def test_one_whose_adapter_is_on_its_way_is_in_nobodys_way() -> None:
    adapters = FakeAdapters(absent={"x"}, resident={"a"})
    scheduler, _ = make_scheduler(adapters=adapters, max_running=99, num_blocks=99, token_budget=99)
    slow = make_sequence("x", [1], adapters="x")
    scheduler.add(slow)
    for _ in range(MAX_OVERTAKEN + 3):
        scheduler.add(make_sequence("a", [1], adapters="a"))
    assert len(scheduler.schedule()) == MAX_OVERTAKEN + 3
    assert slow.num_overtaken == 0


def test_those_held_back_are_counted_among_those_who_wait_for_adapters() -> None:
    adapters = FakeAdapters(room=1, resident={"a"})
    scheduler, _ = make_scheduler(adapters=adapters)
    scheduler.add(make_sequence("a", [1], adapters="a"))
    scheduler.schedule()
    late = make_sequence("late", [1], adapters="x")
    late.num_overtaken = MAX_OVERTAKEN
    for sequence in (late, make_sequence("held", [1], adapters="a"), make_sequence("cold", [1], adapters="b")):
        scheduler.add(sequence)
    scheduler.add(make_sequence("-", [1]))
    scheduler.schedule()
    assert scheduler.num_waiting_for_adapters == 3


def test_those_who_need_no_load_are_found_behind_any_number_who_do_and_looked_for_only_if_something_changed() -> None:
    adapters = FakeAdapters(absent={"x"}, resident={"a"})
    scheduler, _ = make_scheduler(adapters=adapters)
    for index in range(5 * WINDOW):
        scheduler.add(make_sequence(f"x{index}", [1], adapters="x"))
    scheduler.add(make_sequence("a", [1], adapters="a"))
    scheduler.add(make_sequence("-", [1]))
    assert admitted(scheduler.schedule()) == "a-"
    adapters.num_checks = 0
    scheduler.schedule()
    assert adapters.num_checks == 5 * WINDOW, "the line changed"
    adapters.num_checks = 0
    scheduler.schedule()
    assert adapters.num_checks == WINDOW
    adapters.absent.clear()
    scheduler.schedule()
    assert len(scheduler.schedule()) == 8


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
