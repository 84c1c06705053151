"""Parts come to the arena, stay while they are pinned, leave in order, and nobody waits for ever or is told a lie."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from motley_adapters.demand import demand_of
from motley_adapters.errors import CapacityError, LeaseError
from motley_adapters.residency import MAX_LOADS
from motley_adapters.spec import Adapter, AdapterSpec
from motley_kernels.adapter_delta import DeltaUnit
from motley_kernels.adapter_delta.pool import ALIGNMENT
from motley_kernels.adapter_delta.types import Gate
from residency_house import LETTERS, LM_HEAD_BYTES, NUM_EXTENTS, PATHS, House, letters, make_adapter, release


def test_a_part_is_loaded_bound_and_pinned_without_anybody_waiting() -> None:
    house = House(*letters(1))
    demand = house.demand("a")
    assert house.ask(demand, 0) is None
    assert house.residency.num_loads == 1
    assert house.settle() == {}
    pins = house.ask(demand, 0)
    assert pins is not None
    assert pins.members == ((0, 1.0),)
    house.check(0)
    assert house.sites.bound[0]["lm_head"].scaling == 1.0
    assert (house.watcher.num_loads, house.residency.num_resident_parts) == (1, 1)


def test_pins_are_released_exactly_once() -> None:
    house = House(*letters(1))
    first, other = house.pin("a"), house.pin("a")
    release(first)
    with pytest.raises(LeaseError) as caught:
        release(first)
    assert caught.value.reason == "LEASE_RELEASED"
    house.residency.check_integrity()
    assert house.residency.num_pins == 1
    release(other)
    assert house.residency.num_pins == 0


def test_arena_bytes_are_those_of_the_true_rank_and_alignment() -> None:
    narrow, wide = make_adapter("a", rank=4), make_adapter("b", rank=64)
    house = House(narrow, wide, room=30)
    arena, used = house.residency.arena, []
    for adapter in (narrow, wide):
        before = arena.num_used_bytes
        house.pin(adapter.spec.digest)
        used.append(arena.num_used_bytes - before)
        slack = NUM_EXTENTS * ALIGNMENT + sum(64 * 4 for unit in adapter.units.values() for _ in unit.tensors)
        assert adapter.spec.nbytes <= used[-1] <= adapter.spec.nbytes + slack
    assert wide.spec.nbytes == 16 * narrow.spec.nbytes
    assert used[1] > 10 * used[0]


def test_pinned_parts_stay_and_a_demand_without_room_waits_for_them() -> None:
    house = House(*letters(4))
    held = [house.pin(digest) for digest in "abc"]
    house.residency.look_ahead([house.demand("d")])
    assert house.ask(house.demand("d"), 0) is None
    assert (house.residency.num_loads, house.resident()) == (0, "abc")
    release(held[1])
    house.pin("d")
    assert house.resident() == "acd"
    assert house.watcher.num_evictions == 1


def test_what_nobody_waits_for_leaves_first_and_least_recently_used() -> None:
    house = House(*letters(4))
    for digest in "abca":
        release(house.pin(digest))
    house.residency.look_ahead([house.demand("d"), house.demand("b")])
    release(house.pin("d"))
    assert house.resident() == "abd"


def test_what_is_waited_for_longest_ahead_leaves_next_and_nothing_that_an_earlier_place_waits_for() -> None:
    house = House(*letters(5))
    for digest in "abc":
        release(house.pin(digest))
    house.residency.look_ahead([house.demand(digest) for digest in "bdca"])
    assert house.ask(house.demand("d"), 1) is None
    house.settle()
    assert house.resident() == "bcd"
    house.residency.look_ahead([house.demand(digest) for digest in "bcde"])
    assert house.ask(house.demand("e"), 3) is None
    assert (house.residency.num_loads, house.resident()) == (0, "bcd")


def test_nothing_is_evicted_for_a_demand_that_would_not_fit_even_then() -> None:
    house = House(*letters(2), make_adapter("c", rank=10))
    held = house.pin("a")
    release(house.pin("b"))
    assert house.ask(house.demand("c"), 0) is None
    assert house.resident() == "ab"
    release(held)
    house.pin("c")
    assert house.resident() == "c"


def test_nothing_is_evicted_for_a_demand_that_would_find_no_hole_even_then() -> None:
    house = make_row_of_three()
    release(*[house.pin(digest) for digest in "ac"])
    held = house.pin("b")
    assert not house.residency.prefetch(house.demand("w"), 0)
    assert (house.watcher.num_evictions, house.resident()) == (0, "abc")
    release(held)
    house.pin("w")


def make_row_of_three() -> House:
    """Make a house where a, b and c lie side by side and fill the arena; w takes the room of two neighbours."""
    small = [make_adapter(digest, paths=("lm_head",)) for digest in "abc"]
    house = House(*small, make_adapter("w", rank=8, paths=("lm_head",)), num_bytes=3 * LM_HEAD_BYTES)
    release(*[house.pin(digest) for digest in "abc"])
    return house


def test_a_set_is_pinned_when_all_of_it_is_there_and_a_shared_part_once() -> None:
    house = House(make_adapter("a", shared="p"), make_adapter("b", shared="p"), room=4)
    pins = house.pin("a", "b")
    assert [weight for _, weight in pins.members] == [1.0, 1.0, 2.0]
    assert house.watcher.num_loads == 3
    assert house.resident() == "abp"
    other = house.pin("b")
    release(pins)
    house.residency.check_integrity()
    house.residency.look_ahead([])
    assert house.residency.num_pins == 1
    release(other)


def test_a_part_whose_weight_is_zero_is_neither_loaded_nor_pinned() -> None:
    house = House(make_adapter("a", shared="p"), make_adapter("b", shared="p"), room=4)
    demand = demand_of([(house.cache.spec("a"), 1.5), (house.cache.spec("b"), -1.5)])
    house.ask(demand, 0)
    house.settle()
    pins = house.ask(demand, 0)
    assert pins is not None
    assert (len(pins.members), house.resident()) == (2, "ab")


def test_a_demand_larger_than_the_arena_is_refused_by_the_bytes() -> None:
    house = House(*letters(4), make_adapter("e", rank=40))
    for digests in ("e", "abcd"):
        with pytest.raises(CapacityError, match="bytes on the device") as caught:
            house.residency.check(house.demand(*digests))
        assert caught.value.reason == "ADAPTER_TOO_LARGE"
    house.residency.check(house.demand(*"abc"))


def test_one_whose_size_is_unknown_is_measured_first_and_refused_then() -> None:
    house = House(*letters(1), make_adapter("e", rank=40), host_bytes=0)
    demand = house.demand("e")
    assert house.ask(demand, 0) is None
    assert house.settle() == {}
    with pytest.raises(CapacityError):
        house.ask(demand, 0)
    house.pin("a")


def measure(house: House, digest: str) -> None:
    """Let the size of an adapter that is not in memory become known, which reads nothing."""
    assert house.ask(house.demand(digest), 0) is None
    assert house.settle() == {}


def test_a_failed_load_is_told_once_takes_nothing_and_may_be_tried_again() -> None:
    house = House(*letters(2), host_bytes=0)
    lost = house.source.adapters.pop("a")
    measure(house, "a")
    for _ in range(2):
        assert house.ask(house.demand("a"), 0) is None
        failures = house.settle()
        assert [(digest, error.reason) for digest, error in failures.items()] == [("a", "ADAPTER_UNREADABLE")]
        assert house.residency.poll() == {}
    assert house.watcher.num_failures == 2
    house.source.adapters["a"] = lost
    house.pin("a", "b")


def test_a_load_that_fails_after_its_place_was_taken_gives_the_place_back() -> None:
    house = House(*letters(3), host_bytes=0)
    release(house.pin("a"))
    house.residency.look_ahead([])
    held = [house.pin("b"), house.pin("c")]
    release(*held)
    large = House(*letters(2), room=1, host_bytes=0)
    release(large.pin("a"))
    release(large.pin("b"))
    del large.source.adapters["a"]
    assert large.ask(large.demand("a"), 0) is None
    assert large.residency.arena.num_used_bytes == large.part_bytes
    assert set(large.settle()) == {"a"}
    assert large.residency.arena.num_used_bytes == 0


def test_an_adapter_that_changed_since_is_an_error_of_its_own() -> None:
    house = House(*letters(2), host_bytes=0)
    house.source.adapters["a"] = make_adapter("b")
    measure(house, "a")
    house.ask(house.demand("a"), 0)
    assert house.settle()["a"].reason == "ADAPTER_CHANGED"


def test_units_that_no_site_takes_fail_their_load_and_nothing_else() -> None:
    misfit = make_adapter("a")
    misfit = replace(misfit, units={"misfit": misfit.units["lm_head"]})
    house = House(misfit, make_adapter("b"))
    house.ask(house.demand("a"), 0)
    assert house.settle()["a"].reason == "ADAPTER_UNREADABLE"
    assert house.residency.arena.num_used_bytes == 0
    house.sites.num_binds = 1  # the slot of the misfit is gone
    house.pin("b")


@pytest.mark.usefixtures("two_threads")
def test_the_owner_never_waits_for_a_slow_source_and_no_more_than_so_many_loads_wait_for_it() -> None:
    house = House(*letters(16), room=20, host_bytes=0)
    house.source.open.clear()
    began = time.monotonic()
    for place, digest in enumerate(LETTERS[:16]):
        assert house.ask(house.demand(digest), place) is None
    assert house.residency.poll() == {}
    assert time.monotonic() - began < 5
    assert house.residency.num_loads == MAX_LOADS
    house.source.open.set()
    for digest in LETTERS[:16]:
        house.pin(digest)
    assert house.source.threads == {("adapter loader", 1)}
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


def threads_of_a_new_thread() -> int:
    counts: list[int] = []
    thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return counts[0]


def test_what_is_kept_stays_until_it_is_let_go() -> None:
    house = House(*letters(4))
    house.residency.keep("a")
    house.residency.fetch_kept()
    house.settle()
    for digest in "bcdbcd":
        release(house.pin(digest))
    assert house.residency.is_resident("a")
    with pytest.raises(CapacityError):
        house.residency.check(house.demand(*"bcd"))
    house.residency.kept.remove("a")
    release(house.pin(*"bcd"))
    assert house.resident() == "bcd"


def test_what_shall_be_kept_takes_the_place_of_what_is_waited_for_and_comes_back_after_a_failure_only_if_asked() -> (
    None
):
    house = House(*letters(4), host_bytes=0)
    for digest in "abc":
        release(house.pin(digest))
    house.residency.look_ahead([house.demand(digest) for digest in "abc"])
    house.residency.keep("d")
    house.residency.fetch_kept()
    house.settle()
    house.residency.fetch_kept()
    house.settle()
    assert house.resident() == "abd"
    house.residency.kept.remove("d")
    del house.source.adapters["c"]
    house.residency.keep("c")
    house.residency.fetch_kept()
    assert set(house.settle()) == {"c"}
    house.residency.fetch_kept()
    assert house.residency.num_loads == 0


def test_what_shall_be_kept_does_not_take_the_place_of_what_came_for_the_first_of_the_line() -> None:
    house = House(*letters(4))
    held = house.pin("c")
    release(house.pin("a"), house.pin("b"))
    house.residency.look_ahead([house.demand("a", "b")])
    house.residency.keep("d")
    house.residency.fetch_kept()
    assert (house.residency.num_loads, house.resident()) == (0, "abc")
    release(held)
    house.residency.fetch_kept()
    house.settle()
    assert house.resident() == "abd"


def test_the_first_of_the_line_gets_on_where_only_holes_around_its_own_part_are_left() -> None:
    house = make_row_of_three()
    for digest in "ac":
        house.residency._evict(digest)
    house.residency.look_ahead([house.demand("b", "w")])
    held = house.pin()  # of no part: in nobody's way
    house.pin("b", "w")
    release(held)
    assert house.watcher.num_evictions == 3


def test_what_is_kept_in_the_middle_leaves_no_room_and_the_first_of_the_line_is_told() -> None:
    house = make_row_of_three()
    house.residency.keep("b")
    with pytest.raises(CapacityError, match="beside the adapters that are kept"):
        house.ask(house.demand("w"), 0)


def test_bytes_that_are_given_up_are_poisoned() -> None:
    house = House(*letters(2), room=1)
    release(house.pin("a"))
    stale = house.sites.bound[0]["lm_head"].a
    assert stale is not None
    house.residency.look_ahead([])
    house.source.open.clear()
    house.residency._evict("a")
    assert bool(torch.isnan(stale).all())


def test_channels_and_routers_arrive_as_they_are() -> None:
    channels = torch.tensor([1, 5, 7], dtype=torch.int32)
    router = torch.randn(2, 64)
    units = {
        PATHS[0]: DeltaUnit(None, torch.randn(3, 64), 1.0, inputs=channels),
        PATHS[1]: DeltaUnit(torch.randn(3, 64), None, 1.0, outputs=channels),
        PATHS[2]: DeltaUnit(torch.randn(4, 64), torch.randn(4, 64), -0.5, gate=Gate(router, 1)),
    }
    spec = AdapterSpec("z", "mixed", {}, {}, "undeclared", sum(unit.nbytes for unit in units.values()))
    house = House(Adapter(spec, units), room=6)
    house.ask(house.demand("z"), 0)
    house.settle()
    bound = house.sites.bound[0]
    assert set(bound) == set(units)
    for path, unit in units.items():
        for there, given in zip(bound[path].tensors, unit.tensors, strict=True):
            assert there.dtype == given.dtype
            assert torch.equal(there, given)
            assert there.untyped_storage().data_ptr() == house.pool.buffer.untyped_storage().data_ptr()


def test_the_loader_ends_with_its_owner() -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "adapter loader"}
    house = House(*letters(1))
    house.pin("a")
    (loader,) = {thread for thread in threading.enumerate() if thread.name == "adapter loader"} - before
    del house
    gc.collect()
    loader.join(10)
    assert not loader.is_alive()


@contextmanager
def damaged(house: House) -> Iterator[None]:
    house.residency._parts["a"].num_pins += 1
    yield
    house.residency._parts["a"].num_pins -= 1


def test_the_integrity_check_sees_a_pin_too_many() -> None:
    house = House(*letters(1))
    house.pin("a")
    with damaged(house), pytest.raises(RuntimeError, match="2 pins, 1 are held"):
        house.residency.check_integrity()
    house.residency.check_integrity()
