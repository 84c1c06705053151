"""The thread that owns the device: it reads a mailbox, steps the engine, and hands on what came of it.

Owns the core and with it the scheduler, the adapters on the device and every request in hand. Messages are picklable
and go in from any thread; what a step made goes out through two callbacks that must not block. It knows no event loop.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from motley_server.engine.core import EngineCore
from motley_server.engine.types import GenerateRequest, KeepOutcome, RequestEvent
from motley_server.errors import MotleyError, UnavailableError

log = logging.getLogger(__name__)
IDLE_POLL_SECONDS = 0.25


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
class Keep:
    """Bring an adapter onto the device to stay; the outcome bears the ticket."""

    ticket: int
    digest: str


@dataclass(frozen=True, slots=True)
class Unkeep:
    """Let an adapter leave the device."""

    digest: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Let go of what is remembered of an adapter."""

    digest: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Step again: an adapter has arrived."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Fail what is left and end the thread."""


MakeCore = Callable[[Callable[[], None]], EngineCore]
"""Makes the engine, given what to call, on any thread, when a step that waits has something to do."""

Message = Submit | Cancel | Keep | Unkeep | Forget | Wake | Stop


class EngineThread(threading.Thread):
    """Step the engine while there is work, wait at the mailbox while there is none, or none that can go on."""

    def __init__(
        self,
        make_core: MakeCore,
        deliver: Callable[[list[RequestEvent]], None],
        deliver_kept: Callable[[list[KeepOutcome]], None],
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
        self._deliver_kept = deliver_kept
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
            self._deliver(self.core.fail_all(stopped()))
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
            if outcomes := core.keeper.take_outcomes():
                self._deliver_kept(outcomes)

    def _read_mailbox(self, *, wait: bool) -> list[Message]:
        messages: list[Message] = []
        try:
            if wait:
                messages.append(self.mailbox.get(timeout=IDLE_POLL_SECONDS))
            while True:
                messages.append(self.mailbox.get_nowait())
        except queue.Empty:
            return messages


def _apply(core: EngineCore, message: Message) -> RequestEvent | None:
    match message:
        case Submit(request, arrival):
            return core.add(request, arrival)
        case Cancel(request_id, error):
            return core.cancel(request_id, error)
        case Keep(ticket, digest):
            core.keeper.keep(ticket, digest)
        case Unkeep(digest):
            core.keeper.unkeep(digest)
        case Forget(digest):
            core.keeper.forget(digest)
        case Wake() | Stop():
            pass
    return None


def stopped() -> UnavailableError:
    """Return what everybody is told who still waits for an engine that is gone."""
    return UnavailableError("the engine has stopped", reason="ENGINE_STOPPED", retry_after_seconds=5.0)
