"""What is done with a leased job, from its data to what it publishes, each step as if it were the first or the tenth.

Owns the order of the steps and what they leave in the job's directory. A step that is cut is cancelled, and done again
under another lease. Runs on the event loop, and files on threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from motley_client.convert_worker import told_event
from motley_client.errors import AlreadyExistsError, InvalidArgumentError, MotleyClientError, NotFoundError
from motley_client.types_adapters import AdapterVersion
from motley_client.types_worker import JobEnding, Lease, LeaseEnd, WorkerTerms
from motley_client.worker_calls import LeaseClient

from motley_trainer.errors import OutputError
from motley_trainer.spec.settings import TrainingMethod
from motley_trainer.worker.child import EXIT_DONE, EXIT_FAILED, ChildEnd, ChildOrder, num_oom_kills, run_child
from motley_trainer.worker.faults import OF_ITS_PLACE, STALE_DATA, WORKER_FAULT, WorkerAtFaultError
from motley_trainer.worker.made_bases import BASE_EXISTS, MadeBases, NotWantedError, is_base
from motley_trainer.worker.metrics import WorkerMetrics
from motley_trainer.worker.reports import Reporter, is_passing
from motley_trainer.worker.settings import MAX_RESTARTS, WorkerSettings
from motley_trainer.worker.stopping import Stop
from motley_trainer.worker.workplace import JobDirectory, JobResult, Workplace

SERVED_DTYPES = ("float32", "bfloat16")  # that a job may compute in
MAX_OUT_OF_MEMORY = 2  # times that the kernel kills a job's process for it: there will be no more room later
BEGUN_OTHERWISE, PUBLISHED_BEFORE = "UPLOAD_EXISTS", "REQUEST_ID_REUSED"  # reasons by which an upload is refused

MAX_MERGES = 1000  # that one event tells of
_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


class JobFailedError(Exception):
    """Say why a job failed, and would fail again: what is reported of it."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


