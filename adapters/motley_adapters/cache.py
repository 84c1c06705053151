"""Adapters in host memory: by digest, within a budget of bytes, under leases.

It owns the ledger: what is held, how many bytes that is, who still reads it. It knows no names and no tenants (a digest
is all), and evicts nothing by itself. Every method may be called from any thread: the RPC loop acquires and releases,
the engine's thread reads through the lease.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType

from motley_adapters.errors import CapacityError, LeaseError, UnknownAdapterError
from motley_adapters.spec import Adapter


@dataclass(slots=True)
class _Entry:
    adapter: Adapter
    num_leases: int = 0


class Lease:
    """Promise that an adapter stays, until `release`.

    Semantics: released exactly once, by hand or as a context manager; made by `AdapterCache.acquire` alone.
    """

    def __init__(self, cache: AdapterCache, adapter: Adapter) -> None:
        self._cache = cache
        self._adapter: Adapter | None = adapter
        self.digest = adapter.spec.digest

    @property
    def adapter(self) -> Adapter:
        """Return the leased adapter.

        Raises: LeaseError with reason LEASE_RELEASED after the release.
        """
        adapter = self._adapter
        if adapter is None:
            raise LeaseError(f"the lease of {self.digest} was released", reason="LEASE_RELEASED")
        return adapter

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
    """Hold adapters by digest within a budget of bytes."""

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes")
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._nbytes = 0

    def put(self, adapter: Adapter) -> None:
        """Hold an adapter; one whose digest is held already changes nothing.

        Raises: CapacityError with reason ADAPTER_BYTES_EXHAUSTED if it does not fit beside what is held.
        """
        digest, nbytes = adapter.spec.digest, adapter.spec.nbytes
        with self._lock:
            if digest in self._entries:
                return
            if self._nbytes + nbytes > self.budget_bytes:
                message = f"the adapter takes {nbytes} bytes; {self._nbytes} of {self.budget_bytes} bytes are taken"
                raise CapacityError(message, reason="ADAPTER_BYTES_EXHAUSTED")
            self._entries[digest] = _Entry(adapter)
            self._nbytes += nbytes

    def acquire(self, digest: str) -> Lease:
        """Lease a held adapter.

        Raises: UnknownAdapterError with reason ADAPTER_NOT_HELD.
        """
        with self._lock:
            entry = self._entry(digest)
            entry.num_leases += 1
            return Lease(self, entry.adapter)

    def remove(self, digest: str) -> None:
        """Let go of an adapter that nobody leases.

        Effects: its bytes are free when this returns, except where a model still has its units bound to its Linears.
        Raises: UnknownAdapterError with reason ADAPTER_NOT_HELD; LeaseError with reason ADAPTER_LEASED.
        """
        with self._lock:
            entry = self._entry(digest)
            if entry.num_leases:
                raise LeaseError(f"{digest} has {entry.num_leases} leases", reason="ADAPTER_LEASED")
            del self._entries[digest]
            self._nbytes -= entry.adapter.spec.nbytes

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
            held = sum(unit.nbytes for entry in self._entries.values() for unit in entry.adapter.units.values())
            if held != self._nbytes or held > self.budget_bytes:
                raise RuntimeError(f"{held} bytes are held, the ledger says {self._nbytes} of {self.budget_bytes}")
            for digest, entry in self._entries.items():
                if entry.num_leases < 0 or entry.adapter.spec.digest != digest:
                    raise RuntimeError(f"the entry of {digest} has {entry.num_leases} leases and another's adapter")

    def _entry(self, digest: str) -> _Entry:
        entry = self._entries.get(digest)
        if entry is None:
            raise UnknownAdapterError(f"no adapter {digest} is held", reason="ADAPTER_NOT_HELD")
        return entry

    def _release(self, lease: Lease) -> None:
        with self._lock:
            adapter = lease.adapter  # raises if this is the second time
            lease._adapter = None
            self._entries[adapter.spec.digest].num_leases -= 1
