"""The one way in which a server stops, whether a signal or a Drain asked for it.

Health turns to NOT_SERVING, the engine refuses what is new and finishes what runs, then whoever waits for the end is
told. Runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from motley_server.engine.api import DrainReport, EngineFront
from motley_server.errors import UnavailableError

log = logging.getLogger(__name__)


RETRY_AFTER_SECONDS = 5.0


def draining() -> UnavailableError:
    """Return the error for whoever comes while the server is being emptied."""
    return UnavailableError("the server is draining", reason="DRAINING", retry_after_seconds=RETRY_AFTER_SECONDS)


class Lifecycle:
    """Drain once, however often it is asked for."""

    def __init__(self, engine: EngineFront, drain_seconds: float, announce: Callable[[], Awaitable[None]]) -> None:
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._announce = announce
        self._task: asyncio.Task[DrainReport] | None = None
        self._has_drained = asyncio.Event()

    @property
    def has_begun(self) -> bool:
        """Tell whether a drain has begun."""
        return self._task is not None

    def begin_drain(self, timeout_seconds: float | None = None) -> asyncio.Task[DrainReport]:
        """Begin to drain, or return the drain that has begun; its own timeout stands."""
        if self._task is None:
            timeout = self._drain_seconds if timeout_seconds is None else timeout_seconds
            self._task = asyncio.get_running_loop().create_task(self._drain(timeout))
        return self._task

    def interrupt(self) -> None:
        """Begin to drain at the first signal, and at a second one wait no longer."""
        if self._task is None:
            self.begin_drain()
        else:
            self._engine.hurry()

    async def drain(self, timeout_seconds: float | None = None) -> DrainReport:
        """Drain and return how the running requests ended; a caller that gives up does not stop it."""
        return await asyncio.shield(self.begin_drain(timeout_seconds))

    async def wait_drained(self) -> None:
        """Wait until somebody has drained the server."""
        await self._has_drained.wait()

    async def _drain(self, timeout_seconds: float) -> DrainReport:
        log.info("draining: running requests have %g s", timeout_seconds)
        try:
            await self._announce()
            report = await self._engine.drain(timeout_seconds)
        finally:
            self._has_drained.set()
        log.info("drained: %d requests finished, %d were cancelled", report.num_finished, report.num_cancelled)
        return report
