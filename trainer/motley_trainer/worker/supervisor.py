"""The worker: registers, waits for jobs, and does one at a time until it is told to stop.

Owns the way to the server under the worker's own key, and what is done while there is none. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from motley_client.endpoint import Endpoint
from motley_client.errors import FailedPreconditionError, MotleyClientError, NotFoundError, UnavailableError
from motley_client.types_worker import JobEnding, Lease, LeaseEnd, WorkerTerms
from motley_client.worker_calls import LeaseClient, WorkerClient

from motley_trainer.worker.attempt import LOST, Surroundings, attempt
from motley_trainer.worker.faults import Faults
from motley_trainer.worker.metrics import WorkerMetrics
from motley_trainer.worker.reports import LeaseGoneError, Reporter, is_passing
from motley_trainer.worker.settings import METHODS, METHODS_OF_ADAPTERS, WorkerSettings
from motley_trainer.worker.stopping import Stop
from motley_trainer.worker.workplace import Workplace

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


class Worker:
    """Do jobs for one server.

    Raises: MotleyClientError from `run` for whatever the server refuses for good: the key, the name, the base.
    """

    def __init__(
        self, settings: WorkerSettings, endpoint: Endpoint, workplace: Workplace, metrics: WorkerMetrics, stop: Stop
    ) -> None:
        self._settings = settings
        self._endpoint = endpoint
        self._stop = stop
        self._workplace = workplace
        self._metrics = metrics
        timings = settings.timings
        self._faults = Faults(timings.first_fault_seconds, timings.last_fault_seconds)
        self._around = Surroundings(settings, workplace, self._lease_client, metrics, stop, self._faults)
        self._is_away = False
        self._num_other_terms = 0

    async def run(self) -> None:
        """Work until the stop, or after one job if that was asked for."""
        where = self._endpoint
        with_key = WorkerClient(where.address, where.key, ca_file=where.ca_file, insecure=where.insecure)
        async with with_key as client:
            terms: WorkerTerms | None = None
            while not self._stop.asked.is_set():
                await asyncio.to_thread(self._workplace.forget_old, self._settings.timings.keep_seconds)
                if terms is None:
                    terms = await self._until_stopped(self._register(client))
                    continue
                lease, terms = await self._until_stopped(self._next_lease(client, terms)) or (None, None)
                if lease is None or terms is None:
                    continue
                if lease.terms_digest != terms.terms_digest:
                    await self._give_back(lease, terms)
                    terms = None
                    continue
                self._num_other_terms = 0
                fault = await self._do(lease, terms)
                if self._settings.takes_one:
                    return
                if fault:
                    await self._hold_back(fault)
        log.info("stopped")

    async def _do(self, lease: Lease, terms: WorkerTerms) -> str:
        """Do a job as far as it gets, and return the reason if the worker was at fault."""
        job = lease.job
        log.info("%s: leased, %s into %s", job.id, job.method, job.adapter_name or "a base")
        outcome = await attempt(lease, terms, self._around)
        self._metrics.ended(job.method, outcome.state)
        if not outcome.fault and outcome.state not in (LOST, LeaseEnd.QUEUED.value):
            self._faults.over(job.id)
            self._metrics.recovered()
        return outcome.fault

    async def _hold_back(self, fault: str) -> None:
        """Ask for no job for a while, the longer the more faults there were in a row: the next may fare no better."""
        pause = self._faults.next_pause()
        self._metrics.faulted(fault, pause)
        log.error("this worker is at fault (%s), and asks for no job in the next %g s", fault, pause)
        await self._until_stopped(asyncio.sleep(pause))

    async def _give_back(self, lease: Lease, terms: WorkerTerms) -> None:
        """Give a job back under terms that are not those of the registration, to register anew.

        Semantics: a server that restarted holds its base otherwise perhaps, and nothing must be trained or measured as
        it was held before. Where registering anew does not help, there is a pause.
        """
        job, settings = lease.job, self._settings
        log.warning("%s: given back: the server's terms are not those at registration any more", job.id)
        ending = JobEnding(LeaseEnd.QUEUED, message="the server's terms have changed, and the worker registers anew")
        async with self._lease_client(lease.token) as client:
            reporter = Reporter(job.id, client, terms.lease_seconds, settings.timings, self._stop)
            try:
                await reporter.finish(ending)
            except LeaseGoneError as error:
                log.warning("%s: lost: %s", job.id, error)
        self._metrics.ended(job.method, ending.end.value)
        self._num_other_terms += 1
        if self._num_other_terms > 1:
            timings = settings.timings
            pause = min(timings.idle_seconds * self._num_other_terms, timings.last_fault_seconds)
            await self._until_stopped(asyncio.sleep(pause))

    async def _register(self, client: WorkerClient) -> WorkerTerms | None:
        """Register; None if no server answered, after a pause."""
        settings = self._settings
        try:
            terms = await client.register_worker(
                settings.name,
                METHODS if self._workplace.bases is not None else METHODS_OF_ADAPTERS,
                settings.base.fingerprint,
                settings.device,
                importlib.metadata.version("motley"),
                timeout=settings.timings.poll_seconds,
            )
        except FailedPreconditionError as error:
            raise self._explained(error) from error
        except MotleyClientError as error:
            await self._bear(error)
            return None
        self._is_away = False
        log.info(
            "registered at %s as %s; base %s, %s; leases last %g s",
            self._endpoint.address, settings.name, settings.base.name, settings.base.fingerprint, terms.lease_seconds,
        )  # fmt: skip
        return terms

    def _explained(self, error: FailedPreconditionError) -> FailedPreconditionError:
        """Make sure that a refused base is told with its fingerprint."""
        base = self._settings.base
        if base.fingerprint in error.message:
            return error
        message = f"{error.message}; this worker's base {base.name} is {base.fingerprint}"
        return FailedPreconditionError(message, reason=error.reason, field=error.field, request_id=error.request_id)

    async def _next_lease(self, client: WorkerClient, terms: WorkerTerms) -> tuple[Lease | None, WorkerTerms | None]:
        """Wait for a job; without terms in the answer the worker has to register again."""
        timings, began = self._settings.timings, time.monotonic()
        try:
            lease = await client.lease_job(self._settings.name, timings.poll_seconds)
        except NotFoundError as error:
            log.warning("the server does not know this worker: %s", error)
            return None, None
        except MotleyClientError as error:
            await self._bear(error)
            return None, None
        if lease is None:  # also by a server that does not wait
            await asyncio.sleep(max(0.0, timings.idle_seconds - (time.monotonic() - began)))
        return lease, terms

    async def _bear(self, error: MotleyClientError) -> None:
        """Wait before asking a server again that did not answer.

        Raises: the error, if it was an answer.
        """
        if not is_passing(error):
            raise error
        if not self._is_away or not isinstance(error, UnavailableError):
            log.warning("the server does not answer, and is asked again: %s", error)
        self._is_away = True
        await asyncio.sleep(max(self._settings.timings.idle_seconds, error.retry_after_seconds or 0.0))

    async def _until_stopped(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result | None:
        """Return what a coroutine returns, or None once the worker is told to stop."""
        task, stopped = asyncio.create_task(coroutine), asyncio.create_task(self._stop.asked.wait())
        try:
            await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for one in (task, stopped):
                one.cancel()
            await asyncio.wait([task, stopped])

    def _lease_client(self, token: str) -> LeaseClient:
        where = self._endpoint
        return LeaseClient(where.address, token, ca_file=where.ca_file, insecure=where.insecure)


async def run_worker(
    settings: WorkerSettings, endpoint: Endpoint, workplace: Workplace, metrics: WorkerMetrics
) -> None:
    """Run a worker until SIGTERM or SIGINT; a second signal ends its job at once.

    Raises: MotleyClientError for whatever the server refuses for good.
    """
    stop = Stop()

    def interrupt(number: int) -> None:
        log.info("%s: stopping%s", signal.Signals(number).name, " at once" if stop.asked.is_set() else "")
        stop.interrupt()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, interrupt, number)
    log.info("worker %s, process %d", settings.name, os.getpid())
    await Worker(settings, endpoint, workplace, metrics, stop).run()
