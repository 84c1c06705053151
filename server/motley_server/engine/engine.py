"""The asyncio front of the engine, through which the server talks to it.

What is asked goes to the engine's thread through its mailbox; what a step made comes back in one call on the event
loop, which only ever awaits. Nothing else is shared but a heartbeat, the last step's figures and which adapters are on
the device. Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable

from motley_adapters.cache import AdapterCache
from motley_bases.base import Base

from motley_server.engine.api import DrainReport, EngineStats
from motley_server.engine.core import EngineCore
from motley_server.engine.event_stream import RequestEventStream
from motley_server.engine.observer import EngineObserver
from motley_server.engine.places import Places
from motley_server.engine.settings import EngineSettings
from motley_server.engine.thread import Cancel, EngineThread, Forget, Keep, MakeCore, Stop, Submit, Unkeep, stopped
from motley_server.engine.types import GenerateRequest, KeepOutcome, RequestEvent
from motley_server.errors import CancelledRequestError, MotleyError, UnavailableError

log = logging.getLogger(__name__)
CANCEL_SECONDS = 5.0  # a step and the cancellations after it
STOP_SECONDS = 5.0


def _draining() -> UnavailableError:
    return UnavailableError("the server is draining", reason="DRAINING", retry_after_seconds=5.0)


class Engine:
    """The asyncio front of an engine thread (see `api.EngineFront` for what each method promises)."""

    def __init__(self, make_core: MakeCore, settings: EngineSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, RequestEventStream] = {}
        self._tenant_of: dict[str, str] = {}  # of those who have a stream
        self._places = Places(settings.max_running + settings.max_waiting)
        self._is_draining = False
        self._is_empty = asyncio.Event()
        self._ended = asyncio.Event()
        self._tickets = itertools.count()
        self._keepers: dict[int, asyncio.Future[MotleyError | None]] = {}  # by ticket
        self._thread = EngineThread(make_core, self._deliver_soon, self._deliver_kept_soon, self._note_stopped_soon)

    def start(self) -> None:
        """Start the thread and wait until the engine is warm."""
        self._thread.start()
        self._thread.is_ready.wait()
        if self._thread.failure is not None:
            raise self._thread.failure

    @property
    def core(self) -> EngineCore:
        """Return the engine itself; only its thread may call it while that runs."""
        assert self._thread.core is not None, "the engine was not started"
        return self._thread.core

    @property
    def is_draining(self) -> bool:
        """Tell whether new requests are refused."""
        return self._is_draining

    def submit(self, request: GenerateRequest, on_end: Callable[[int], None]) -> RequestEventStream:
        """Put a request in the mailbox and return its events."""
        self._check_open()
        self._places.take(request.tenant_id)
        bound = self._settings.reader_queue_events
        stream = RequestEventStream(request.request_id, on_end, bound, cancel=self._cancel_for_reader)
        self._streams[request.request_id] = stream
        self._tenant_of[request.request_id] = request.tenant_id
        self._thread.mailbox.put(Submit(request, time.monotonic()))
        return stream

    def cancel(self, request_id: str, error: MotleyError) -> None:
        """End a request with an error; nothing if it has ended."""
        self._thread.mailbox.put(Cancel(request_id, error))

    async def keep(self, digest: str) -> None:
        """Bring an adapter onto the device to stay, and return once it is there."""
        self._check_open()
        ticket = next(self._tickets)
        outcome = self._keepers[ticket] = self._loop.create_future()
        self._thread.mailbox.put(Keep(ticket, digest))
        try:
            error = await outcome
        finally:
            self._keepers.pop(ticket, None)
        if error is not None:
            raise error

    def unkeep(self, digest: str) -> None:
        """Let an adapter leave the device again when its room is needed."""
        self._thread.mailbox.put(Unkeep(digest))

    def forget(self, digest: str) -> None:
        """Let go of what is remembered of an adapter that nobody asks for any more."""
        self._thread.mailbox.put(Forget(digest))

    def is_on_device(self, digest: str) -> bool:
        """Tell whether an adapter's own units are on the device just now."""
        return self.core.residency.is_resident(digest)

    def stats(self) -> EngineStats:
        """Return the state as of the last step."""
        core = self.core
        running = {sequence.request.request_id for sequence in tuple(core.scheduler.running)}
        return EngineStats(
            num_running=len(running),
            num_waiting=max(0, len(self._streams) - len(running)),
            num_used_blocks=core.pool.num_used,
            num_total_blocks=core.pool.num_blocks,
            block_size=core.pool.block_size,
            kv_bytes_per_block=core.runner.bytes_per_block,
            num_waiting_for_adapters=core.scheduler.num_waiting_for_adapters,
            num_resident_parts=core.residency.num_resident_parts,
            num_used_arena_bytes=core.residency.arena.num_used_bytes,
            num_arena_bytes=core.residency.arena.num_bytes,
        )

    def heartbeat_age_seconds(self) -> float:
        """Return how long ago the engine's loop last came round."""
        return time.monotonic() - self._thread.heartbeat

    @property
    def has_ended(self) -> bool:
        """Tell whether the engine thread is gone."""
        return not self._thread.is_alive()

    async def wait_ended(self) -> None:
        """Wait until the engine thread is gone, asked to or not."""
        await self._ended.wait()

    async def drain(self, timeout_seconds: float) -> DrainReport:
        """Refuse new requests, wait for the present ones, cancel what is left after the timeout."""
        self._is_draining = True
        present = len(self._streams)
        await self._wait_empty(timeout_seconds)
        left = list(self._streams)
        for request_id in left:
            self.cancel(request_id, _draining())
        await self._wait_empty(CANCEL_SECONDS)
        # An engine that does not even cancel is stuck; its callers shall not be.
        self._deliver([RequestEvent(request_id, error=_draining()) for request_id in self._streams])
        return DrainReport(present - len(left), len(left))

    def hurry(self) -> None:
        """End the patience of a drain: what still runs is cancelled now."""
        self._is_empty.set()

    async def stop(self) -> None:
        """End the engine thread; one that is stuck is left behind."""
        self._is_draining = True
        self._thread.mailbox.put(Stop())
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)
        if not self.has_ended:
            log.critical("the engine thread is stuck; it is left behind")
            self._note_stopped()

    async def _wait_empty(self, timeout_seconds: float) -> None:
        if not self._streams:
            return
        self._is_empty.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._is_empty.wait()

    def _check_open(self) -> None:
        if self._ended.is_set():
            raise stopped()
        if self._is_draining:
            raise _draining()

    def _cancel_for_reader(self, request_id: str) -> None:
        self.cancel(request_id, CancelledRequestError("the caller cancelled the request", reason="CANCELLED"))

    def _deliver_soon(self, events: list[RequestEvent]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver_kept_soon(self, outcomes: list[KeepOutcome]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver_kept, outcomes)

    def _note_stopped_soon(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._note_stopped)

    def _note_stopped(self) -> None:
        self._ended.set()
        self._deliver([RequestEvent(request_id, error=stopped()) for request_id in self._streams])
        self._deliver_kept([KeepOutcome(ticket, stopped()) for ticket in self._keepers])

    def _deliver(self, events: list[RequestEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:  # failed by a drain that could not wait for a stuck engine
                continue
            if event.is_last:
                del self._streams[event.request_id]
                self._places.give_back(self._tenant_of.pop(event.request_id))
            stream.push(event)
        if not self._streams:
            self._is_empty.set()

    def _deliver_kept(self, outcomes: list[KeepOutcome]) -> None:
        for outcome in outcomes:
            keeper = self._keepers.get(outcome.ticket)
            if keeper is not None and not keeper.done():  # else its caller has left
                keeper.set_result(outcome.error)


def start_engine(base: Base, adapters: AdapterCache, settings: EngineSettings, observer: EngineObserver) -> Engine:
    """Start an engine on the running event loop and return its front once it is warm.

    Raises: ValueError if `settings` leave no room for a single block; whatever building or warming up raised.
    """
    engine = Engine(lambda wake: EngineCore(base, adapters, settings, observer, wake), settings)
    engine.start()
    return engine
