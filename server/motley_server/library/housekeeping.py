"""Housekeeping: on a timer, what nobody wants any more goes: expired uploads, bundles of deleted versions.

It brings together who knows what is wanted (the registry), what is in use just now (holds and uploads) and who
remembers what was read (the intake, the engine). Runs on the event loop's thread; the work itself on the database's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from motley_server.errors import MotleyError
from motley_server.library.holds import Holds
from motley_server.library.observer import LibraryObserver
from motley_server.library.publishing import AdapterRegistry
from motley_server.library.uploads import UploadDesk
from motley_server.registry.collection import Collector

if TYPE_CHECKING:  # torch comes with it
    from motley_server.library.intake import AdapterIntake

log = logging.getLogger(__name__)

SOON_SECONDS = 1.0  # between two collections after a deletion
ROUNDS_AFTER_DELETION = 2  # a bundle goes in the second that finds it unwanted


class Housekeeping:
    """Collect what is unwanted, again and again."""

    def __init__(
        self,
        registry: AdapterRegistry,
        collector: Collector,
        holds: Holds,
        desk: UploadDesk,
        intake: AdapterIntake,
        forget: Callable[[str], None],
        observer: LibraryObserver,
    ) -> None:
        """Make a housekeeper; `forget` is told the digest of every adapter that nothing is left of."""
        self._run = registry.database.run
        self._store = registry.store
        self._collector = collector
        self._holds = holds
        self._desk = desk
        self._intake = intake
        self._forget = forget
        self._observer = observer
        self._task: asyncio.Task[None] | None = None
        self._deleted = asyncio.Event()

    def start(self, period_seconds: float) -> None:
        """Collect every so often."""
        self._task = asyncio.get_running_loop().create_task(self._repeat(period_seconds))

    async def stop(self) -> None:
        """Collect no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def hurry(self) -> None:
        """Collect soon: something was deleted, and its bytes count against nobody any more."""
        self._deleted.set()

    async def collect(self) -> int:
        """Collect once, and return the bytes that came free on disk."""
        collected = await self._run(self._collector.collect, frozenset(self._holds.bundles()), self._desk.active)
        for bundle in collected.removed - self._store.bundles():  # one may have come back meanwhile
            for digest in self._intake.forget(bundle):
                self._forget(digest)
        self._observer.bytes_collected(collected.freed_bytes)
        if collected.freed_bytes:
            log.info("collected %d bytes of adapters and uploads that nobody wants", collected.freed_bytes)
        return collected.freed_bytes

    async def _repeat(self, period_seconds: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period_seconds):
                    await self._deleted.wait()
            times = ROUNDS_AFTER_DELETION if self._deleted.is_set() else 1
            self._deleted.clear()
            for _ in range(times):
                await asyncio.sleep(min(period_seconds, SOON_SECONDS) if times > 1 else 0)
                try:
                    await self.collect()
                except (MotleyError, OSError):
                    log.exception("nothing was collected this time")
