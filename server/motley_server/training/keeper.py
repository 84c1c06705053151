"""The keeper: on timers, leases end that were not kept, figures are taken, and what nobody needs goes: bytes of no
dataset, and jobs that ended long ago.

Runs on the event loop's thread; the work itself on the database's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

from motley_server.errors import MotleyError
from motley_server.registry.collection import Collector
from motley_server.registry.database import Database
from motley_server.registry.job_records import JobState
from motley_server.registry.jobs import Jobs
from motley_server.registry.workers import Workers
from motley_server.training.datasets import DatasetDesk
from motley_server.training.jobs import JobDesk
from motley_server.training.observer import TrainingObserver

log = logging.getLogger(__name__)

KEEP_SECONDS: Final = 1.0
COUNT_SECONDS: Final = 2.0
HEARD_OF: Final = timedelta(minutes=1)
"""For how long a worker is there that says nothing."""


class Keeper:
    """Do what is due, again and again."""

    def __init__(
        self,
        database: Database,
        jobs: Jobs,
        workers: Workers,
        job_desk: JobDesk,
        dataset_desk: DatasetDesk,
        collector: Collector,
        observer: TrainingObserver,
        ended_jobs_kept: timedelta | None = None,
    ) -> None:
        self._run = database.run
        self._jobs = jobs
        self._workers = workers
        self._job_desk = job_desk
        self._dataset_desk = dataset_desk
        self._collector = collector
        self._observer = observer
        self._ended_jobs_kept = ended_jobs_kept
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, collect_seconds: float) -> None:
        """Begin, and look for bytes that nobody needs every so often."""
        for work, seconds in (
            (self.end_leases, KEEP_SECONDS), (self.count, COUNT_SECONDS), (self.collect, collect_seconds),
        ):  # fmt: skip
            self._tasks.append(asyncio.get_running_loop().create_task(_repeat(work, seconds)))

    async def stop(self) -> None:
        """Do no more."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def end_leases(self) -> None:
        """End the leases whose workers were not heard of."""
        for job in await self._job_desk.expire():
            log.warning(
                "the lease of job %s at worker %s was not kept; the job is %s", job.id, job.worker, job.state.value
            )

    async def count(self) -> None:
        """Tell the observer how much there is to do, and who is there to do it."""
        counts = await self._run(self._jobs.counts)
        workers = await self._run(self._workers.list, HEARD_OF)
        self._observer.training_counted(counts[JobState.QUEUED], counts[JobState.RUNNING], len(workers))

    async def collect(self) -> None:
        """Remove from disk what no dataset and no upload needs, and forget jobs that ended long ago."""
        if self._ended_jobs_kept is not None:
            forgotten = await self._run(self._jobs.forget_ended, self._ended_jobs_kept)
            if forgotten:
                log.info("forgot %d jobs that ended more than %s ago", forgotten, self._ended_jobs_kept)
        collected = await self._run(self._collector.collect, frozenset(), self._dataset_desk.active)
        self._observer.bytes_collected(collected.freed_bytes)
        if collected.freed_bytes:
            log.info("collected %d bytes of datasets that nobody wants", collected.freed_bytes)


async def _repeat(work: Callable[[], Awaitable[None]], period_seconds: float) -> None:
    while True:
        try:
            await work()
        except (MotleyError, OSError):
            log.exception("what was due to training was not done this time")
        await asyncio.sleep(period_seconds)
