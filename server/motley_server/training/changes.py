"""Changes: how whoever waits for a job, or for the queue, is woken when this server changes it.

What other servers of the same database change is told to nobody here: whoever waits also looks by itself, every so
often. Nothing is kept of a change that nobody waits for. Runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

QUEUE: Final = ""  # no job's id

LOOK_SECONDS: Final = 1.0


class Change:
    """What one who waits is woken by.

    Semantics: begin to look before you look, so that what changes while you do is not missed.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def begin_to_look(self) -> None:
        """Forget what was told so far: who calls looks for it now."""
        self._event.clear()

    def tell(self) -> None:
        """Wake who waits."""
        self._event.set()

    async def wait(self, seconds: float = LOOK_SECONDS) -> None:
        """Wait to be told of something since `begin_to_look`, or until it is time to look nevertheless."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()


class Changes:
    """Bring together who changes something and who waits for that."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[Change]] = {}
        self.is_closed = False

    @property
    def num_waiting(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._waiting.values()))

    def tell(self, *keys: str) -> None:
        """Wake whoever waits for these jobs, or for the queue."""
        for key in keys:
            for change in self._waiting.get(key, ()):
                change.tell()

    @contextmanager
    def watching(self, key: str) -> Iterator[Change]:
        """Be told of a job, or of the queue, in a block."""
        change = Change()
        self._waiting.setdefault(key, set()).add(change)
        try:
            yield change
        finally:
            self._waiting[key].remove(change)
            if not self._waiting[key]:
                del self._waiting[key]

    def close(self) -> None:
        """Wake everybody: the server is being emptied."""
        self.is_closed = True
        self.tell(*self._waiting)
