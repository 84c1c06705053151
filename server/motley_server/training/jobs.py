"""Jobs as they are queued, watched and worked on: the registry's, with who must be woken and counted around it.

Whoever waits, for a job's next event or for a job to do, is woken at once by what this server changes, and looks
every second for what others do. It knows no wire, and does not read what jobs and events say. Runs on the event loop's
thread; the registry works on the database's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from motley_server.errors import MotleyError
from motley_server.lifecycle import draining
from motley_server.registry.database import Database
from motley_server.registry.job_records import (
    Ending,
    JobEvent,
    JobRecord,
    JobState,
    Leased,
    NewEvent,
    NewJob,
    ReportAnswer,
)
from motley_server.registry.jobs import Jobs
from motley_server.registry.leases import Leases, lease_ended
from motley_server.registry.records import Quota
from motley_server.training.changes import LOOK_SECONDS, QUEUE, Changes
from motley_server.training.observer import TrainingObserver

log = logging.getLogger(__name__)

EVENTS_A_LOOK: Final = 100


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker tells by a lease: what is new, how much it had told before, perhaps how it ended.

    Semantics: `latest` are texts to be shown with the job itself, by their columns.
    """

    lease_id: str
    events: Sequence[NewEvent] = ()
    num_reported: int = 0
    ending: Ending | None = None
    latest: Mapping[str, str] = field(default_factory=dict)


class JobDesk:
    """Queue jobs, have them watched, and lend them to workers."""

    def __init__(self, database: Database, jobs: Jobs, leases: Leases, observer: TrainingObserver) -> None:
        self._run = database.run
        self._jobs = jobs
        self._leases = leases
        self._observer = observer
        self._changes = Changes()
        self._giving_back: set[asyncio.Task[Any]] = set()

    @property
    def num_waiting(self) -> int:
        """Return how many wait for a job's next event, or for a job."""
        return self._changes.num_waiting

    async def create(self, new: NewJob, quota: Quota, adapter_bytes: int, *, request_id: str, scope: str) -> JobRecord:
        """Queue a job; see `Jobs.create`."""
        job = await self._run(self._jobs.create, new, quota, adapter_bytes, request_id=request_id, scope=scope)
        self._changes.tell(QUEUE)
        return job

    async def cancel(self, owner: str, id: str, *, request_id: str, scope: str) -> JobRecord:
        """End a queued job, or have a running one end at its next step; see `Jobs.cancel`."""
        before = await self._run(self._jobs.get, owner, id)
        job = await self._run(self._jobs.cancel, owner, id, request_id=request_id, scope=scope)
        self._changes.tell(id)
        if job.state.is_end and not before.state.is_end:
            self._observer.job_ended(job.method, job.state.value)
        return job

    async def watch(self, owner: str, id: str, after: int) -> AsyncGenerator[JobEvent, None]:
        """Yield a job's events from one on, as they come, to the last.

        Raises: NotFoundError (reason=JOB_NOT_FOUND); InvalidArgumentError (reason=OUT_OF_RANGE); OutOfRangeError
        (reason=NO_SUCH_EVENT); UnavailableError (reason=DRAINING) once the server is being emptied.
        """
        with self._changes.watching(id) as change:
            while True:
                self._check_open()
                change.begin_to_look()
                job = await self._run(self._jobs.get, owner, id)
                if job.last_sequence == after:
                    if job.state.is_end:
                        return
                    await change.wait()
                    continue
                for event in await self._run(self._jobs.events, owner, id, after, EVENTS_A_LOOK):
                    after = event.sequence
                    yield event

    async def lease(self, worker: str, key_id: str, wait_seconds: float) -> Leased | None:
        """Lend a worker a job that it can do, under a key, waiting for one; None if there is none until then.

        Semantics: whoever stops waiting has not been lent any.
        Raises: what `Leases.lease` does; UnavailableError (reason=DRAINING).
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_seconds
        with self._changes.watching(QUEUE) as change:
            while True:
                self._check_open()
                change.begin_to_look()
                leased = await self._take(worker, key_id)
                if leased is not None:
                    self._note_lease(leased.job)
                    return leased
                remaining = until - loop.time()
                if remaining <= 0:
                    return None
                await change.wait(min(remaining, LOOK_SECONDS))

    async def give_back(self, leased: Leased) -> None:
        """End a lease whose worker never came to hear of it; the job is queued as it was."""
        try:
            scope = await self._run(self._leases.authenticate, leased.token)
            if scope is not None:
                await self.report(Told(scope.lease_id, ending=Ending(JobState.QUEUED)), leased.job)
        except MotleyError as error:  # it ends by itself
            log.warning("job %s is lent to nobody until its lease expires: %s", leased.job.id, error.message)

    async def report(self, told: Told, job: JobRecord) -> ReportAnswer:
        """Take in what a worker tells of its job.

        Raises: what `Leases.report` does; UnauthenticatedError (reason=LEASE_ENDED), too, where the job's time is over.
        """
        answer = await self._run(
            self._leases.report, told.lease_id, told.events, told.num_reported, told.ending, told.latest
        )
        self._changes.tell(job.id)
        if (ending := told.ending or answer.overdue) is not None:
            self._note_end(job, ending.state, was_cancelled=answer.cancel_requested)
        if answer.overdue is not None:
            raise lease_ended()
        return answer

    async def expire(self) -> tuple[JobRecord, ...]:
        """End leases that were not kept, and return the jobs that they were of."""
        expired = await self._run(self._leases.expire)
        for job in expired:
            self._changes.tell(job.id, QUEUE)
            if job.state.is_end:
                self._observer.job_ended(job.method, job.state.value)
        return expired

    def close(self) -> None:
        """Turn away whoever waits, and whoever comes: the server is being emptied."""
        self._changes.close()

    async def stop(self) -> None:
        """Turn everybody away, and let what is being given back be so."""
        self.close()
        await asyncio.gather(*self._giving_back, return_exceptions=True)

    async def _take(self, worker: str, key_id: str) -> Leased | None:
        taking = asyncio.create_task(self._run(self._leases.lease, worker, key_id))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:  # whoever asked is gone, and the registry may have lent a job meanwhile
            self._in_the_background(self._undo(taking))
            raise

    async def _undo(self, taking: asyncio.Task[Leased | None]) -> None:
        try:
            leased = await taking
        except MotleyError:
            return
        if leased is not None:
            await self.give_back(leased)

    def _in_the_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._giving_back.add(task)
        task.add_done_callback(self._giving_back.discard)

    def _note_lease(self, job: JobRecord) -> None:
        self._changes.tell(job.id)
        if job.attempts == 1 and job.started_at is not None:
            self._observer.job_leased((job.started_at - job.created_at).total_seconds())

    def _note_end(self, job: JobRecord, state: JobState, *, was_cancelled: bool) -> None:
        if state is JobState.QUEUED and was_cancelled:  # what is given back then, ends
            state = JobState.CANCELLED
        if state.is_end:
            self._observer.job_ended(job.method, state.value)
        else:
            self._changes.tell(QUEUE)

    def _check_open(self) -> None:
        if self._changes.is_closed:
            raise draining()
