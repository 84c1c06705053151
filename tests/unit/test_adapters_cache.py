"""The host cache knows what is leased, counts every byte, brings back what it evicts, and is given back to once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from motley_adapters.cache import AdapterCache, Lease
from motley_adapters.errors import AdapterLoadError, CapacityError, LeaseError, UnknownAdapterError
from motley_adapters.outline import outline_of
from motley_adapters.spec import Adapter, AdapterSpec, Part
from motley_kernels.adapter_delta import DeltaUnit


def adapter(digest: str, num_inputs: int = 8, shared: str | None = None) -> Adapter:
    """Make an adapter of one unit, and of one more that it shares."""
    unit = DeltaUnit(torch.zeros(1, num_inputs), torch.zeros(1, 2), 1.0)
    parts = () if shared is None else (Part(shared, {"x": replace(unit, scaling=-1.0)}),)
    names = tuple(part.digest for part in parts)
    spec = AdapterSpec(digest, "lora", {"x": 1}, {"x": 1.0}, "undeclared", unit.nbytes, shared=names)
    return Adapter(spec, {"x": unit}, parts)


class Source:
    """Make adapters anew, and count how often."""

    def __init__(self, make: Callable[[str], Adapter] = adapter) -> None:
        self.make = make
        self.num_loads: Counter[str] = Counter()

    def load(self, digest: str) -> Adapter:
        self.num_loads[digest] += 1
        return self.make(digest)


NBYTES = adapter("any").spec.nbytes


def cache_of(*digests: str, room: int = 3) -> AdapterCache:
    cache = AdapterCache(room * NBYTES)
    for digest in digests:
        cache.put(adapter(digest))
    return cache


def test_what_is_put_is_what_is_leased() -> None:
    cache, held = AdapterCache(NBYTES), adapter("a")
    cache.put(held)
    lease = cache.acquire("a")
    assert lease.spec is held.spec
    with cache.borrow("a") as borrowed:
        assert borrowed is held
    assert (cache.nbytes, cache.num_leases, len(cache), "a" in cache) == (NBYTES, 1, 1, True)
    cache.check_integrity()


def test_the_same_digest_twice_is_one_entry_even_when_full() -> None:
    cache = cache_of("a", room=1)
    lease = cache.acquire("a")
    cache.put(adapter("a"))
    assert (len(cache), cache.nbytes, cache.num_leases) == (1, NBYTES, 1)
    lease.release()
    cache.check_integrity()


def test_what_does_not_fit_is_refused_with_the_bytes_and_changes_nothing() -> None:
    cache = cache_of("a", "b", room=2)
    with pytest.raises(CapacityError, match=f"{NBYTES} bytes; {2 * NBYTES} of {2 * NBYTES}") as caught:
        cache.put(adapter("c"))
    assert caught.value.reason == "ADAPTER_BYTES_EXHAUSTED"
    assert (cache.nbytes, "c" in cache) == (2 * NBYTES, False)


def test_removing_makes_room_at_once() -> None:
    cache = cache_of("a", room=1)
    cache.remove("a")
    assert cache.nbytes == 0
    cache.put(adapter("b"))
    cache.check_integrity()


@pytest.mark.parametrize("method", ["acquire", "remove", "spec"])
def test_an_unknown_digest_is_an_error_that_names_it(method: str) -> None:
    with pytest.raises(UnknownAdapterError, match="sha256:nobody") as caught:
        getattr(cache_of("a"), method)("sha256:nobody")
    assert caught.value.reason == "ADAPTER_NOT_HELD"


def test_an_unknown_digest_cannot_be_borrowed() -> None:
    with pytest.raises(UnknownAdapterError), cache_of("a").borrow("nobody"):
        pass


def test_a_leased_adapter_stays_until_its_last_lease_ends() -> None:
    cache = cache_of("a")
    leases = [cache.acquire("a"), cache.acquire("a")]
    leases[0].release()
    with pytest.raises(LeaseError) as caught:
        cache.remove("a")
    assert caught.value.reason == "ADAPTER_LEASED"
    leases[1].release()
    cache.remove("a")
    assert (cache.num_leases, len(cache)) == (0, 0)


def test_release_twice_is_an_error_that_takes_nobody_elses_lease() -> None:
    cache = cache_of("a")
    lease, other = cache.acquire("a"), cache.acquire("a")
    lease.release()
    with pytest.raises(LeaseError) as caught:
        lease.release()
    assert caught.value.reason == "LEASE_RELEASED"
    assert cache.num_leases == 1
    other.release()
    assert cache.num_leases == 0


def introduced(*digests: str, source: Source | None = None) -> AdapterCache:
    cache = AdapterCache(NBYTES, source or Source())
    for digest in digests:
        cache.introduce(adapter(digest).spec, outline_of(adapter(digest).parts))
    return cache


def test_what_is_introduced_is_known_not_in_memory_and_read_when_it_is_borrowed() -> None:
    source = Source()
    cache = introduced("a", "b", source=source)
    assert (cache.nbytes, len(cache), cache.in_memory(), cache.is_in_memory("a")) == (0, 2, [], False)
    assert cache.spec("a") == adapter("a").spec
    assert cache.outline("a") == outline_of(adapter("a").parts)
    with cache.acquire("a"), cache.borrow("a") as borrowed:
        assert borrowed.spec.digest == "a"
        assert (cache.is_in_memory("a"), cache.is_in_memory("b"), cache.is_in_memory("nobody")) == (True, False, False)
    assert source.num_loads == {"a": 1}
    cache.check_integrity()


def test_introducing_what_is_known_changes_nothing() -> None:
    cache = introduced("a")
    held = adapter("a")
    cache.put(held)
    lease = cache.acquire("a")
    cache.introduce(adapter("a").spec, {})
    assert (cache.in_memory(), cache.num_leases, len(cache)) == ([held], 1, 1)
    assert cache.outline("a") == outline_of(held.parts)
    lease.release()
    cache.remove("a")


def test_what_was_introduced_is_held_when_it_is_put_and_forgotten_when_removed() -> None:
    cache = introduced("a", "b")
    cache.put(adapter("a"))
    assert (cache.nbytes, len(cache)) == (NBYTES, 2)
    cache.remove("a")
    cache.remove("b")
    assert (cache.nbytes, len(cache)) == (0, 0)
    cache.check_integrity()


def test_without_a_source_nothing_is_introduced() -> None:
    cache = AdapterCache(NBYTES)
    with pytest.raises(ValueError, match="without a source"):
        cache.introduce(adapter("a").spec, outline_of(adapter("a").parts))
    assert "a" not in cache


def test_what_does_not_fit_is_known_and_comes_back_by_itself() -> None:
    source = Source()
    cache = AdapterCache(2 * NBYTES, source)
    for digest in "abc":
        cache.put(adapter(digest))
        assert cache.nbytes <= 2 * NBYTES
    assert [digest in cache for digest in "abc"] == [True] * 3
    for digest in "abcabc":
        with cache.borrow(digest) as borrowed:
            assert borrowed.spec.digest == digest
        cache.check_integrity()
    assert source.num_loads["a"] >= 1


def test_the_least_recently_used_of_one_size_leaves_first_leased_or_not() -> None:
    source = Source()
    cache = AdapterCache(2 * NBYTES, source)
    cache.put(adapter("a"))
    cache.put(adapter("b"))
    lease = cache.acquire("b")
    with cache.borrow("a"):
        pass
    cache.put(adapter("c"))
    assert {held.spec.digest for held in cache.in_memory()} == {"a", "c"}
    lease.release()
    with cache.borrow("b"):
        pass
    assert source.num_loads == {"b": 1}


def test_a_large_one_leaves_before_small_ones_that_cost_more_a_byte() -> None:
    cache = AdapterCache(adapter("x", 1 << 20).spec.nbytes + NBYTES, Source())
    cache.put(adapter("small"))
    cache.put(adapter("large", 1 << 20))
    cache.put(adapter("next"))
    assert {held.spec.digest for held in cache.in_memory()} == {"small", "next"}


def test_what_is_being_copied_stays_and_what_finds_no_room_beside_it_passes_through() -> None:
    cache = AdapterCache(NBYTES, Source())
    cache.put(adapter("a"))
    cache.put(adapter("b"))
    with cache.borrow("b") as held, cache.borrow("a") as passing:
        assert passing.spec.digest == "a"
        assert cache.in_memory() == [held]
        cache.check_integrity()


def test_a_shared_part_is_one_object_counted_once_and_leaves_with_its_last_holder() -> None:
    cache = AdapterCache(3 * NBYTES, Source(lambda digest: adapter(digest, shared="residual")))
    first, second = (adapter(digest, shared="residual") for digest in "ab")
    cache.put(first)
    cache.put(second)
    assert cache.nbytes == 3 * NBYTES
    with cache.borrow("b") as borrowed:
        assert borrowed.shared[0] is first.shared[0]
    cache.remove("a")
    assert cache.nbytes == 2 * NBYTES
    cache.check_integrity()
    cache.remove("b")
    assert cache.nbytes == 0


def test_an_adapter_that_is_another_now_is_refused_and_stays_known() -> None:
    cache = AdapterCache(0, Source(lambda digest: adapter("other")))
    cache.put(adapter("a"))
    with pytest.raises(AdapterLoadError, match="what was a holds other now") as caught, cache.borrow("a"):
        pass
    assert caught.value.reason == "ADAPTER_CHANGED"
    assert "a" in cache
    cache.remove("a")


def test_a_borrowed_adapter_cannot_be_removed() -> None:
    cache = cache_of("a")
    with cache.borrow("a"), pytest.raises(LeaseError):
        cache.remove("a")
    cache.remove("a")


def test_a_lease_is_a_context() -> None:
    cache = cache_of("a")
    with cache.acquire("a") as lease:
        assert (lease.digest, cache.num_leases) == ("a", 1)
    assert cache.num_leases == 0


@pytest.mark.parametrize("damage", ["bytes", "leases", "parts"])
def test_the_integrity_check_sees_a_ledger_that_is_wrong(damage: str) -> None:
    cache = cache_of("a")
    if damage == "bytes":
        cache._nbytes += 1
    elif damage == "parts":
        cache._parts["a"].num_holders = 2
    else:
        cache._entries["a"].num_leases = -1
    with pytest.raises(RuntimeError):
        cache.check_integrity()


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        AdapterCache(-1)


def test_of_many_threads_that_release_one_lease_exactly_one_succeeds() -> None:
    for _ in range(50):
        cache = cache_of("a")
        lease = cache.acquire("a")
        outcomes: list[str] = []
        barrier = threading.Barrier(4)

        def release(lease: Lease = lease, barrier: threading.Barrier = barrier, outcomes: list[str] = outcomes) -> None:
            barrier.wait()
            try:
                lease.release()
            except LeaseError:
                outcomes.append("refused")
            else:
                outcomes.append("released")

        in_threads(release, 4)
        assert sorted(outcomes) == ["refused"] * 3 + ["released"]
        assert cache.num_leases == 0


@pytest.mark.parametrize("source", [None, Source()])
def test_the_ledger_holds_under_threads_that_put_lease_borrow_and_remove(source: Source | None) -> None:
    cache = AdapterCache(2 * NBYTES, source)
    served = [0] * 4

    def churn(thread: int) -> None:
        for step in range(400):
            digest = "abc"[(step + thread) % 3]
            try:
                cache.put(adapter(digest))
                with cache.acquire(digest), cache.borrow(digest) as borrowed:
                    assert borrowed.spec.digest == digest
                    served[thread] += 1
                cache.remove(digest)
            except (CapacityError, UnknownAdapterError, LeaseError):
                continue

    threads = [threading.Thread(target=churn, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        cache.check_integrity()
        threads[0].join(0.002)
    assert all(served)
    assert cache.num_leases == 0
    cache.check_integrity()


def in_threads(target: object, num_threads: int) -> None:
    threads = [threading.Thread(target=target) for _ in range(num_threads)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
