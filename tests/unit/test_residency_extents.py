"""Extents of the arena: every byte is owned once, freed ones grow together, and eviction has an order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from motley_adapters.eviction import EvictionOrder
from motley_adapters.extents import Extent, ExtentAllocator

KIB = 1024


def test_extents_of_one_request_lie_side_by_side_where_they_can() -> None:
    arena = ExtentAllocator(8 * KIB)
    assert arena.allocate([KIB, 2 * KIB, 256]) == [Extent(0, KIB), Extent(KIB, 2 * KIB), Extent(3 * KIB, 256)]
    assert arena.num_used_bytes == 3 * KIB + 256


def test_extents_fill_separate_holes_when_no_hole_is_large_enough() -> None:
    arena = ExtentAllocator(4 * KIB)
    pieces = arena.allocate([KIB] * 4)
    assert pieces is not None
    arena.free([pieces[0], pieces[2]])
    assert arena.allocate([KIB, KIB]) == [pieces[0], pieces[2]]


def test_what_does_not_fit_takes_nothing() -> None:
    arena = ExtentAllocator(4 * KIB)
    pieces = arena.allocate([KIB] * 4)
    assert pieces is not None
    arena.free([pieces[0], pieces[2]])
    assert arena.allocate([KIB, 2 * KIB - 256]) is None
    assert arena.num_used_bytes == 2 * KIB
    arena.check_integrity([pieces[1], pieces[3]])


def test_neighbours_that_are_freed_in_any_order_become_one_hole() -> None:
    arena = ExtentAllocator(4 * KIB)
    pieces = arena.allocate([KIB] * 4)
    assert pieces is not None
    for index in (2, 0, 3, 1):
        arena.free([pieces[index]])
    assert arena.allocate([4 * KIB]) == [Extent(0, 4 * KIB)]


@pytest.mark.parametrize("wrong", [Extent(0, 256), Extent(512, 512), Extent(4 * KIB, 256), Extent(-256, 256)])
def test_freeing_what_is_not_taken_is_an_error(wrong: Extent) -> None:
    arena = ExtentAllocator(4 * KIB)
    pieces = arena.allocate([256, 256, 256])
    assert pieces is not None
    arena.free([pieces[0]])
    with pytest.raises(ValueError, match="not taken"):
        arena.free([wrong])


@pytest.mark.parametrize("size", [0, -256, 100])
def test_a_size_that_no_extent_has_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="an extent of"):
        ExtentAllocator(KIB).allocate([size])


def test_an_arena_of_nothing_has_room_for_nothing_alone() -> None:
    arena = ExtentAllocator(255)
    assert (arena.num_bytes, arena.allocate([]), arena.allocate([256])) == (0, [], None)


@given(seed=st.integers(0, 2**32), num_steps=st.integers(1, 80))
def test_whatever_is_taken_and_freed_every_byte_is_owned_once(seed: int, num_steps: int) -> None:
    rng = random.Random(seed)
    arena = ExtentAllocator(32 * 256)
    taken: list[list[Extent]] = []
    for _ in range(num_steps):
        if taken and rng.random() < 0.45:
            arena.free(taken.pop(rng.randrange(len(taken))))
        else:
            sizes = [256 * rng.randint(1, 6) for _ in range(rng.randint(1, 4))]
            extents = arena.allocate(sizes)
            if extents is not None:
                assert [extent.size for extent in extents] == sizes
                taken.append(extents)
        arena.check_integrity(extent for extents in taken for extent in extents)
    for extents in taken:
        arena.free(extents)
    assert arena.allocate([32 * 256]) == [Extent(0, 32 * 256)]


def test_of_one_size_the_least_recently_used_goes_first() -> None:
    order = EvictionOrder()
    for key in "abc":
        order.use(key, 1000)
    order.use("a", 1000)
    assert order.cheapest("abc") == "b"
    assert order.cheapest("ac") == "c"
    assert order.cheapest([]) is None


def test_the_one_that_is_cheap_to_bring_back_for_its_size_goes_first_but_a_dear_one_ages() -> None:
    order = EvictionOrder()
    order.use("small", 1 << 10)
    given_up = []
    for index in range(4000):
        order.use(f"large {index}", 1 << 20)
        key = order.cheapest([f"large {index}", *(["small"] if "small" not in given_up else [])])
        assert key is not None
        order.give_up(key)
        given_up.append(key)
        if key == "small":
            break
    assert given_up[0] == "large 0"
    assert 100 < len(given_up) < 4000, "it stayed for ever, or went at once"
