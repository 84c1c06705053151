"""One lease from its beginning to its end: the work, the reports beside it, and whatever breaks in on both.

Owns which end a lease comes to, and what stays in the job's directory after it. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass

from motley_client.errors import MotleyClientError, UnauthenticatedError
from motley_client.types_worker import JobEnding, Lease, LeaseEnd, WorkerTerms
from motley_client.worker_calls import LeaseClient

from motley_trainer.worker.metrics import WorkerMetrics
from motley_trainer.worker.reports import EndingRefusedError, LeaseGoneError, Reporter
from motley_trainer.worker.settings import WorkerSettings
from motley_trainer.worker.stopping import Stop
from motley_trainer.worker.work import JobFailedError, Work
from motley_trainer.worker.workplace import JobDirectory, Workplace

LOST = "lost"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every lease of a worker meets. Semantics: `connect` makes a client of the token of a lease."""

    settings: WorkerSettings
    workplace: Workplace
    connect: Callable[[str], LeaseClient]
    metrics: WorkerMetrics
    stop: Stop


async def attempt(lease: Lease, terms: WorkerTerms, around: Surroundings) -> str:
    """Do a leased job as far as it gets, and return the state in which it was left; `lost` if that is another's now.

    Effects: the job's directory stays where the job goes on later. Of one that failed or was cancelled its checkpoints
    stay, of one that ended otherwise nothing.
    """
    job, settings = lease.job, around.settings
    async with around.connect(lease.token) as client:
        reporter = Reporter(job.id, client, terms.lease_seconds, settings.timings, around.stop)
        around.metrics.leased(lambda: reporter.seconds_left)
        if job.cancel_requested:
            reporter.cancelled.set()
        work = Work(lease, settings, terms, client, reporter, around.metrics, around.stop)
        try:
            ending = await _come_to_an_end(work, reporter, around)
            ending = await _reported(ending, reporter)
        except LeaseGoneError as error:
            log.warning("%s: lost, its directory stays: %s", job.id, error)
            return LOST
    state = ending.end.value
    log.info("%s: %s%s", job.id, state, f", {ending.reason}: {ending.message}" if ending.reason else "")
    if work.directory is not None:
        await asyncio.to_thread(_clean_up, work.directory, ending.end)
    return state


async def _come_to_an_end(work: Work, reporter: Reporter, around: Surroundings) -> JobEnding:
    """Work and report until the job has ended, or something breaks in.

    Raises: LeaseGoneError, when nothing of it runs any more.
    """
    if reporter.cancelled.is_set():
        return JobEnding(LeaseEnd.CANCELLED)
    doing = asyncio.create_task(work.do(around.workplace))
    keeping = asyncio.create_task(reporter.keep())
    stopped = asyncio.create_task(around.stop.asked.wait())
    cancelled = asyncio.create_task(reporter.cancelled.wait())
    waiting = {doing, keeping, stopped, cancelled}
    try:
        while True:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return _ending_of(doing)
            if keeping.done():
                await keeping  # raises
            if stopped.done():
                return JobEnding(LeaseEnd.QUEUED, message="the worker was stopped")
            if not work.is_publishing:
                return JobEnding(LeaseEnd.CANCELLED)
            waiting.discard(cancelled)  # too late: it may be public already
    finally:
        await _cancel(doing)  # which lets the process keep a checkpoint; reports go on meanwhile
        await _cancel(keeping, stopped, cancelled)


async def _reported(ending: JobEnding, reporter: Reporter) -> JobEnding:
    """Report how a job ended, and return it: as failed, if the server does not take it so.

    Raises: LeaseGoneError.
    """
    try:
        await reporter.finish(ending)
    except EndingRefusedError as error:
        ending = JobEnding(LeaseEnd.FAILED, error.reason, error.message)
        await reporter.finish(ending)
    return ending


async def _cancel(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _ending_of(doing: asyncio.Task[JobEnding]) -> JobEnding:
    """Return how the work ended, as what went wrong if it did.

    Raises: LeaseGoneError where the server no longer knows the lease.
    """
    try:
        return doing.result()
    except UnauthenticatedError as error:
        raise LeaseGoneError(str(error)) from error
    except (JobFailedError, MotleyClientError) as error:
        return JobEnding(LeaseEnd.FAILED, error.reason, error.message)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the worker has no room for {error.filename or 'what the job needs'}: {error.strerror}"
            return JobEnding(LeaseEnd.FAILED, "DISK_FULL", message)
        log.exception("a fault of the worker's")
        return JobEnding(LeaseEnd.FAILED, "WORKER_FAULT", f"{type(error).__name__}: {error}")


def _clean_up(directory: JobDirectory, end: LeaseEnd) -> None:
    try:
        if end in (LeaseEnd.SUCCEEDED, LeaseEnd.REJECTED):
            directory.remove()
        elif end is not LeaseEnd.QUEUED and directory.keep_checkpoints():
            log.info("%s: its checkpoints stay in %s", directory.path.name, directory.path)
    except OSError as error:
        log.warning("%s: its directory could not be cleaned up: %s", directory.path.name, error)
