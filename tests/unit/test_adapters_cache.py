"""The host cache keeps what is leased, counts every byte, and lets nobody give back twice."""

from __future__ import annotations

import threading

import pytest
import torch
from motley_adapters.cache import AdapterCache, Lease
from motley_adapters.errors import CapacityError, LeaseError, UnknownAdapterError
from motley_adapters.spec import Adapter, AdapterSpec
from motley_kernels.adapter_delta import DeltaUnit


def adapter(digest: str, num_inputs: int = 8) -> Adapter:
    unit = DeltaUnit(torch.zeros(1, num_inputs), torch.zeros(2, 1), 1.0)
    return Adapter(AdapterSpec(digest, "lora", {"x": 1}, {"x": 1.0}, "undeclared", unit.nbytes), {"x": unit})


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
    assert lease.adapter is held
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


@pytest.mark.parametrize("method", ["acquire", "remove"])
def test_an_unknown_digest_is_an_error_that_names_it(method: str) -> None:
    with pytest.raises(UnknownAdapterError, match="sha256:nobody") as caught:
        getattr(cache_of("a"), method)("sha256:nobody")
    assert caught.value.reason == "ADAPTER_NOT_HELD"


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
    assert other.adapter.spec.digest == "a"


def test_a_released_lease_shows_no_adapter() -> None:
    lease = cache_of("a").acquire("a")
    lease.release()
    with pytest.raises(LeaseError):
        _ = lease.adapter


def test_a_lease_is_a_context() -> None:
    cache = cache_of("a")
    with cache.acquire("a") as lease:
        assert (lease.digest, cache.num_leases) == ("a", 1)
    assert cache.num_leases == 0


@pytest.mark.parametrize("damage", ["bytes", "leases"])
def test_the_integrity_check_sees_a_ledger_that_is_wrong(damage: str) -> None:
    cache = cache_of("a")
    if damage == "bytes":
        cache._nbytes += 1
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


def test_the_ledger_holds_under_threads_that_put_lease_and_remove() -> None:
    cache = AdapterCache(2 * NBYTES)
    served = [0] * 4

    def churn(thread: int) -> None:
        for step in range(400):
            digest = "abc"[(step + thread) % 3]
            try:
                cache.put(adapter(digest))
                with cache.acquire(digest) as lease:
                    assert lease.adapter.spec.digest == digest
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
