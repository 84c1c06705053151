"""WorkerService: jobs in the hands of those who train.

Reads a request, has the desks do it, and writes the answer. Who may call is decided before (`access.py`); what a lease
is good for is asked here. Runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from motley.v1 import training_pb2, training_pb2_grpc

from motley_server.asked import Caller
from motley_server.audit import ControlAction, write_down
from motley_server.errors import FailedPreconditionError, InvalidArgumentError, PermissionDeniedError
from motley_server.facts import ServerFacts
from motley_server.registry.adapters import Adapters
from motley_server.registry.job_records import JobRecord, JobState, LeaseScope, NewWorker
from motley_server.rpc.call import current_caller
from motley_server.rpc.convert_adapters import timestamp_to
from motley_server.rpc.convert_training import METHODS, job_to
from motley_server.rpc.job_reports import made_by, makes_base, read_report
from motley_server.rpc.lease_scope import check_dataset
from motley_server.rpc.worker_terms import terms_of
from motley_server.training.jobs import Told
from motley_server.training.opening import Training
from motley_server.training.publications import find_published

Context = grpc.aio.ServicerContext[Any, Any]

MAX_WAIT: Final = timedelta(minutes=1)
_SERVICE: Final = "motley.v1.WorkerService"


class WorkerService(training_pb2_grpc.WorkerServiceServicer):
    """Lend jobs to workers, and take in what they tell of them."""

    def __init__(
        self, training: Training, adapters: Adapters, facts: ServerFacts, check_open: Callable[[], None]
    ) -> None:
        """Make the service; `check_open` refuses whoever comes while the server is being emptied."""
        self._run = training.database.run
        self._training = training
        self._jobs = training.job_desk
        self._adapters = adapters
        self._facts = facts
        self._check_open = check_open
        self._terms = terms_of(facts.base, training.limits.lease_duration)

    async def RegisterWorker(  # noqa: N802
        self, request: training_pb2.RegisterWorkerRequest, context: Context
    ) -> training_pb2.RegisterWorkerResponse:
        """Note what a worker can do, and tell it how the base is held."""
        self._check_open()
        base = self._facts.base
        if request.base_fingerprint != base.fingerprint:
            message = f"the worker has base {request.base_fingerprint[:80]!r}, and served is {base.fingerprint}"
            raise FailedPreconditionError(message, reason="BASE_MISMATCH", field="base_fingerprint")
        methods = _methods(request)
        said = (methods, request.base_fingerprint, request.device, request.version)
        await self._run(
            self._training.workers.register, NewWorker(request.name, current_caller().key_id, *said)
        )  # fmt: skip
        return self._terms

    async def LeaseJob(  # noqa: N802
        self, request: training_pb2.LeaseJobRequest, context: Context
    ) -> training_pb2.LeaseJobResponse:
        """Wait for a job, and lend it."""
        self._check_open()
        caller = current_caller()
        leased = await self._jobs.lease(request.worker, caller.key_id, _wait_seconds(request.wait))
        # From here on nothing waits: who is not there any more when this begins is known, and has been lent nothing.
        if leased is None:
            return training_pb2.LeaseJobResponse()
        _write_down("LeaseJob", caller, leased.job, worker=request.worker)
        lease = training_pb2.Lease(
            job=job_to(leased.job),
            token=leased.token,
            expire_time=timestamp_to(leased.expires_at),
            upload_id=leased.upload_id,
            terms_digest=self._terms.terms_digest,
        )
        return training_pb2.LeaseJobResponse(lease=lease)

    async def FetchDataset(  # noqa: N802
        self, request: training_pb2.FetchDatasetRequest, context: Context
    ) -> AsyncIterator[training_pb2.FetchDatasetResponse]:
        """Send a dataset of the job."""
        lease = _lease(current_caller())
        check_dataset(lease, request.digest)
        async with aclosing(self._training.dataset_desk.read(lease.owner, request.digest, request.offset)) as parts:
            async for data in parts:
                yield training_pb2.FetchDatasetResponse(data=data)

    async def ReportJob(  # noqa: N802
        self, request: training_pb2.ReportJobRequest, context: Context
    ) -> training_pb2.ReportJobResponse:
        """Take in what happened, and keep the lease or end it."""
        caller = current_caller()
        lease = _lease(caller)
        job = await self._run(self._training.jobs.get, lease.owner, lease.job_id)
        report = read_report(request, job)
        has_succeeded = report.ending is not None and report.ending.state is JobState.SUCCEEDED
        made: dict[str, str] = {}
        if has_succeeded and makes_base(job):
            made["base_fingerprint"] = made_by(job, report)
        elif has_succeeded:
            version = await self._run(find_published, self._adapters, job)
            report = report.with_published(version)
        told = Told(lease.lease_id, report.events, request.num_reported, report.ending, report.latest)
        answer = await self._jobs.report(told, job)
        if report.ending is not None:
            _write_down("ReportJob", caller, job, worker=lease.worker, state=report.ending.state.value, **made)
        return training_pb2.ReportJobResponse(
            expire_time=timestamp_to(answer.expires_at), cancel_requested=answer.cancel_requested
        )


def _lease(caller: Caller) -> LeaseScope:
    if caller.lease is None:  # no rule lets such a caller in
        raise PermissionDeniedError("this needs the token of a lease", reason="LEASE_REQUIRED")
    return caller.lease


def _methods(request: training_pb2.RegisterWorkerRequest) -> tuple[str, ...]:
    """Return what a worker can do, in one spelling."""
    methods = {METHODS[number] for number in request.methods if number in METHODS}
    if not methods or len(request.methods) > len(METHODS):
        message = f"a worker has one or more methods, each once: {', '.join(METHODS.values())}"
        raise InvalidArgumentError(message, reason="METHOD_REQUIRED", field="methods")
    return tuple(sorted(methods))


def _wait_seconds(duration: Duration) -> float:
    seconds: float = duration.seconds + duration.nanos / 1e9
    if not 0 <= seconds <= MAX_WAIT.total_seconds():
        message = f"{seconds:g} s is not within 0 and {MAX_WAIT.total_seconds():g}"
        raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="wait")
    return seconds


def _write_down(method: str, caller: Caller, job: JobRecord, **facts: str) -> None:
    target = {"job": job.id, "tenant_id": job.owner} | facts
    if job.adapter_name is not None:
        target["adapter_name"] = job.adapter_name
    action = ControlAction(f"{_SERVICE}/{method}", "OK", caller.request_id, caller.tenant_id, caller.key_id, target)
    write_down(action)
