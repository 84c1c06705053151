"""The calls that manage datasets and training jobs, of both clients side by side.

Owns what is asked of TrainingService but for the bytes of datasets, which `dataset_upload` carries, and for watching,
which is in `job_watch`; what calls say is in `convert_training`, how they wait and end in `connection`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from motley.v1 import training_pb2
from motley.v1.training_pb2_grpc import TrainingServiceStub

from motley_client import convert_training as convert
from motley_client.connection import AsyncConnection, Connection
from motley_client.types_training import Dataset, DatasetStatus, JobState, TrainingCapabilities, TrainingJob
from motley_client.types_training_spec import TrainingSpec

if TYPE_CHECKING:  # of the stubs alone
    from motley.v1.training_pb2_grpc import TrainingServiceAsyncStub


class TrainingCalls(Connection):
    """Manage datasets and training jobs, blocking.

    Semantics: a change that meets an unavailable server is tried again under the one request id of its call, so that it
    happens once; `request_id` stands in for that id where a caller repeats a call by itself.
    """

    @cached_property
    def _training(self) -> TrainingServiceStub:
        return TrainingServiceStub(self._channel)

    def get_dataset(self, digest: str, *, timeout: float | None = None) -> DatasetStatus:
        """Return a dataset, or how much of one that is on its way is safe."""
        request = convert.get_dataset_request(digest)
        return convert.dataset_status(self._call(self._training.GetDataset, request, timeout))

    def list_datasets(self, *, page_size: int | None = None, timeout: float | None = None) -> Iterator[Dataset]:
        """Yield every dataset of one's own, newest first, fetching a page when the iteration gets there."""
        request = convert.list_datasets_request(page_size)
        while True:
            response = self._call(self._training.ListDatasets, request, timeout)
            yield from map(convert.dataset, response.datasets)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def delete_dataset(self, digest: str, *, request_id: str | None = None, timeout: float | None = None) -> None:
        """Have the server forget a dataset that no job needs, or an upload of one that is not finished."""
        self._call(self._training.DeleteDataset, convert.delete_dataset_request(digest, request_id), timeout)

    def create_training_job(
        self, spec: TrainingSpec, *, request_id: str | None = None, timeout: float | None = None
    ) -> TrainingJob:
        """Queue a job, and return it."""
        request = convert.create_job_request(spec, request_id)
        return convert.job(self._call(self._training.CreateTrainingJob, request, timeout).job)

    def get_training_job(self, job_id: str, *, timeout: float | None = None) -> TrainingJob:
        """Return a job as it stands."""
        request = convert.get_job_request(job_id)
        return convert.job(self._call(self._training.GetTrainingJob, request, timeout).job)

    def list_training_jobs(
        self, state: JobState | None = None, *, page_size: int | None = None, timeout: float | None = None
    ) -> Iterator[TrainingJob]:
        """Yield every job of one's own, in one state or in all, newest first, page by page as the iteration goes."""
        request = convert.list_jobs_request(state, page_size)
        while True:
            response = self._call(self._training.ListTrainingJobs, request, timeout)
            yield from map(convert.job, response.jobs)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def cancel_training_job(
        self, job_id: str, *, request_id: str | None = None, timeout: float | None = None
    ) -> TrainingJob:
        """End a queued job at once, or a running one after the step that it is at; return it as it stands then."""
        request = convert.cancel_job_request(job_id, request_id)
        return convert.job(self._call(self._training.CancelTrainingJob, request, timeout).job)

    def training_capabilities(self, *, timeout: float | None = None) -> TrainingCapabilities:
        """Return what jobs can ask for, and who is there to do them."""
        request = training_pb2.GetTrainingCapabilitiesRequest()
        return convert.capabilities(self._call(self._training.GetTrainingCapabilities, request, timeout))


class AsyncTrainingCalls(AsyncConnection):
    """Manage datasets and training jobs, awaiting; as TrainingCalls otherwise."""

    @cached_property
    def _training(self) -> TrainingServiceAsyncStub:
        return TrainingServiceStub(self._channel)

    async def get_dataset(self, digest: str, *, timeout: float | None = None) -> DatasetStatus:
        """Return a dataset, or how much of one that is on its way is safe."""
        request = convert.get_dataset_request(digest)
        return convert.dataset_status(await self._call(self._training.GetDataset, request, timeout))

    async def list_datasets(
        self, *, page_size: int | None = None, timeout: float | None = None
    ) -> AsyncIterator[Dataset]:
        """Yield every dataset of one's own, newest first, fetching a page when the iteration gets there."""
        request = convert.list_datasets_request(page_size)
        while True:
            response = await self._call(self._training.ListDatasets, request, timeout)
            for message in response.datasets:
                yield convert.dataset(message)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def delete_dataset(self, digest: str, *, request_id: str | None = None, timeout: float | None = None) -> None:
        """Have the server forget a dataset that no job needs, or an upload of one that is not finished."""
        await self._call(self._training.DeleteDataset, convert.delete_dataset_request(digest, request_id), timeout)

    async def create_training_job(
        self, spec: TrainingSpec, *, request_id: str | None = None, timeout: float | None = None
    ) -> TrainingJob:
        """Queue a job, and return it."""
        request = convert.create_job_request(spec, request_id)
        return convert.job((await self._call(self._training.CreateTrainingJob, request, timeout)).job)

    async def get_training_job(self, job_id: str, *, timeout: float | None = None) -> TrainingJob:
        """Return a job as it stands."""
        request = convert.get_job_request(job_id)
        return convert.job((await self._call(self._training.GetTrainingJob, request, timeout)).job)

    async def list_training_jobs(
        self, state: JobState | None = None, *, page_size: int | None = None, timeout: float | None = None
    ) -> AsyncIterator[TrainingJob]:
        """Yield every job of one's own, in one state or in all, newest first, page by page as the iteration goes."""
        request = convert.list_jobs_request(state, page_size)
        while True:
            response = await self._call(self._training.ListTrainingJobs, request, timeout)
            for message in response.jobs:
                yield convert.job(message)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def cancel_training_job(
        self, job_id: str, *, request_id: str | None = None, timeout: float | None = None
    ) -> TrainingJob:
        """End a queued job at once, or a running one after the step that it is at; return it as it stands then."""
        request = convert.cancel_job_request(job_id, request_id)
        return convert.job((await self._call(self._training.CancelTrainingJob, request, timeout)).job)

    async def training_capabilities(self, *, timeout: float | None = None) -> TrainingCapabilities:
        """Return what jobs can ask for, and who is there to do them."""
        request = training_pb2.GetTrainingCapabilitiesRequest()
        return convert.capabilities(await self._call(self._training.GetTrainingCapabilities, request, timeout))