class Work:
    """Do one job, once, under one lease."""

    def __init__(
        self,
        lease: Lease,
        settings: WorkerSettings,
        terms: WorkerTerms,
        client: LeaseClient,
        reporter: Reporter,
        metrics: WorkerMetrics,
        stop: Stop,
    ) -> None:
        self._lease = lease
        self._job = lease.job
        self._settings = settings
        self._terms = terms
        self._client = client
        self._reporter = reporter
        self._metrics = metrics
        self._stop = stop
        self._has_told_evaluation = False
        self._most_bytes = 0
        self._has_passed = False
        self._place: Path | None = None  # of the base, once it is there
        self.is_publishing = False
        self.directory: JobDirectory | None = None

    async def do(self, workplace: Workplace) -> JobEnding:
        """Do what of the job is not done yet, and return how it ended: SUCCEEDED once it is published, or REJECTED.

        Semantics: a base is not published but kept here, and told of.
        Raises: JobFailedError; WorkerAtFaultError; MotleyClientError for what the server refuses; OSError.
        """
        try:
            directory = self.directory = await asyncio.to_thread(workplace.job, self._job.id)
            datasets = {digest: directory.dataset(digest) for digest in self._job.datasets}
        except ValueError as error:  # a name that must not become a path
            raise JobFailedError(str(error), reason="BAD_SPEC") from error
        bases = workplace.bases
        if self._makes_base and bases is None:  # it never said that it could
            raise WorkerAtFaultError("the worker has no place for bases", reason=WORKER_FAULT)
        await self._prepare(directory, datasets, workplace.spectra)
        result = await asyncio.to_thread(self._earlier_result, directory, bases) or await self._train(directory)
        if result.evaluation and not self._has_told_evaluation:  # by this lease: who had it before may not have
            self._tell({"evaluation": dict(result.evaluation)})
        if not result.passed:
            message = result.message or f"the gate was not passed: {_figures(result.evaluation)}"
            return JobEnding(LeaseEnd.REJECTED, result.reason or "GATE_NOT_PASSED", message)
        return await (self._publish(directory) if bases is None or not self._makes_base else self._keep(result, bases))

    @property
    def _makes_base(self) -> bool:
        """Tell whether the job ends in a base, and no adapter."""
        return self._job.method == TrainingMethod.LOQT

    @property
    def job_id(self) -> str:
        """Return whose work it is."""
        return self._job.id

    @property
    def kept_aside(self) -> Path | None:
        """Return where the job's directory has what was to be published, or to be put to the other bases."""
        if not self._has_passed or self._place is not None or self.directory is None:
            return None
        place = self.directory.base if self._makes_base else self.directory.adapter
        return place if place.is_dir() else None

    def kept(self) -> str:
        """Return in words where the adapter or base is that nobody was told of; empty if there is none."""
        worker, stays = f"worker {self._settings.name}", ""
        if self._place is not None:
            stays = f"its base stays with {worker}, in {self._job.id} of its `--bases`, from where `motley serve` can "
            stays += "serve it"
        elif self.kept_aside is not None:
            days = self._settings.timings.keep_seconds / (24 * 3600)
            kind = "base" if self._makes_base else "adapter"
            use = "`motley serve` can serve it" if self._makes_base else "`motley adapters push` can publish it"
            stays = f"for {days:g} days its {kind} stays with {worker}, in jobs/{self._job.id}/{kind} of its work "
            stays += f"directory, from where {use}"
        return f"it was trained and has passed its gate: {stays}" if stays else ""

    # What a job's process is told and tells: see `Listener`.

    @property
    def is_full(self) -> bool:
        """Tell whether enough waits to be reported."""
        return self._reporter.is_full

    def told(self, line: Mapping[str, Any]) -> None:
        """Have what the job's process tells reported and shown.

        Raises: ValueError for what is no event.
        """
        try:
            events = [told_event(part) for part in parts_of(line)]
        except InvalidArgumentError as error:
            raise ValueError(error.message) from error
        for event in events:
            self._reporter.add(event)
        event = events[-1]
        if event.kind == "progress":
            self._metrics.progressed(line["progress"])
        elif event.kind == "routing":
            self._metrics.routed(line["routing"])
        self._has_told_evaluation |= event.kind == "evaluation"

    def weighed(self, num_bytes: int) -> None:
        """Show the memory that the job's process takes."""
        self._most_bytes = max(self._most_bytes, num_bytes)
        self._metrics.weighed(num_bytes)

    def _tell(self, event: Mapping[str, Any]) -> None:
        self._reporter.add(told_event(event))

    async def _prepare(self, directory: JobDirectory, datasets: Mapping[str, Path], spectra: Path) -> None:
        job, others = self._job, enumerate(self._job.reads)
        missing = [digest for digest, path in datasets.items() if not path.exists()]
        # One that is there stays, though its name may mean another version now: the job began with it.
        adapters = [(index, name) for index, name in others if not directory.other_adapter(index).exists()]
        if missing or adapters:
            self._tell({"stage": "fetching data"})
        for digest in missing:
            await self._persist(partial(self._client.fetch_dataset, digest, datasets[digest]))
        for index, name in adapters:
            await self._fetch_adapter(directory, index, name)
        base = self._settings.base
        dtype, served = self._settings.dtype, self._terms.dtype
        order = {
            "job_id": job.id,
            "spec": dict(job.spec),
            "base": str(base.directory),
            "base_name": base.name,
            "dtype": served if dtype == "auto" and served in SERVED_DTYPES else dtype,
            "served_quantization": self._terms.quantization,
            "device": self._settings.device,
            "spectra": str(spectra),
        }
        await asyncio.to_thread(directory.write_order, order)

    async def _fetch_adapter(self, directory: JobDirectory, index: int, name: str) -> None:
        place = directory.other_adapter(index)
        aside = place.with_name(f".new-{index}")
        await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)
        await self._persist(partial(self._client.download_adapter, name, aside))
        await asyncio.to_thread(os.replace, aside, place)

    async def _train(self, directory: JobDirectory) -> JobResult:
        """Run the job's process until it has a result, again where it died.

        Raises: JobFailedError; WorkerAtFaultError.
        """
        order = ChildOrder(
            name=self._job.id,
            command=(*self._settings.command, str(directory.path)),
            environ=child_environ(os.environ, self._settings.threads),
            nice=self._settings.nice,
            memory_limit_bytes=self._settings.memory_limit_bytes,
        )
        num_restarts = num_out_of_memory = 0
        while True:
            oom_kills = num_oom_kills()
            end = await run_child(order, self, self._settings.timings, self._stop.hurried)
            result = await asyncio.to_thread(directory.read_result) if end.code == EXIT_DONE else None
            if result is not None:
                return result
            await self._raise_if_final(end, directory)
            num_out_of_memory += _was_out_of_memory(end, oom_kills)
            if num_out_of_memory == MAX_OUT_OF_MEMORY:
                message = f"the kernel killed its process twice for want of memory; it took {self._most_bytes} bytes"
                raise JobFailedError(message, reason="OUT_OF_MEMORY")
            died = f"its process died ({end.cause})"
            if num_restarts == MAX_RESTARTS:
                message = f"{died} again after {MAX_RESTARTS} restarts"
                if end.last_words:
                    message += f"; its last words: {end.last_words}"
                raise JobFailedError(message, reason="JOB_DIED")
            num_restarts += 1
            log.warning("%s: %s, and is started again", self._job.id, died)
            self._metrics.restarted()
            self._tell({"stage": f"{died}, started again from its last checkpoint"})

    async def _raise_if_final(self, end: ChildEnd, directory: JobDirectory) -> None:
        """Raise for an end that another attempt would come to as well.

        Raises: JobFailedError; WorkerAtFaultError, if it would not at another worker.
        """
        if end.over_bytes is not None:
            limit = self._settings.memory_limit_bytes
            message = f"its process took {end.over_bytes} bytes, and the worker gives it {limit}"
            raise JobFailedError(message, reason="OUT_OF_MEMORY")
        if end.code == EXIT_FAILED and end.failure is not None:
            message, field = str(end.failure.get("message") or "no word about it"), end.failure.get("field")
            if field:
                message += f" (field {field})"
            reason = str(end.failure.get("reason") or "JOB_DIED")
            if reason in STALE_DATA:
                await asyncio.to_thread(directory.forget_data)
            if reason in OF_ITS_PLACE:
                raise WorkerAtFaultError(message, reason=reason)
            raise JobFailedError(message, reason=reason)

    def _earlier_result(self, directory: JobDirectory, bases: MadeBases | None) -> JobResult | None:
        """Return what the job came to before, None if it did not, or what it made is not there any more."""
        result = directory.read_result()
        if result is None or not (self._makes_base and result.passed and bases is not None):
            return result
        if bases.has(self._job.id, result.digest) or is_base(directory.base, result.digest):
            return result
        log.warning("%s: the base that it had made is gone, and is made again", self._job.id)
        directory.forget_result()
        return None

    async def _keep(self, result: JobResult, bases: MadeBases) -> JobEnding:
        """Put a base that was made to the others, and tell of it."""
        self._has_passed = True
        self._tell({"stage": "keeping the base"})
        try:
            self._place = await self._take(result, bases)
        except OutputError as error:
            if error.reason == BASE_EXISTS:
                raise JobFailedError(error.message, reason=error.reason) from error
            raise WorkerAtFaultError(error.message, reason=error.reason) from error
        self.is_publishing = True
        told = {**(result.base or {}), "directory": str(self._place), "fingerprint": result.digest}
        self._tell({"base": {name: value for name, value in told.items() if value is not None}})
        log.info("%s: made %s, %s", self._job.id, self._place, result.digest)
        return JobEnding(LeaseEnd.SUCCEEDED)

    async def _take(self, result: JobResult, bases: MadeBases) -> Path:
        """Put a base to the others, which may be a long copy; when cancelled, what is left of that is not done."""
        assert self.directory is not None
        unwanted = Event()
        args = (self.directory.base, self._job.id, result.digest, unwanted.is_set)
        taking = asyncio.ensure_future(asyncio.to_thread(bases.take, *args))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            unwanted.set()
            with suppress(NotWantedError, OutputError, OSError):
                self._place = await taking  # it came too late
            raise

    async def _publish(self, directory: JobDirectory) -> JobEnding:
        self._has_passed = self.is_publishing = True
        self._tell({"stage": "publishing"})
        try:
            version = await self._persist(partial(self._upload, directory))
        except AlreadyExistsError as error:
            if error.reason != PUBLISHED_BEFORE:
                raise
            # An attempt elsewhere, which came to other bytes, was not heard of again. Its version is the job's.
            log.info("%s: published before: %s", self._job.id, error)
        else:
            log.info("%s: published as %s@%d, %s", self._job.id, version.name, version.version, version.digest)
        return JobEnding(LeaseEnd.SUCCEEDED)

    async def _upload(self, directory: JobDirectory) -> AdapterVersion:
        """Upload the adapter; what another attempt had begun to upload, with other bytes, goes."""
        job, id = self._job, self._lease.upload_id
        if job.adapter_name is None:
            raise JobFailedError("the spec names no adapter to publish", reason="BAD_SPEC")
        upload = partial(
            self._client.upload_adapter,
            job.adapter_name,
            directory.adapter,
            aliases=job.aliases,
            labels=job.labels,
            upload_id=id,
        )
        try:
            return await upload()
        except AlreadyExistsError as error:
            if error.reason != BEGUN_OTHERWISE:
                raise
            log.info("%s: begun before with other bytes, which go: %s", job.id, error)
        with suppress(NotFoundError):  # it has become a version meanwhile
            await self._client.abort_upload(id)
        return await upload()

    async def _persist(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Repeat a call that meets no server; it is cancelled when the lease is gone meanwhile."""
        pause, is_waiting = self._settings.timings.first_pause_seconds, False
        while True:
            try:
                return await call()
            except MotleyClientError as error:
                if not is_passing(error):
                    raise
                if not is_waiting:
                    log.warning("%s: waiting for the server: %s", self._job.id, error)
                is_waiting = True
                await asyncio.sleep(max(pause, error.retry_after_seconds or 0.0))
                pause = min(2 * pause, self._settings.timings.last_pause_seconds)


def parts_of(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return an event as several of its kind, where a server would not take so many merges in one."""
    body = line.get("merges")
    merges = body.get("merges") if isinstance(body, dict) and body.keys() == {"merges"} == line.keys() else None
    if not isinstance(merges, list) or len(merges) <= MAX_MERGES:
        return [line]
    starts = range(0, len(merges), MAX_MERGES)
    return [{"merges": {"merges": merges[start : start + MAX_MERGES]}} for start in starts]


def child_environ(environ: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """Return the environment of a job's process: ours, but no key of ours, and with the manners of a guest."""
    kept = {name: value for name, value in environ.items() if not name.startswith("MOTLEY_")}
    kept |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept if threads is None else kept | {"OMP_NUM_THREADS": str(threads)}


def _was_out_of_memory(end: ChildEnd, oom_kills_before: int | None) -> bool:
    """Tell whether a process that nobody here killed was killed while the kernel was out of memory."""
    now = num_oom_kills()
    is_killed = end.code == -signal.SIGKILL and end.over_bytes is None
    return is_killed and now is not None and oom_kills_before is not None and now > oom_kills_before


def _figures(evaluation: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in evaluation.items()) or "without figures"
