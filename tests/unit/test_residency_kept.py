"""What is kept on the device stays there and takes no more than its share; what is forgotten leaves nothing behind."""

from __future__ import annotations

import pytest
from motley_adapters.errors import CapacityError
from motley_adapters.kept import PATIENCE
from motley_adapters.part_sizes import PartSizes
from residency_house import LETTERS, House, letters, make_adapter, release


def fetch(house: House) -> dict[str, str]:
    """Fetch what is kept until nothing changes; return why what is not kept was refused, by digest."""
    for _ in range(3):
        house.residency.fetch_kept()
        house.settle()
    return {digest: error.reason for digest, error in house.residency.kept.take_refused().items()}


def test_what_is_kept_takes_half_of_the_arena_and_not_a_byte_more() -> None:
    house = House(*letters(3), room=4)
    for digest in "abb":
        house.residency.keep(digest)
    with pytest.raises(CapacityError) as caught:
        house.residency.keep("c")
    assert caught.value.reason == "PINS_FULL"
    assert fetch(house) == {}
    assert house.resident() == "ab"
    release(house.pin("c"))
    house.residency.kept.remove("a")
    house.residency.keep("c")
    assert house.residency.kept.parts == set("bc")


def test_the_share_holds_when_bytes_become_known_late_and_what_came_first_stays() -> None:
    house = House(*letters(3), make_adapter("e", rank=40), room=4, host_bytes=0)
    for digest in "eabc":
        house.residency.keep(digest)
    assert fetch(house) == {"c": "PINS_FULL", "e": "ADAPTER_TOO_LARGE"}
    assert house.resident() == "ab"
    assert house.watcher.num_loads == 2, "what is refused is not loaded"
    assert (house.watcher.num_failures, fetch(house)) == (0, {})


@pytest.mark.parametrize(("rank", "reason"), [(10, "PINS_FULL"), (40, "ADAPTER_TOO_LARGE")])
@pytest.mark.parametrize("host_bytes", [0, 2**24])
def test_one_that_is_too_large_alone_is_told_so_and_is_in_nobodys_way(rank: int, reason: str, host_bytes: int) -> None:
    house = House(*letters(3), make_adapter("e", rank=rank), host_bytes=host_bytes)
    if host_bytes:
        with pytest.raises(CapacityError) as caught:
            house.residency.keep("e")
        assert caught.value.reason == reason
    else:
        house.residency.keep("e")
        assert fetch(house) == {"e": reason}
    assert "e" not in house.residency.kept
    release(house.pin(*"abc"))


def test_a_part_that_two_kept_adapters_share_is_counted_once() -> None:
    shared = House(make_adapter("a", shared="p"), make_adapter("b", shared="p"))
    one = shared.residency.sizes.num_bytes(["a"])
    together = shared.residency.sizes.num_bytes("abp")
    for num_bytes, refused in ((2 * together, set()), (2 * together - one, {"b"})):
        house = House(make_adapter("a", shared="p"), make_adapter("b", shared="p"), num_bytes=num_bytes, host_bytes=0)
        house.residency.keep("a")
        house.residency.keep("b")
        assert set(fetch(house)) == refused


def test_a_failed_load_is_not_kept_and_says_why() -> None:
    house = House(*letters(2), room=4, host_bytes=0)
    del house.source.adapters["a"]
    house.residency.keep("a")
    house.residency.keep("b")
    assert fetch(house) == {"a": "ADAPTER_UNREADABLE"}
    assert (house.resident(), house.residency.kept.parts) == ("b", {"b"})


def test_holes_between_what_is_kept_that_are_all_too_small_are_a_refusal_and_evict_nobody() -> None:
    small = [make_adapter(digest, paths=("lm_head",)) for digest in LETTERS[:16]]
    wide = make_adapter("w", rank=20, paths=("lm_head",))  # five places
    place_bytes = House(*small).residency.sizes.num_bytes("a")
    house = House(*small, wide, num_bytes=16 * place_bytes)
    release(*[house.pin(digest) for digest in LETTERS[:16]])
    for digest in (LETTERS[4], LETTERS[9], LETTERS[13]):
        house.residency.keep(digest)
    house.residency.keep("w")
    assert fetch(house) == {"w": "PINS_FULL"}
    assert (house.resident(), house.watcher.num_evictions) == (LETTERS[:16], 0)


