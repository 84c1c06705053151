"""Adapters in host memory: known by digest under leases, held within a budget of bytes, brought back when asked for.

Two things are kept apart. That an adapter is *known* is what a lease protects; that it is *in memory* is an attribute
that comes and goes: what is evicted is read again from its source by itself. It knows no names and no tenants. Every
method may be called from any thread: the RPC loop acquires and releases, the loader's thread borrows; only `borrow` may
take long, and none of that under the lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from motley_adapters.errors import AdapterLoadError, CapacityError, LeaseError, UnknownAdapterError
from motley_adapters.eviction import EvictionOrder
from motley_adapters.outline import Outline, outline_of
from motley_adapters.spec import Adapter, AdapterSpec, Part


class AdapterSource(Protocol):
    """Where adapters come back from."""

    def load(self, digest: str) -> Adapter:
        """Read an adapter again; any thread but the event loop's and the engine's.

        Raises: AdapterError for what cannot be read.
        """


@dataclass(slots=True)
class _Entry:
    spec: AdapterSpec
    outline: Outline
    adapter: Adapter | None = None
    num_leases: int = 0
    num_borrowers: int = 0


@dataclass(slots=True)
class _HeldPart:
    part: Part
    num_holders: int = 0


class Lease:
    """Promise that an adapter stays known, until `release`.

    Semantics: released exactly once, by hand or as a context manager; made by `AdapterCache.acquire` alone.
    """

    def __init__(self, cache: AdapterCache, spec: AdapterSpec) -> None:
        self.spec = spec
        self._cache = cache
        self._is_released = False

    @property
    def digest(self) -> str:
        """Return what is leased."""
        return self.spec.digest

    def release(self) -> None:
        """Give the adapter back.

        Raises: LeaseError with reason LEASE_RELEASED if it was given back before, and then changes nothing.
        """
        self._cache._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class AdapterCache:
    """Know adapters by digest, and hold of them what a budget of bytes allows.

    Semantics: parts that several adapters share are held and counted once. Without a source nothing could come back, so
    nothing is evicted, and what does not fit is refused.
    """

    def __init__(self, budget_bytes: int, source: AdapterSource | None = None) -> None:
        if budget_bytes < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes")
        self.budget_bytes = budget_bytes
        self._source = source
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._parts: dict[str, _HeldPart] = {}
        self._order = EvictionOrder()
        self._nbytes = 0

    def put(self, adapter: Adapter) -> None:
        """Make an adapter known, and hold it as far as the budget allows; one that is held already changes nothing.

        Raises: CapacityError with reason ADAPTER_BYTES_EXHAUSTED if it does not fit and could not come back.
        """
        outline = outline_of(adapter.parts)
        with self._lock:
            entry = self._introduce(adapter.spec, outline)
            self._hold(entry, adapter)
            if entry.adapter is None and self._source is None:
                del self._entries[adapter.spec.digest]
                lacking = sum(part.nbytes for part in self._parts_to_add(adapter))
                message = f"the adapter takes {lacking} bytes; {self._nbytes} of {self.budget_bytes} bytes are taken"
                raise CapacityError(message, reason="ADAPTER_BYTES_EXHAUSTED")

    def introduce(self, spec: AdapterSpec, outline: Outline) -> None:
        """Make an adapter known without holding it; one that is known already changes nothing.

        Raises: ValueError without a source, which alone could bring it.
        """
        if self._source is None:
            raise ValueError(f"{spec.digest} is introduced to a cache without a source")
        with self._lock:
            self._introduce(spec, outline)

    def acquire(self, digest: str) -> Lease:
        """Lease a known adapter.

        Raises: UnknownAdapterError with reason ADAPTER_NOT_HELD.
        """
        with self._lock:
            entry = self._entry(digest)
            entry.num_leases += 1
            return Lease(self, entry.spec)

    def spec(self, digest: str) -> AdapterSpec:
        """Return the facts of a known adapter.

        Raises: UnknownAdapterError with reason ADAPTER_NOT_HELD.
        """
        with self._lock:
            return self._entry(digest).spec

    def outline(self, digest: str) -> Outline:
        """Return the shapes of a known adapter's parts, in memory or not, without reading anything.

        Raises: UnknownAdapterError with reason ADAPTER_NOT_HELD.
        """
        with self._lock:
            return self._entry(digest).outline

    @contextmanager
    def borrow(self, digest: str) -> Iterator[Adapter]:
        """Give a known adapter in memory, read again if it had to leave; it stays while it is borrowed.

        Effects: what was read stays held if it fits beside what others borrow, and goes with the borrower if not.
        Raises: UnknownAdapterError with reason ADAPTER_NOT_HELD; AdapterLoadError with reason ADAPTER_CHANGED if its
        files hold another adapter now, ADAPTER_UNREADABLE if they hold none.
        """
        with self._lock:
            entry = self._entry(digest)
            entry.num_borrowers += 1
            adapter = entry.adapter
            if adapter is not None:
                self._order.use(digest, adapter.spec.nbytes)
        try:
            if adapter is None:
                adapter = self._read(digest)
                with self._lock:
                    self._hold(entry, adapter)
                    adapter = entry.adapter or adapter
            yield adapter
        finally:
            with self._lock:
                entry.num_borrowers -= 1

    def remove(self, digest: str) -> None:
        """Forget an adapter that nobody leases.

        Effects: its bytes in host memory are free when this returns; what a device still holds of it goes by itself.
        Raises: UnknownAdapterError with reason ADAPTER_NOT_HELD; LeaseError with reason ADAPTER_LEASED.
        """
        with self._lock:
            entry = self._entry(digest)
            if entry.num_leases or entry.num_borrowers:
                holders = entry.num_leases + entry.num_borrowers
                raise LeaseError(f"{digest} has {holders} leases", reason="ADAPTER_LEASED")
            self._drop(entry)
            self._order.forget(digest)
            del self._entries[digest]

    def is_in_memory(self, digest: str) -> bool:
        """Tell whether an adapter is in host memory just now; one that is not known is not."""
        with self._lock:
            entry = self._entries.get(digest)
            return entry is not None and entry.adapter is not None

    def in_memory(self) -> list[Adapter]:
        """Return the adapters that are in host memory just now."""
        with self._lock:
            return [entry.adapter for entry in self._entries.values() if entry.adapter is not None]

    @property
    def nbytes(self) -> int:
        """Return the bytes that are held."""
        return self._nbytes

    @property
    def num_leases(self) -> int:
        """Return how many leases were not released yet."""
        with self._lock:
            return sum(entry.num_leases for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def check_integrity(self) -> None:
        """Recount the ledger.

        Raises: RuntimeError if it disagrees with what is held: a fault of this code.
        """
        with self._lock:
            holders: dict[str, int] = {}
            for digest, entry in self._entries.items():
                if min(entry.num_leases, entry.num_borrowers) < 0 or entry.spec.digest != digest:
                    raise RuntimeError(f"the entry of {digest} has {entry.num_leases} leases and another's facts")
                for part in entry.adapter.parts if entry.adapter is not None else ():
                    holders[part.digest] = holders.get(part.digest, 0) + 1
            if holders != {digest: held.num_holders for digest, held in self._parts.items()}:
                raise RuntimeError("parts are held for adapters that do not hold them")
            nbytes = sum(held.part.nbytes for held in self._parts.values())
            if nbytes != self._nbytes or nbytes > self.budget_bytes:
                raise RuntimeError(f"{nbytes} bytes are held, the ledger says {self._nbytes} of {self.budget_bytes}")

    def _introduce(self, spec: AdapterSpec, outline: Outline) -> _Entry:
        return self._entries.setdefault(spec.digest, _Entry(spec, outline))

    def _read(self, digest: str) -> Adapter:
        if self._source is None:
            raise AdapterLoadError(f"{digest} cannot be read again: it has no source", reason="ADAPTER_UNREADABLE")
        adapter = self._source.load(digest)
        if adapter.spec.digest != digest:
            message = f"what was {digest} holds {adapter.spec.digest} now"
            raise AdapterLoadError(message, reason="ADAPTER_CHANGED")
        return adapter

    def _hold(self, entry: _Entry, adapter: Adapter) -> None:
        """Keep an adapter if room can be made; under the lock."""
        if entry.adapter is not None:
            return
        while (missing := sum(part.nbytes for part in self._parts_to_add(adapter))) > self.budget_bytes - self._nbytes:
            idle = (d for d, e in self._entries.items() if e.adapter is not None and not e.num_borrowers)
            victim = self._order.cheapest(idle) if self._source is not None and missing <= self.budget_bytes else None
            if victim is None:
                return
            self._drop(self._entries[victim])
            self._order.give_up(victim)
        shared = []
        for part in adapter.parts:
            held = self._parts.setdefault(part.digest, _HeldPart(part))
            if held.num_holders == 0:
                self._nbytes += part.nbytes
            held.num_holders += 1
            shared.append(held.part)
        entry.adapter = Adapter(adapter.spec, adapter.units, tuple(shared[1:])) if adapter.shared else adapter
        self._order.use(adapter.spec.digest, adapter.spec.nbytes)

    def _parts_to_add(self, adapter: Adapter) -> list[Part]:
        return [part for part in adapter.parts if part.digest not in self._parts]

    def _drop(self, entry: _Entry) -> None:
        for part in entry.adapter.parts if entry.adapter is not None else ():
            held = self._parts[part.digest]
            held.num_holders -= 1
            if held.num_holders == 0:
                self._nbytes -= held.part.nbytes
                del self._parts[part.digest]
        entry.adapter = None

    def _entry(self, digest: str) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            raise UnknownAdapterError(f"no adapter {digest} is held", reason="ADAPTER_NOT_HELD")
        return entry

    def _release(self, lease: Lease) -> None:
        with self._lock:
            if lease._is_released:
                raise LeaseError(f"the lease of {lease.digest} was released", reason="LEASE_RELEASED")
            lease._is_released = True
            self._entries[lease.digest].num_leases -= 1
