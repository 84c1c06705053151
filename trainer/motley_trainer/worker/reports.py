"""What keeps a lease: events on their way to the server, in order, each taken once, and the answers to them.

Owns what is still to be reported, how long the lease holds, and when it is lost. Knows nothing of processes and files.
Runs on the event loop; `seconds_left` may be asked from any thread.
"""

from __future__ import annotations

import asyncio
import logging
import time

from motley_client.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    MotleyClientError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from motley_client.types_worker import JobEnding, WorkerEvent
from motley_client.worker_calls import LeaseClient

from motley_trainer.worker.settings import Timings
from motley_trainer.worker.stopping import Stop

MAX_BATCH = 100
MAX_PENDING = 1000
MAX_ANSWER_SECONDS = 10.0

log = logging.getLogger(__name__)


class LeaseGoneError(Exception):
    """Say why a job is no longer this worker's."""


class EndingRefusedError(LeaseGoneError):
    """Say why the server does not take the end that was reported; the lease still holds."""

    def __init__(self, error: MotleyClientError) -> None:
        super().__init__(f"the server does not take the end that was reported: {error}")
        self.reason = error.reason
        self.message = error.message


def is_passing(error: MotleyClientError) -> bool:
    """Tell whether the same call may be answered otherwise a moment later."""
    passing = UnavailableError | DeadlineExceededError | InternalError | CancelledRequestError
    return isinstance(error, passing) or error.retry_after_seconds is not None


class Reporter:
    """Report one job.

    Semantics: `keep` runs beside the work, and ends only by LeaseGoneError; then `finish` says how it ended. A batch
    whose answer was lost is sent again under the same count of events before it, by which the server takes none twice.
    """

    def __init__(self, name: str, client: LeaseClient, lease_seconds: float, timings: Timings, stop: Stop) -> None:
        self._name = name
        self._client = client
        self._lease_seconds = lease_seconds
        self._timings = timings
        self._stop = stop
        self._pending: list[WorkerEvent] = []
        self._num_reported = 0
        self._batch_size = MAX_BATCH
        self._expires = time.monotonic() + lease_seconds
        self._stop_seen: float | None = None
        self._is_cut_off = False
        self._has_pending = asyncio.Event()
        self.cancelled = asyncio.Event()

    @property
    def seconds_left(self) -> float:
        """Return how long the lease holds without another report."""
        return max(0.0, self._expires - time.monotonic())

    @property
    def is_full(self) -> bool:
        """Tell whether enough waits to be reported."""
        return len(self._pending) >= MAX_PENDING

    def add(self, event: WorkerEvent) -> None:
        """Have an event reported soon."""
        self._pending.append(event)
        self._has_pending.set()

    async def keep(self) -> None:
        """Report what happens, and at times that nothing did.

        Raises: LeaseGoneError.
        """
        timings = self._timings
        while True:
            try:
                async with asyncio.timeout(min(timings.heartbeat_seconds, self._lease_seconds / 3)):
                    await self._has_pending.wait()
                    await asyncio.sleep(timings.flush_seconds)  # what comes together goes together
            except TimeoutError:
                log.debug("%s: a heartbeat", self._name)
            await self._send(None)

    async def finish(self, ending: JobEnding) -> None:
        """Report what is left, and how the job ended, once `keep` has been cancelled.

        Raises: EndingRefusedError, after which another ending can be reported; LeaseGoneError.
        """
        await self._send(ending)

    async def _send(self, ending: JobEnding | None) -> None:
        pause, is_unsure, goes_alone = self._timings.first_pause_seconds, False, False
        while True:
            batch = self._pending[: self._batch_size]
            told = None if len(batch) < len(self._pending) or (batch and goes_alone) else ending
            began = time.monotonic()
            try:
                await self._report(batch, told)
            except MotleyClientError as error:
                if is_unsure and isinstance(error, UnauthenticatedError) and self.seconds_left:
                    return  # only the report whose answer was lost can have ended the lease before its time
                if isinstance(error, InvalidArgumentError) and batch and (told is None or goes_alone):
                    self._refused(batch, error)
                elif isinstance(error, InvalidArgumentError) and batch:
                    goes_alone = True  # it may be the ending that is refused
                elif isinstance(error, InvalidArgumentError | FailedPreconditionError) and told is not None:
                    raise EndingRefusedError(error) from error
                elif not is_passing(error):
                    raise self._gone(error) from error
                else:
                    is_unsure |= told is not None
                    pause = await self._wait(pause, error)
                continue
            self._taken(len(batch), began)
            pause = self._timings.first_pause_seconds
            if told is not None or (ending is None and not self._pending):
                return

    async def _report(self, batch: list[WorkerEvent], ending: JobEnding | None) -> None:
        timeout = min(MAX_ANSWER_SECONDS, max(self._lease_seconds / 3, self._timings.heartbeat_seconds))
        if await self._client.report_job(batch, self._num_reported, ending, timeout=timeout):
            self.cancelled.set()

    def _taken(self, num_events: int, began: float) -> None:
        del self._pending[:num_events]
        self._num_reported += num_events
        self._batch_size = MAX_BATCH
        if self._is_cut_off:
            log.info("%s: reports are answered again", self._name)
        self._is_cut_off = False
        self._expires = began + self._lease_seconds
        if not self._pending:
            self._has_pending.clear()

    def _refused(self, batch: list[WorkerEvent], error: MotleyClientError) -> None:
        """Find the event that the server does not take by sending them alone, and leave it out."""
        if len(batch) > 1:
            self._batch_size = 1
            return
        log.error("%s: the server takes no such event of kind %s: %s", self._name, batch[0].kind, error)
        del self._pending[0]
        self._batch_size = MAX_BATCH

    async def _wait(self, pause: float, error: MotleyClientError) -> float:
        """Wait before the next attempt, and return how long to wait after that one.

        Raises: LeaseGoneError if there can be none.
        """
        left = self._seconds_to_try()
        if left <= 0:
            raise self._gone(error) from error
        if not self._is_cut_off:
            log.warning("%s: reports are not answered, and the lease holds for %.1f s: %s", self._name, left, error)
        self._is_cut_off = True
        await asyncio.sleep(min(max(pause, error.retry_after_seconds or 0.0), left))
        return min(2 * pause, self._timings.last_pause_seconds)

    def _seconds_to_try(self) -> float:
        if not self._stop.asked.is_set():
            return self.seconds_left
        now = time.monotonic()
        self._stop_seen = self._stop_seen or now
        return min(self.seconds_left, self._stop_seen + self._timings.goodbye_seconds - now)

    def _gone(self, error: MotleyClientError) -> LeaseGoneError:
        known = UnauthenticatedError | PermissionDeniedError | NotFoundError
        what = "the lease is over" if isinstance(error, known) else "the lease cannot be kept"
        return LeaseGoneError(f"{what}: {error}")
