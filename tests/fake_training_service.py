"""A TrainingService in memory: keeps datasets and jobs, does what a test says to a job, and cuts streams when told."""

# ruff: noqa: N802 (the methods are named by the service)

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any, NoReturn

import grpc
from certificates import Certificates
from fake_service import FakeService, page, refusal, serving_service
from motley.v1 import training_pb2
from motley.v1.training_pb2_grpc import TrainingServiceServicer, add_TrainingServiceServicer_to_server

BASE_FINGERPRINT = "sha256:" + "b" * 64
ENDS = (
    training_pb2.JOB_STATE_SUCCEEDED,
    training_pb2.JOB_STATE_REJECTED,
    training_pb2.JOB_STATE_FAILED,
    training_pb2.JOB_STATE_CANCELLED,
)


class FakeTrainingService(FakeService, TrainingServiceServicer):
    """Keep datasets and jobs; nobody trains but the test, by `happen`.

    Semantics: each upload takes the first of `cuts`, if there is one, and ends with UNAVAILABLE, without a word, once
    it has carried more bytes than that; None lets one through. Every byte that came is committed, but `forgets_bytes`
    takes that many back at a cut. `streams` has the chunks of each upload's stream as (offset, size). Each watch takes
    the first of `watch_cuts` likewise, in events. `away` refuses so many calls of any kind with UNAVAILABLE.
    `num_ended` counts the watches that are over, for whatever reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.datasets: dict[str, training_pb2.Dataset] = {}
        self.files: dict[str, bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.streams: list[list[tuple[int, int]]] = []
        self.cuts: list[int | None] = []
        self.forgets_bytes = 0
        self.jobs: dict[str, training_pb2.TrainingJob] = {}
        self.events: dict[str, list[training_pb2.JobEvent]] = {}
        self.watch_cuts: list[int | None] = []
        self.workers: list[training_pb2.Worker] = []
        self.away = 0
        self.num_ended = 0
        self._happened = Condition()

    def enter(self, name: str, request: Any, context: Any) -> None:
        super().enter(name, request, context)
        if self.away:
            self.away -= 1
            self._cut(context)

    def _cut(self, context: Any) -> NoReturn:
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        raise AssertionError("abort returned")

    def UploadDataset(
        self, request_iterator: Iterator[training_pb2.UploadDatasetRequest], context: Any
    ) -> training_pb2.UploadDatasetResponse:
        header = next(request_iterator).header
        self.enter("UploadDataset", header, context)
        stream: list[tuple[int, int]] = []
        self.streams.append(stream)
        if header.digest in self.datasets:
            return training_pb2.UploadDatasetResponse(dataset=self.datasets[header.digest])
        left = self.cuts.pop(0) if self.cuts else None
        kept = self.uploads.setdefault(header.digest, bytearray())
        for message in request_iterator:
            if message.HasField("finish"):
                return training_pb2.UploadDatasetResponse(dataset=self.finish(header, bytes(kept), context))
            chunk = message.chunk
            if left is not None and len(chunk.data) > left:
                kept += chunk.data[:left]
                del kept[max(0, len(kept) - self.forgets_bytes) :]
                self._cut(context)
            left = None if left is None else left - len(chunk.data)
            self.append(kept, chunk, context)
            stream.append((chunk.offset, len(chunk.data)))
        raise AssertionError("the stream ended without a finish")

    def append(self, kept: bytearray, chunk: training_pb2.DatasetChunk, context: Any) -> None:
        """Keep a chunk."""
        assert len(chunk.data) <= 1 << 20
        if chunk.offset > len(kept):
            self.abort(context, refusal(grpc.StatusCode.OUT_OF_RANGE, "UPLOAD_OFFSET", "chunk.offset"))
        kept[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data

    def finish(self, header: training_pb2.DatasetHeader, data: bytes, context: Any) -> training_pb2.Dataset:
        """Check an upload and make it a dataset."""
        if (found := digest_of(data)) != header.digest or len(data) != header.size_bytes:
            self.abort(context, refusal(grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH", found))
        del self.uploads[header.digest]
        return self.add_dataset(data, header.display_name)

    def add_dataset(self, data: bytes, display_name: str = "") -> training_pb2.Dataset:
        """Keep a dataset, as if it had been uploaded."""
        made = training_pb2.Dataset(
            digest=digest_of(data),
            display_name=display_name,
            format=training_pb2.DATASET_FORMAT_COMPLETION,
            size_bytes=len(data),
            num_samples=data.count(b"\n"),
        )
        made.create_time.FromSeconds(self.now())
        self.datasets[made.digest] = made
        self.files[made.digest] = data
        return made

    def GetDataset(self, request: training_pb2.GetDatasetRequest, context: Any) -> training_pb2.GetDatasetResponse:
        def act() -> training_pb2.GetDatasetResponse:
            if request.digest in self.datasets:
                made = self.datasets[request.digest]
                return training_pb2.GetDatasetResponse(dataset=made, committed_bytes=made.size_bytes)
            if request.digest not in self.uploads:
                self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND", "digest"))
            return training_pb2.GetDatasetResponse(committed_bytes=len(self.uploads[request.digest]))

        return self.do("GetDataset", request, context, act)

    def ListDatasets(
        self, request: training_pb2.ListDatasetsRequest, context: Any
    ) -> training_pb2.ListDatasetsResponse:
        def act() -> training_pb2.ListDatasetsResponse:
            digests, token = page(list(reversed(self.datasets)), request)
            found = [self.datasets[digest] for digest in digests]
            return training_pb2.ListDatasetsResponse(datasets=found, next_page_token=token)

        return self.do("ListDatasets", request, context, act)

    def DeleteDataset(
        self, request: training_pb2.DeleteDatasetRequest, context: Any
    ) -> training_pb2.DeleteDatasetResponse:
        def act() -> training_pb2.DeleteDatasetResponse:
            if self.datasets.pop(request.digest, None) is None:
                self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND", "digest"))
            return training_pb2.DeleteDatasetResponse()

        return self.do("DeleteDataset", request, context, act)

    def CreateTrainingJob(
        self, request: training_pb2.CreateTrainingJobRequest, context: Any
    ) -> training_pb2.CreateTrainingJobResponse:
        def act() -> training_pb2.CreateTrainingJobResponse:
            return training_pb2.CreateTrainingJobResponse(job=self.add_job(request.spec))

        return self.do("CreateTrainingJob", request, context, act)

    def add_job(self, spec: training_pb2.TrainingSpec) -> training_pb2.TrainingJob:
        """Queue a job, as if it had been asked for."""
        job = training_pb2.TrainingJob(
            id=f"job-{len(self.jobs) + 1:016x}", spec=spec, state=training_pb2.JOB_STATE_QUEUED
        )
        job.create_time.FromSeconds(self.now())
        job.base_fingerprint = BASE_FINGERPRINT
        self.jobs[job.id] = job
        self.events[job.id] = []
        change = training_pb2.StateChange(state=training_pb2.JOB_STATE_QUEUED)
        self.happen(job.id, training_pb2.JobEvent(state_change=change))
        return job

    def happen(self, job_id: str, *events: training_pb2.JobEvent) -> None:
        """Let events happen to a job, and change it as they say."""
        job = self.jobs[job_id]
        with self._happened:
            for event in events:
                event.sequence = len(self.events[job_id]) + 1
                event.time.FromSeconds(self.now())
                self.events[job_id].append(event)
                job.last_sequence = event.sequence
                kind = event.WhichOneof("event")
                if kind == "state_change":
                    change = event.state_change
                    job.state, job.reason, job.message = change.state, change.reason, change.message
                elif kind == "published":
                    job.version.CopyFrom(event.published)
                elif kind in ("progress", "data", "evaluation", "base"):
                    getattr(job, kind).CopyFrom(getattr(event, kind))
            self._happened.notify_all()

    def _wake(self) -> None:
        with self._happened:
            self.num_ended += 1
            self._happened.notify_all()

    def _job(self, context: Any, job_id: str) -> training_pb2.TrainingJob:
        if job_id not in self.jobs:
            self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", "id"))
        return self.jobs[job_id]

    def GetTrainingJob(
        self, request: training_pb2.GetTrainingJobRequest, context: Any
    ) -> training_pb2.GetTrainingJobResponse:
        return self.do(
            "GetTrainingJob",
            request,
            context,
            lambda: training_pb2.GetTrainingJobResponse(job=self._job(context, request.id)),
        )

    def ListTrainingJobs(
        self, request: training_pb2.ListTrainingJobsRequest, context: Any
    ) -> training_pb2.ListTrainingJobsResponse:
        def act() -> training_pb2.ListTrainingJobsResponse:
            wanted = [one.id for one in reversed(self.jobs.values()) if request.state in (0, one.state)]
            ids, token = page(wanted, request)
            return training_pb2.ListTrainingJobsResponse(jobs=[self.jobs[one] for one in ids], next_page_token=token)

        return self.do("ListTrainingJobs", request, context, act)

    def CancelTrainingJob(
        self, request: training_pb2.CancelTrainingJobRequest, context: Any
    ) -> training_pb2.CancelTrainingJobResponse:
        def act() -> training_pb2.CancelTrainingJobResponse:
            job = self._job(context, request.id)
            if job.state in ENDS:
                self.abort(context, refusal(grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED", "id"))
            job.cancel_requested = True
            if job.state == training_pb2.JOB_STATE_QUEUED:
                change = training_pb2.StateChange(state=training_pb2.JOB_STATE_CANCELLED)
                self.happen(job.id, training_pb2.JobEvent(state_change=change))
            return training_pb2.CancelTrainingJobResponse(job=job)

        return self.do("CancelTrainingJob", request, context, act)

    def WatchTrainingJob(
        self, request: training_pb2.WatchTrainingJobRequest, context: Any
    ) -> Iterator[training_pb2.WatchTrainingJobResponse]:
        self.enter("WatchTrainingJob", request, context)
        job, events = self._job(context, request.id), self.events[request.id]
        place = request.after_sequence
        left = self.watch_cuts.pop(0) if self.watch_cuts else None
        context.add_callback(self._wake)
        if place > len(events):
            self.abort(context, refusal(grpc.StatusCode.OUT_OF_RANGE, "NO_SUCH_EVENT", "after_sequence"))
        while True:
            with self._happened:
                while len(events) == place and left != 0 and job.state not in ENDS and context.is_active():
                    self._happened.wait(20)
            if left == 0:
                self._cut(context)
            if len(events) == place:
                return
            left = None if left is None else left - 1
            yield training_pb2.WatchTrainingJobResponse(event=events[place])
            place += 1

    def GetTrainingCapabilities(
        self, request: training_pb2.GetTrainingCapabilitiesRequest, context: Any
    ) -> training_pb2.GetTrainingCapabilitiesResponse:
        def act() -> training_pb2.GetTrainingCapabilitiesResponse:
            states = [one.state for one in self.jobs.values()]
            return training_pb2.GetTrainingCapabilitiesResponse(
                methods=[training_pb2.TRAINING_METHOD_LORA, training_pb2.TRAINING_METHOD_S2FT],
                workers=self.workers,
                max_dataset_bytes=1 << 30,
                max_datasets=1000,
                queued_jobs=states.count(training_pb2.JOB_STATE_QUEUED),
                running_jobs=states.count(training_pb2.JOB_STATE_RUNNING),
            )

        return self.do("GetTrainingCapabilities", request, context, act)


def digest_of(data: bytes) -> str:
    """Return the name of a dataset."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@contextmanager
def serving_training(fake: FakeTrainingService, certificates: Certificates | None = None) -> Iterator[str]:
    """Serve on loopback while the block runs, by TLS where there are certificates; yield the address."""
    with serving_service(add_TrainingServiceServicer_to_server, fake, certificates) as address:
        yield address
