"""One lease from its beginning to its end: the work, the reports beside it, and whatever breaks in on both.

Owns which end a lease comes to, and what stays in the job's directory after it. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from motley_client.errors import MotleyClientError, UnauthenticatedError
from motley_client.types_worker import JobEnding, Lease, LeaseEnd, WorkerTerms
from motley_client.worker_calls import LeaseClient

from motley_trainer.worker.faults import Faults, WorkerAtFaultError, fault_of
from motley_trainer.worker.metrics import WorkerMetrics
from motley_trainer.worker.reports import EndingRefusedError, LeaseGoneError, Reporter
from motley_trainer.worker.settings import WorkerSettings
from motley_trainer.worker.stopping import Stop
from motley_trainer.worker.work import JobFailedError, Work
from motley_trainer.worker.workplace import CHECKPOINTS, RESULT, Workplace

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
    faults: Faults


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state in which a job was left, `lost` if it is another's now; `fault` is why the worker gave it back."""

    state: str
    fault: str = ""


async def attempt(lease: Lease, terms: WorkerTerms, around: Surroundings) -> Outcome:
    """Do a leased job as far as it gets, and return how it was left.

    Effects: the job's directory stays where the job goes on later. Of one that failed or was cancelled its checkpoints
    stay, and the adapter or base if only its publication failed; of one that ended otherwise nothing.
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
            if ending.end is LeaseEnd.CANCELLED and work.kept_aside is None:
                ending = replace(ending, message=work.kept())  # a base that was in its place before that was heard
            ending = await _reported(ending, reporter, work)
        except LeaseGoneError as error:
            log.warning("%s: lost, its directory stays: %s", job.id, _with(str(error), work.kept()))
            return Outcome(LOST)
    state = ending.end.value
    log.info("%s: %s%s", job.id, state, f", {ending.reason}: {ending.message}" if ending.reason else "")
    await asyncio.to_thread(_clean_up, work, ending.end)
    return Outcome(state, ending.reason if ending.end is LeaseEnd.QUEUED else "")


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
                return _ending_of(doing, work, around)
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


async def _reported(ending: JobEnding, reporter: Reporter, work: Work) -> JobEnding:
    """Report how a job ended, and return it: as failed, if the server does not take it so.

    Raises: LeaseGoneError.
    """
    try:
        await reporter.finish(ending)
    except EndingRefusedError as error:
        ending = _failed(work, error.reason, error.message)
        await reporter.finish(ending)
    return ending


async def _cancel(*tasks: asyncio.Task[object]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _ending_of(doing: asyncio.Task[JobEnding], work: Work, around: Surroundings) -> JobEnding:
    """Return how the work ended, as what went wrong if it did: a fault of the worker's gives the job back.

    Raises: LeaseGoneError where the server no longer knows the lease.
    """
    try:
        return doing.result()
    except UnauthenticatedError as error:
        raise LeaseGoneError(str(error)) from error
    except (JobFailedError, MotleyClientError) as error:
        return _failed(work, error.reason, error.message)
    except WorkerAtFaultError as error:
        return _given_back(error)
    except OSError as error:
        log.exception("a fault of the worker's")
        return _given_back(fault_of(error))
    except Exception as error:
        log.exception("a fault of the worker's")
        fault = fault_of(error)
        return _failed(work, fault.reason, fault.message) if around.faults.blames(work.job_id) else _given_back(fault)


def _given_back(fault: WorkerAtFaultError) -> JobEnding:
    return JobEnding(LeaseEnd.QUEUED, fault.reason, fault.message)


def _failed(work: Work, reason: str, message: str) -> JobEnding:
    """Return a failure, which says where the adapter or base is if it was only its publication that failed."""
    return JobEnding(LeaseEnd.FAILED, reason, _with(message, work.kept()))


def _with(message: str, more: str) -> str:
    return f"{message}; {more}" if more else message


def _clean_up(work: Work, end: LeaseEnd) -> None:
    directory = work.directory
    if directory is None or end is LeaseEnd.QUEUED:
        return
    try:
        if end in (LeaseEnd.SUCCEEDED, LeaseEnd.REJECTED):
            directory.remove()
        elif end is LeaseEnd.FAILED and (kept := work.kept_aside) is not None:
            directory.keep(CHECKPOINTS, kept.name, RESULT)
            log.warning("%s: what it made, which was not published, stays in %s", work.job_id, kept)
        elif directory.keep(CHECKPOINTS):
            log.info("%s: its checkpoints stay in %s", work.job_id, directory.path)
    except OSError as error:
        log.warning("%s: its directory could not be cleaned up: %s", work.job_id, error)
