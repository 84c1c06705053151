"""Holds: who uses which version of an adapter just now, and how a version is emptied before it is deleted.

A request holds the versions that it runs under from the moment in which their names were resolved to its end; a
download holds what it sends. A version that is being deleted is held by nobody new. It knows no files, no SQL and no
engine. Runs on the event loop's thread, and only `emptied` waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from motley_server.errors import AbortedError, DeadlineExceededError, MotleyError
from motley_server.registry.records import AdapterVersion

VersionKey = tuple[str, str, int]  # owner, name, version
Revoke = Callable[[MotleyError], None]
Check = Callable[[], Awaitable[object]]

LOOK_AGAIN_SECONDS = 1.0  # an alias that was pointed here ends the waiting, and who came late is revoked, within this
MAX_REVOCATIONS = 30


def key_of(version: AdapterVersion) -> VersionKey:
    """Return what a version is known by; it never means another one."""
    return version.owner, version.name, version.version


class Hold:
    """Promise that a version stays, until `release`; made by `Holds.hold` alone.

    Semantics: whoever holds may set `on_revoked`, which is called when the version's deletion does not wait any longer.
    """

    def __init__(self, holds: Holds, version: AdapterVersion) -> None:
        self.version = version
        self.on_revoked: Revoke | None = None
        self._holds = holds

    def release(self) -> None:
        """Give the version back; a second time is a KeyError."""
        self._holds._release(self)


class Holds:
    """Keep count of the versions in use."""

    def __init__(self) -> None:
        self._held: defaultdict[VersionKey, set[Hold]] = defaultdict(set)
        self._deleting: set[VersionKey] = set()
        self._emptied: dict[VersionKey, asyncio.Event] = {}  # of those that somebody waits for

    def hold(self, version: AdapterVersion) -> Hold | None:
        """Hold a version; None while it is being deleted."""
        key = key_of(version)
        if key in self._deleting:
            return None
        hold = Hold(self, version)
        self._held[key].add(hold)
        return hold

    def is_deleting(self, key: VersionKey) -> bool:
        """Tell whether nobody may hold a version any more."""
        return key in self._deleting

    def bundles(self) -> set[str]:
        """Return the bundles that somebody may be reading."""
        return {hold.version.bundle for holds in self._held.values() for hold in holds}

    @asynccontextmanager
    async def emptied(
        self, version: AdapterVersion, timeout_seconds: float, check: Check, *, force: bool
    ) -> AsyncIterator[None]:
        """Run a block once nobody holds a version, while nobody may take hold of it.

        Semantics: with `force`, those who hold it after the timeout are revoked, and their end is waited for. `check`
        is awaited now and then, and before anybody is revoked: what it raises ends the waiting.
        Raises: AbortedError (reason=VERSION_BEING_DELETED) if somebody else is at it; DeadlineExceededError
        (reason=VERSION_HELD).
        """
        key = key_of(version)
        if key in self._deleting:
            message = f"version {version.version} of adapter {version.name!r} is being deleted by another call"
            raise AbortedError(message, reason="VERSION_BEING_DELETED", field="version")
        self._deleting.add(key)
        try:
            if not await self._wait_checking(key, timeout_seconds, check):
                if not force:
                    raise _held(version, len(self._held[key]))
                await check()
                if not await self._revoke(key):
                    raise _held(version, len(self._held[key]))
            yield
        finally:
            self._deleting.discard(key)

    async def _wait_checking(self, key: VersionKey, timeout_seconds: float, check: Check) -> bool:
        until = time.monotonic() + timeout_seconds
        while not await self._wait_empty(key, min(LOOK_AGAIN_SECONDS, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                return False
            await check()
        return True

    async def _revoke(self, key: VersionKey) -> bool:
        message = "an adapter of this call was deleted, and its deletion did not wait for the end"
        error = AbortedError(message, reason="ADAPTER_DELETED", field="adapters")
        for _ in range(MAX_REVOCATIONS):
            for hold in tuple(self._held.get(key, ())):
                if hold.on_revoked is not None:
                    hold.on_revoked(error)
            if await self._wait_empty(key, LOOK_AGAIN_SECONDS):
                return True
        return False

    async def _wait_empty(self, key: VersionKey, timeout_seconds: float) -> bool:
        """Return whether nobody holds a version, now or within some time."""
        if key in self._held:
            emptied = self._emptied[key] = asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await emptied.wait()
            del self._emptied[key]
        return key not in self._held

    def _release(self, hold: Hold) -> None:
        key = key_of(hold.version)
        self._held[key].remove(hold)
        if self._held[key]:
            return
        del self._held[key]
        if key in self._emptied:
            self._emptied[key].set()


def _held(version: AdapterVersion, num_holds: int) -> DeadlineExceededError:
    message = f"{num_holds} calls still hold version {version.version} of adapter {version.name!r}; it stays"
    return DeadlineExceededError(message, reason="VERSION_HELD", field="timeout")
