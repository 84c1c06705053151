"""A WorkerService in memory: queues jobs, leases them by tokens, and remembers what is reported."""

# ruff: noqa: N802 (the methods are named by the service)

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, NoReturn

import grpc
from fake_adapter_service import FakeAdapterService
from fake_service import FakeService, refusal, serving_service
from motley.v1 import training_pb2
from motley.v1.adapter_pb2_grpc import add_AdapterServiceServicer_to_server
from motley.v1.training_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server

BASE = f"sha256:{'b' * 64}"
PIECE = 1000


@dataclass
class FakeJob:
    """A job in the queue: `taken` counts the events of its present lease, which `token` names."""

    id: str
    spec: training_pb2.TrainingSpec
    state: str = "queued"
    reason: str = ""
    message: str = ""
    events: list[training_pb2.JobEvent] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    taken: int = 0
    expires: float = 0.0
    cancel_requested: bool = False

    def kinds(self) -> list[str]:
        """Return what was reported, in order."""
        return [str(event.WhichOneof("event")) for event in self.events]

    def steps(self) -> list[int]:
        """Return the steps that were reported, in order."""
        return [event.progress.step for event in self.events if event.HasField("progress")]


class FakeWorkerService(FakeService, WorkerServiceServicer):
    """Hand out jobs, one after the other.

    Semantics: while `is_down`, every call ends with UNAVAILABLE, without a word. `lost_reports` counts the reports that
    are taken and whose answer is lost; where `lost_endings` is set, only those that end a job. `refused_stage` is a
    stage that is taken for no event. Each FetchDataset takes the first of `cuts`, and breaks off after so many bytes.
    """

    def __init__(self, adapters: FakeAdapterService | None = None, lease_seconds: float = 5.0) -> None:
        super().__init__()
        self.adapters = adapters or FakeAdapterService()
        self.lease_seconds = lease_seconds
        self.base = BASE
        self.quantization, self.terms_digest = "nf4", ""
        self.workers: dict[str, training_pb2.RegisterWorkerRequest] = {}
        self.datasets: dict[str, bytes] = {}
        self.jobs: dict[str, FakeJob] = {}
        self.is_down = False
        self.lost_reports = 0
        self.lost_endings = 0
        self.refused_stage = ""
        self.cuts: list[int] = []
        self.offsets: list[int] = []
        self.reports: list[float] = []
        self._changed = Condition()

    def add_dataset(self, data: bytes) -> str:
        """Keep a dataset, and return its digest."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.datasets[digest] = data
        return digest

    def add_base_job(self) -> FakeJob:
        """Queue a job that makes a base."""
        job = self.add_job(method=training_pb2.TRAINING_METHOD_LOQT)
        job.spec.ClearField("publish")
        return job

    def add_job(self, data: bytes = b'{"text": "x"}\n', **fields: Any) -> FakeJob:
        """Queue a job on a dataset, published as `legal` unless its spec says otherwise."""
        spec = training_pb2.TrainingSpec(method=training_pb2.TRAINING_METHOD_LORA, dataset=self.add_dataset(data))
        spec.publish.adapter_name = "legal"
        spec.MergeFrom(training_pb2.TrainingSpec(**fields))
        job = FakeJob(f"job-{len(self.jobs):016x}", spec)
        with self._changed:
            self.jobs[job.id] = job
            self._changed.notify_all()
        return job

    def end_lease(self, job: FakeJob) -> None:
        """Take a job away from whoever has it."""
        with self._changed:
            job.tokens.append("")
            job.state = "queued"
            self._changed.notify_all()

    def enter(self, name: str, request: Any, context: Any) -> None:
        """Remember a call, and refuse it if that was asked for."""
        if self.is_down:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        super().enter(name, request, context)

    def RegisterWorker(
        self, request: training_pb2.RegisterWorkerRequest, context: Any
    ) -> training_pb2.RegisterWorkerResponse:
        self.enter("RegisterWorker", request, context)
        if request.base_fingerprint != self.base:
            self.abort(context, refusal(grpc.StatusCode.FAILED_PRECONDITION, "BASE_MISMATCH", "base_fingerprint"))
        self.workers[request.name] = request
        response = training_pb2.RegisterWorkerResponse(quantization=self.quantization, dtype="bfloat16")
        response.terms_digest = self.terms_digest
        response.lease_duration.FromMilliseconds(int(self.lease_seconds * 1000))
        return response

    def LeaseJob(self, request: training_pb2.LeaseJobRequest, context: Any) -> training_pb2.LeaseJobResponse:
        self.enter("LeaseJob", request, context)
        if request.worker not in self.workers:
            self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "WORKER_NOT_REGISTERED", "worker"))
        with self._changed:
            self._changed.wait_for(lambda: self._next() is not None, request.wait.ToTimedelta().total_seconds())
            job = self._next()
            if job is None or not context.is_active():
                return training_pb2.LeaseJobResponse()
            return training_pb2.LeaseJobResponse(lease=self._lease(job, request.worker))

    def _next(self) -> FakeJob | None:
        for job in self.jobs.values():
            if job.state == "running" and job.expires < time.monotonic():
                job.state = "queued"
        return next((job for job in self.jobs.values() if job.state == "queued"), None)

    def _lease(self, job: FakeJob, worker: str) -> training_pb2.Lease:
        job.tokens.append(f"mj_{len(job.tokens)}_{job.id}")
        job.state, job.taken, job.expires = "running", 0, time.monotonic() + self.lease_seconds
        shown = training_pb2.TrainingJob(id=job.id, spec=job.spec, worker=worker, base_fingerprint=self.base)
        shown.cancel_requested = job.cancel_requested
        upload = f"upload-of-{job.id}"
        return training_pb2.Lease(job=shown, token=job.tokens[-1], upload_id=upload, terms_digest=self.terms_digest)

    def _held(self, context: Any) -> FakeJob:
        """Return the job of the caller's lease."""
        token = dict(context.invocation_metadata())["authorization"].removeprefix("Bearer ")
        for job in self.jobs.values():
            if job.tokens and job.tokens[-1] == token and job.state == "running" and job.expires >= time.monotonic():
                return job
        self.abort(context, refusal(grpc.StatusCode.UNAUTHENTICATED, "LEASE_ENDED"))

    def FetchDataset(
        self, request: training_pb2.FetchDatasetRequest, context: Any
    ) -> Iterator[training_pb2.FetchDatasetResponse]:
        self.enter("FetchDataset", request, context)
        job = self._held(context)
        if request.digest not in (job.spec.dataset, job.spec.gate.dataset):
            self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND", "digest"))
        data = self.datasets[request.digest]
        self.offsets.append(request.offset)
        if request.offset > len(data):
            self.abort(context, refusal(grpc.StatusCode.OUT_OF_RANGE, "DATASET_OFFSET", "offset"))
        end = min(request.offset + self.cuts.pop(0), len(data)) if self.cuts else None
        for offset in range(request.offset, len(data) if end is None else end, PIECE):
            yield training_pb2.FetchDatasetResponse(data=data[offset : min(offset + PIECE, end or len(data))])
        if end is not None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    def ReportJob(self, request: training_pb2.ReportJobRequest, context: Any) -> training_pb2.ReportJobResponse:
        self.enter("ReportJob", request, context)
        with self._changed:
            job = self._held(context)
            known = job.taken - request.num_reported
            if known < 0 or any(map(self._is_refused, request.events)):
                self.abort(context, refusal(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_EVENT", "events"))
            if not request.ending.reason.replace("_", "").isupper() and request.ending.reason:
                self.abort(context, refusal(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ENDING", "ending.reason"))
            published = self._published(job, request, context)
            fresh = list(request.events)[known:]
            job.events += [*fresh, *published]
            job.taken += len(fresh)
            job.expires = time.monotonic() + self.lease_seconds
            self.reports.append(time.monotonic())
            if request.HasField("ending"):
                job.state = training_pb2.JobState.Name(request.ending.state).removeprefix("JOB_STATE_").lower()
                job.reason, job.message = request.ending.reason, request.ending.message
                self._changed.notify_all()
            self._lose(request, context)
        return training_pb2.ReportJobResponse(cancel_requested=job.cancel_requested)

    def _is_refused(self, event: training_pb2.JobEvent) -> bool:
        return (
            event.WhichOneof("event") in (None, "state_change", "published") or event.stage == self.refused_stage != ""
        )

    def _published(
        self, job: FakeJob, request: training_pb2.ReportJobRequest, context: Any
    ) -> list[training_pb2.JobEvent]:
        """Look up what a job has become, if it ends well."""
        if request.ending.state != training_pb2.JOB_STATE_SUCCEEDED:
            return []
        if job.spec.method == training_pb2.TRAINING_METHOD_LOQT:
            if not any(event.HasField("base") for event in (*job.events, *request.events)):
                self.abort(context, refusal(grpc.StatusCode.FAILED_PRECONDITION, "NO_BASE_MADE", "ending.state"))
            return []
        version = self.adapters.finished.get(f"upload-of-{job.id}")
        if version is None or version not in self.adapters.versions.get(version.name, ()):
            self.abort(context, refusal(grpc.StatusCode.FAILED_PRECONDITION, "NOT_PUBLISHED", "ending.state"))
        return [training_pb2.JobEvent(published=version)]

    def _lose(self, request: training_pb2.ReportJobRequest, context: Any) -> None:
        if self.lost_reports:
            self.lost_reports -= 1
            self._cut(context)
        if self.lost_endings and request.HasField("ending"):
            self.lost_endings -= 1
            self._cut(context)

    def _cut(self, context: Any) -> NoReturn:
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        raise AssertionError("abort returned")


@contextmanager
def serving_workers(fake: FakeWorkerService) -> Iterator[str]:
    """Serve jobs and adapters on loopback while the block runs; yield the address."""

    def add(fake: FakeWorkerService, server: grpc.Server) -> None:
        add_WorkerServiceServicer_to_server(fake, server)
        add_AdapterServiceServicer_to_server(fake.adapters, server)

    with serving_service(add, fake) as address:
        yield address
