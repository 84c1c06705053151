"""The engine as the rest of the server sees it: an asyncio front over a thread that owns the device.

`rpc/` and `admission.py` know this protocol and nothing behind it; tests of theirs put a small fake in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from motley_server.engine.types import GenerateRequest, RequestEvent
from motley_server.errors import MotleyError


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's state as of its last step."""

    num_running: int  # requests
    num_waiting: int  # requests
    num_used_blocks: int
    num_total_blocks: int
    block_size: int
    kv_bytes_per_block: int
    num_waiting_for_adapters: int  # requests, of those that wait
    num_resident_parts: int
    num_used_arena_bytes: int
    num_arena_bytes: int


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How the requests that were there at the start of a drain ended."""

    num_finished: int
    num_cancelled: int


class EventStream(Protocol):
    """The events of one request, in order, ending after the last; `async for` reads it, `aclose` cancels what is not
    finished."""

    def __aiter__(self) -> EventStream:
        """Return itself."""

    async def __anext__(self) -> RequestEvent:
        """Wait for the next event; raise its error if it has one."""

    def take_ready(self) -> list[RequestEvent]:
        """Return the events that are there already, without waiting, so that a stream can send them as one message."""

    async def aclose(self) -> None:
        """Cancel the request unless it has ended; closing twice is harmless."""


class EngineFront(Protocol):
    """Submit requests, read their events, say which adapters stay on the device, ask how the engine is.

    Every method is called on the event loop's thread, but for `stats`, which a scrape of the metrics calls on its own,
    and `is_on_device`.
    """

    def submit(self, request: GenerateRequest, on_end: Callable[[int], None]) -> EventStream:
        """Put a request in the mailbox and return its events, ending after the last.

        Semantics: `on_end` is called exactly once, when the engine will not touch the request's adapters again, whether
        the request finished, failed or was cancelled, and even if the iterator is never read; it is told how many
        tokens were generated, of all candidates together. Leases and places are given back there. Closing the iterator
        (aclose, or the consuming task being cancelled) cancels the request: its blocks are free after the engine's next
        step. A reader that lets more than the configured number of events wait is cancelled: its iterator raises
        ResourceExhaustedError(reason=SLOW_READER).
        Raises: ResourceExhaustedError (reason=QUEUE_FULL, at once), UnavailableError (reason=DRAINING or
        ENGINE_STOPPED, at once). An event with `error` is raised as that error.
        """

    def cancel(self, request_id: str, error: MotleyError) -> None:
        """End a request with an error, which its reader meets after the events that were there before.

        Semantics: does not wait; blocks and pins are free after the engine's next step, and `on_end` is called then. A
        request that is unknown, or has ended, is left as it is.
        """

    async def keep(self, digest: str) -> None:
        """Bring an adapter that the cache knows onto the device, to stay there until `unkeep`; return once it is there.

        Semantics: all its parts are resident then. It waits for room like anybody else, and goes before all who wait
        for adapters if it found none for long; what runs is never sent away for it. Twice is once. A caller that leaves
        (the task is cancelled) leaves it to arrive and stay. What is kept lessens what one request's adapters may take.
        Raises: ResourceExhaustedError (reason=PINS_FULL if all that is kept would take more than half of the device's
        room for adapters, or leaves no hole that is large enough; ADAPTER_TOO_LARGE if it does not even fit alone);
        FailedPreconditionError (reason=ADAPTER_UNREADABLE or ADAPTER_CHANGED if its files do not hold it any more);
        AbortedError (reason=ADAPTER_UNPINNED if `unkeep` came first); InternalError for a digest that the cache does
        not know; UnavailableError (reason=DRAINING or ENGINE_STOPPED). None of these leaves it kept by this call.
        """

    def unkeep(self, digest: str) -> None:
        """Let an adapter leave the device when its room is needed; nothing if it was not kept.

        Semantics: does not wait. Every `keep` of it that has not returned raises AbortedError.
        """

    def forget(self, digest: str) -> None:
        """Let go of what the engine remembers of an adapter that nobody will ask for; nothing while it is kept.

        Semantics: does not wait, and takes nothing from the device: what lies there goes by itself, and then the last
        that was known of it. Forgetting one that is asked for again costs another look at its shapes, nothing else.
        """

    def is_on_device(self, digest: str) -> bool:
        """Tell whether an adapter's own units are on the device just now; any thread may ask, nobody waits."""

    @property
    def is_draining(self) -> bool:
        """Tell whether new requests are refused."""

    def stats(self) -> EngineStats:
        """Return the state as of the last step, without waiting for the engine."""

    def heartbeat_age_seconds(self) -> float:
        """Return how long ago the engine's loop last came round; it does so several times a second even when idle."""

    @property
    def has_ended(self) -> bool:
        """Tell whether the engine is gone."""

    async def wait_ended(self) -> None:
        """Wait until the engine is gone, because it was stopped or because it died."""

    async def drain(self, timeout_seconds: float) -> DrainReport:
        """Refuse new requests, wait for the present ones, cancel what is left after the timeout.

        Semantics: what is cancelled ends with UnavailableError(reason=DRAINING); a stuck engine is not waited for.
        """

    def hurry(self) -> None:
        """End the patience of a drain: what still runs is cancelled now."""

    async def stop(self) -> None:
        """End the engine thread; whatever still runs fails with UnavailableError."""
