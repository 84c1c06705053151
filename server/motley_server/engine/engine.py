"""The engine on a thread of its own, and the asyncio front through which the server talks to it.

The thread owns the device, the scheduler and every request in hand. Requests go in through a mailbox of picklable
messages; what a step made comes back in one call on the event loop, which only ever awaits. Nothing else is shared but
a heartbeat and the last step's figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from motley_adapters.cache import AdapterCache
from motley_bases.base import Base

from motley_server.engine.api import DrainReport, EngineStats
from motley_server.engine.core import EngineCore
from motley_server.engine.event_stream import RequestEventStream
from motley_server.engine.observer import EngineObserver
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import GenerateRequest, RequestEvent
from motley_server.errors import CancelledRequestError, MotleyError, ResourceExhaustedError, UnavailableError

log = logging.getLogger(__name__)
IDLE_POLL_SECONDS = 0.25
CANCEL_SECONDS = 5.0  # a step and the cancellations after it
STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Submit:
    """Take a request in hand; it arrived at this time.monotonic."""

    request: GenerateRequest
    arrival: float


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop a request, and tell it why."""

    request_id: str
    error: MotleyError


@dataclass(frozen=True, slots=True)
class Wake:
    """Step again: an adapter has arrived."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Fail what is left and end the thread."""


MakeCore = Callable[[Callable[[], None]], EngineCore]
"""Makes the engine, given what to call, on any thread, when a step that waits has something to do."""

Message = Submit | Cancel | Wake | Stop


class EngineThread(threading.Thread):
    """Step the engine while there is work, wait at the mailbox while there is none, or none that can go on."""

    def __init__(
        self,
        make_core: MakeCore,
        deliver: Callable[[list[RequestEvent]], None],
        on_stopped: Callable[[], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.mailbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.heartbeat = time.monotonic()
        self.is_ready = threading.Event()  # also set when starting failed
        self.failure: BaseException | None = None
        self.core: EngineCore | None = None
        self._make_core = make_core
        self._deliver = deliver
        self._on_stopped = on_stopped

    def run(self) -> None:
        """Build the engine, warm it up, then serve until told to stop."""
        try:
            self.core = self._make_core(self._wake)
            self.core.runner.warm_up()
        except BaseException as failure:
            self.failure = failure
            return
        finally:
            self.is_ready.set()
        try:
            self._serve(self.core)
            self._deliver(self.core.fail_all(_stopped()))
        except Exception:
            log.exception("the engine thread died")
        finally:
            self.core.close()
            self._on_stopped()

    def _wake(self) -> None:
        self.mailbox.put(Wake())

    def _serve(self, core: EngineCore) -> None:
        while True:
            self.heartbeat = time.monotonic()
            messages = self._read_mailbox(wait=not core.has_work or core.is_waiting_for_adapters)
            events = [event for message in messages if (event := _apply(core, message)) is not None]
            if any(isinstance(message, Stop) for message in messages):
                self._deliver(events)
                return
            events += core.expire()
            events += core.step()
            if events:
                self._deliver(events)

    def _read_mailbox(self, *, wait: bool) -> list[Message]:
        messages: list[Message] = []
        try:
            if wait:
                messages.append(self.mailbox.get(timeout=IDLE_POLL_SECONDS))
            while True:
                messages.append(self.mailbox.get_nowait())
        except queue.Empty:
            return messages


def _stopped() -> UnavailableError:
    return UnavailableError("the engine has stopped", reason="ENGINE_STOPPED", retry_after_seconds=5.0)


def _draining() -> UnavailableError:
    return UnavailableError("the server is draining", reason="DRAINING", retry_after_seconds=5.0)


def _apply(core: EngineCore, message: Message) -> RequestEvent | None:
    match message:
        case Submit(request, arrival):
            return core.add(request, arrival)
        case Cancel(request_id, error):
            return core.cancel(request_id, error)
        case Wake() | Stop():
            return None


class Engine:
    """The asyncio front of an engine thread (see `api.EngineFront` for what each method promises)."""

    def __init__(self, make_core: MakeCore, settings: EngineSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, RequestEventStream] = {}
        self._is_draining = False
        self._is_empty = asyncio.Event()
        self._ended = asyncio.Event()
        self._thread = EngineThread(make_core, self._deliver_soon, self._note_stopped_soon)

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
        stream = RequestEventStream(request.request_id, on_end, self._settings.reader_queue_events, cancel=self._cancel)
        self._streams[request.request_id] = stream
        self._thread.mailbox.put(Submit(request, time.monotonic()))
        return stream

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
            self._thread.mailbox.put(Cancel(request_id, _draining()))
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
            raise _stopped()
        if self._is_draining:
            raise _draining()
        bound = self._settings.max_running + self._settings.max_waiting
        if len(self._streams) >= bound:
            message = f"{bound} requests are running or waiting already"
            raise ResourceExhaustedError(message, reason="QUEUE_FULL", retry_after_seconds=1.0)

    def _cancel(self, request_id: str) -> None:
        error = CancelledRequestError("the caller cancelled the request", reason="CANCELLED")
        self._thread.mailbox.put(Cancel(request_id, error))

    def _deliver_soon(self, events: list[RequestEvent]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _note_stopped_soon(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._note_stopped)

    def _note_stopped(self) -> None:
        self._ended.set()
        self._deliver([RequestEvent(request_id, error=_stopped()) for request_id in self._streams])

    def _deliver(self, events: list[RequestEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:  # failed by a drain that could not wait for a stuck engine
                continue
            if event.is_last:
                del self._streams[event.request_id]
            stream.push(event)
        if not self._streams:
            self._is_empty.set()


def start_engine(base: Base, adapters: AdapterCache, settings: EngineSettings, observer: EngineObserver) -> Engine:
    """Start an engine on the running event loop and return its front once it is warm.

    Raises: ValueError if `settings` leave no room for a single block; whatever building or warming up raised.
    """
    engine = Engine(lambda wake: EngineCore(base, adapters, settings, observer, wake), settings)
    engine.start()
    return engine