def test_what_shall_be_kept_waits_for_those_who_wait_before_it_but_not_for_ever() -> None:
    house = House(*letters(5))
    held = house.pin("c")
    release(house.pin("a"), house.pin("b"))
    house.residency.look_ahead([house.demand("a", "b"), house.demand("e")])
    house.residency.keep("d")
    for _ in range(PATIENCE):
        assert house.residency.prefetch(house.demand("a", "b"), 0)
        house.residency.fetch_kept()
        assert (house.residency.num_loads, house.resident()) == (0, "abc")
    assert fetch(house) == {}
    assert house.residency.is_resident("d")
    assert house.residency.is_resident("c"), "it is in use"
    release(held)
    release(house.pin("e"))


def test_nobody_takes_the_room_that_comes_free_from_what_waited_for_it_too_long() -> None:
    house = House(*letters(5))
    held = [house.pin(digest) for digest in "abc"]
    house.residency.keep("d")
    for _ in range(PATIENCE):
        house.residency.fetch_kept()
    release(held[0])
    assert not house.residency.prefetch(house.demand("e"), 0)
    assert fetch(house) == {}
    assert house.resident() == "bcd"
    release(held[1])
    release(house.pin("e"))


def test_forgotten_sizes_go_with_the_last_that_needs_them() -> None:
    house = House(make_adapter("a", shared="p"), make_adapter("b", shared="p"), *letters(4)[2:], room=4)
    sizes = house.residency.sizes
    release(house.pin("a"))
    for digest in "ac":
        house.residency.forget(digest)
    assert (sizes.are_known("abpd"), sizes.are_known("c"), len(sizes)) == (True, False, 4)
    house.residency._evict("a")
    house.residency.forget("b")
    assert (sizes.are_known("p"), sizes.are_known("d"), len(sizes)) == (True, True, 2)
    house.residency._evict("p")
    assert (sizes.are_known("d"), len(sizes)) == (True, 1)
    release(house.pin(*"abc"))
    assert sizes.are_known("abcpd"), "whoever is asked for again is measured again"


def test_what_is_kept_is_not_forgotten() -> None:
    house = House(*letters(3), room=4)
    for digest in "ab":
        house.residency.keep(digest)
        house.residency.forget(digest)
    with pytest.raises(CapacityError):
        house.residency.keep("c")


def test_one_that_is_forgotten_while_it_is_measured_leaves_nothing_unless_it_shall_be_kept() -> None:
    house = House(*letters(3), room=4, host_bytes=0)
    release(house.pin("c"))
    house.source.open.clear()
    house.residency._evict("c")
    house.ask(house.demand("c"))  # the loader is held up by it
    for digest in "ab":
        house.ask(house.demand(digest))
        house.residency.forget(digest)
    house.residency.keep("b")
    house.source.open.set()
    house.settle()
    assert (house.residency.sizes.are_known("bc"), len(house.residency.sizes)) == (True, 2)
    release(house.pin("a"))


def test_an_adapter_that_is_learnt_twice_is_forgotten_at_once() -> None:
    sizes = PartSizes()
    for _ in range(2):
        sizes.learn("a", {"a": (64,), "p": (64, 128)})
    assert (sizes.num_bytes("ap"), sizes.get("p"), sizes.get("b")) == (256, (64, 128), None)
    sizes.forget("a", placed=())
    sizes.forget("a", placed=())
    assert len(sizes) == 0


def test_the_size_of_a_part_outlives_one_adapter_that_shares_it_and_not_the_last() -> None:
    sizes = PartSizes()
    for digest in "ab":
        sizes.learn(digest, {digest: (64,), "p": (64, 128)})
    sizes.forget("a", placed=())
    assert (sizes.are_known("bp"), len(sizes)) == (True, 2)
    sizes.forget("b", placed=())
    assert len(sizes) == 0
