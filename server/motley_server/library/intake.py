"""Intake: from an adapter's files to facts that requests can be admitted by, all of it checked, on a thread of its own.

What a version computes was checked before it had a number; this is where that happens, and where a version that the
server has not met since it started is read for the first time. One reading at a time, single-threaded, so that a
forward pass keeps its cores. It knows bundles and digests, not names or tenants. Called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from motley_adapters.cache import AdapterCache, Lease
from motley_adapters.directories import AdapterDirectories
from motley_adapters.errors import AdapterFormatError, AdapterLoadError, LeaseError
from motley_adapters.reader import Inspection
from motley_adapters.spec import UNDECLARED, AdapterSpec

from motley_server.errors import FailedPreconditionError
from motley_server.library.files import find_files
from motley_server.registry.bundles import BundleStore
from motley_server.registry.records import AdapterVersion

T = TypeVar("T")


class AdapterIntake:
    """Check adapters, and make them known to the cache."""

    def __init__(
        self, source: AdapterDirectories, cache: AdapterCache, store: BundleStore, *, demands_base: bool
    ) -> None:
        """Make an intake; with `demands_base` an adapter that declares no base is refused."""
        self._source = source
        self._cache = cache
        self._store = store
        self._demands_base = demands_base
        self._introduced: dict[str, Path] = {}  # by bundle, where it was read
        num_threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "motley-intake", initializer=_be_single_threaded)
        self._thread.submit(torch.get_num_threads).result()
        # The thread made itself single-threaded, and with that the threads yet to come, which it must not.
        torch.set_num_threads(num_threads)

    def close(self) -> None:
        """End the thread once it has done what it is at."""
        self._thread.shutdown(cancel_futures=True)

    async def inspect(self, directory: Path) -> Inspection:
        """Check a directory of files that may be anything.

        Raises: AdapterFormatError, AdapterMismatchError; FailedPreconditionError (reason=BASE_UNDECLARED).
        """
        inspection = await self._run(lambda: self._source.inspect(directory))
        self.check_declared(inspection.spec)
        return inspection

    def check_declared(self, spec: AdapterSpec) -> None:
        """Refuse an adapter that declares no base where one is demanded.

        Raises: FailedPreconditionError (reason=BASE_UNDECLARED).
        """
        if self._demands_base and spec.trained_on == UNDECLARED:
            message = "the adapter does not declare the base that it was trained on, and this server demands it"
            raise FailedPreconditionError(message, reason="BASE_UNDECLARED", field="motley_manifest.trained_on")

    def accept(self, version: AdapterVersion, inspection: Inspection) -> None:
        """Take note of a version that was inspected and has its bundle now."""
        directory = self._store.directory(version.bundle)
        self._source.remember(version.digest, directory)
        self._cache.introduce(inspection.spec, inspection.outline)
        self._introduced[version.bundle] = directory

    async def introduce(self, version: AdapterVersion) -> AdapterSpec:
        """Return the facts of a version, read now if this server has not met it; whoever calls holds it.

        Raises: FailedPreconditionError (reason=ADAPTER_FILES_MISSING or BASE_UNDECLARED); AdapterMismatchError for one
        that was published for another base; AdapterLoadError.
        """
        if version.bundle not in self._introduced:
            directory = find_files(self._store, version)
            self._source.remember(version.digest, directory)
            if version.digest not in self._cache:
                await self._run(lambda: self._read(version.digest, directory))
            self._introduced[version.bundle] = directory
        spec = self._cache.spec(version.digest)
        self.check_declared(spec)
        return spec

    def lease(self, digest: str) -> Lease:
        """Lease what `introduce` has read."""
        return self._cache.acquire(digest)

    def forget(self, bundle: str) -> frozenset[str]:
        """Forget what was read from a bundle that is gone, and return the adapters that nothing is left of."""
        directory = self._introduced.pop(bundle, None)
        forgotten = set()
        for digest in () if directory is None else self._source.forget(directory):
            if digest in self._cache:
                try:
                    self._cache.remove(digest)
                except LeaseError:  # met again under another bundle at this very moment
                    continue
                forgotten.add(digest)
        return frozenset(forgotten)

    def _read(self, digest: str, directory: Path) -> None:
        if digest in self._cache:  # another request's reading came first
            return
        try:
            adapter = self._source.read(directory)
        except AdapterFormatError as error:  # it was sound when it was published
            raise AdapterLoadError(error.message, reason="ADAPTER_UNREADABLE", field=error.field) from error
        if adapter.spec.digest != digest:
            message = f"what was {digest} holds {adapter.spec.digest} now"
            raise AdapterLoadError(message, reason="ADAPTER_CHANGED")
        self._cache.put(adapter)

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _be_single_threaded() -> None:
    # A second OpenMP pool would fight the engine's. A thread takes over the process's number at its first use: now.
    torch.set_num_threads(1)
    torch.get_num_threads()
