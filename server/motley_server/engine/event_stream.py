"""The reader's end of one request: what the engine made of it, in order, bounded.

Lives on the event loop's thread. A request whose reader falls too far behind is cancelled, so that nobody's memory
grows with somebody's slowness.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from motley_server.engine.types import RequestEvent
from motley_server.errors import MotleyError, ResourceExhaustedError


class RequestEventStream:
    """Queue a request's events for one reader (see `api.EventStream`)."""

    def __init__(
        self, request_id: str, on_end: Callable[[int], None], max_events: int, cancel: Callable[[str], None]
    ) -> None:
        self._request_id = request_id
        self._on_end = on_end
        self._max_events = max_events
        self._cancel = cancel
        self._events: deque[RequestEvent] = deque()
        self._arrived = asyncio.Event()
        self._error: MotleyError | None = None
        self._has_ended = False  # the engine is done with the request
        self._is_closed = False  # the reader is
        self._num_generated_tokens = 0  # read or not
        self._is_cancelled = False  # and has told the engine so, which it does once

    def push(self, event: RequestEvent) -> None:
        """Take the next event from the engine."""
        self._num_generated_tokens += sum(len(delta.token_ids) for delta in event.deltas)
        if event.is_last:
            self._has_ended = True
            self._on_end(self._num_generated_tokens)
        if event.error is not None:
            self._error = self._error or event.error
        elif not self._is_closed and self._error is None:
            self._events.append(event)
            if len(self._events) > self._max_events:
                self._give_up()
        self._arrived.set()

    def __aiter__(self) -> RequestEventStream:
        """Return itself."""
        return self

    async def __anext__(self) -> RequestEvent:
        """Wait for the next event; raise its error if it has one."""
        try:
            while not self._events:
                if self._error is not None:
                    raise self._error
                if self._has_ended or self._is_closed:
                    raise StopAsyncIteration
                self._arrived.clear()
                await self._arrived.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        return self._events.popleft()

    def take_ready(self) -> list[RequestEvent]:
        """Return the events that are there already, without waiting."""
        ready = list(self._events)
        self._events.clear()
        return ready

    async def aclose(self) -> None:
        """Cancel the request unless it has ended; closing twice is harmless."""
        self._cancel_once()
        self._is_closed = True
        self._arrived.set()

    def _give_up(self) -> None:
        self._events.clear()
        message = f"the reader left {self._max_events} events unread; its request was cancelled"
        self._error = ResourceExhaustedError(message, reason="SLOW_READER")
        self._cancel_once()

    def _cancel_once(self) -> None:
        if not self._has_ended and not self._is_cancelled:
            self._is_cancelled = True
            self._cancel(self._request_id)
