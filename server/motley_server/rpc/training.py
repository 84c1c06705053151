"""TrainingService: tenants' datasets, and the jobs that make adapters of them.

Reads a request, has the desks or the registry do it, and writes the answer. Who may call is decided before
(`access.py`), whether a spec makes sense in `training_spec.py`. Runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Final

import grpc
from motley.v1 import training_pb2, training_pb2_grpc

from motley_server.asked import Caller
from motley_server.errors import NotFoundError
from motley_server.facts import ServerFacts
from motley_server.registry.adapters import Adapters
from motley_server.registry.holdings import MAX_DATASETS
from motley_server.registry.job_records import JobRecord, JobState
from motley_server.rpc.call import current_caller, note
from motley_server.rpc.convert_training import METHODS, STATES, dataset_to, event_to, job_to, worker_to
from motley_server.rpc.dataset_stream import receive_dataset
from motley_server.rpc.training_orders import TrainingOrders
from motley_server.training.keeper import HEARD_OF
from motley_server.training.opening import Training

Context = grpc.aio.ServicerContext[Any, Any]

JOBS_A_TURN: Final = 8  # written before others have theirs on the event loop


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """Take in datasets; queue, show and end jobs."""

    def __init__(
        self, training: Training, adapters: Adapters, facts: ServerFacts, count: Callable[[Caller], None]
    ) -> None:
        """Make the service; `count` counts a call, or refuses it."""
        self._run = training.database.run
        self._training = training
        self._datasets = training.dataset_desk
        self._jobs = training.job_desk
        self._orders = TrainingOrders(training, adapters, facts.base)
        self._count = count

    async def UploadDataset(  # noqa: N802
        self, request_iterator: AsyncIterator[training_pb2.UploadDatasetRequest], context: Context
    ) -> training_pb2.UploadDatasetResponse:
        """Take a dataset in, and answer when its lines are checked."""
        record = await receive_dataset(self._datasets, request_iterator, self._counted().tenant_id)
        return training_pb2.UploadDatasetResponse(dataset=dataset_to(record))

    async def GetDataset(  # noqa: N802
        self, request: training_pb2.GetDatasetRequest, context: Context
    ) -> training_pb2.GetDatasetResponse:
        """Return a dataset, or say how far its upload has come."""
        owner = self._counted().tenant_id
        try:
            record = await self._run(self._training.datasets.get, owner, request.digest)
        except NotFoundError:
            committed = await self._datasets.committed(owner, request.digest)
            return training_pb2.GetDatasetResponse(committed_bytes=committed)
        return training_pb2.GetDatasetResponse(dataset=dataset_to(record), committed_bytes=record.size_bytes)

    async def ListDatasets(  # noqa: N802
        self, request: training_pb2.ListDatasetsRequest, context: Context
    ) -> training_pb2.ListDatasetsResponse:
        """Return datasets by pages."""
        owner = self._counted().tenant_id
        page = await self._run(self._training.datasets.list, owner, request.page_size, request.page_token)
        return training_pb2.ListDatasetsResponse(
            datasets=[dataset_to(record) for record in page.items], next_page_token=page.next_page_token
        )

    async def DeleteDataset(  # noqa: N802
        self, request: training_pb2.DeleteDatasetRequest, context: Context
    ) -> training_pb2.DeleteDatasetResponse:
        """Forget a dataset, or an upload of one."""
        caller = self._counted()
        await self._datasets.delete(caller.tenant_id, request.digest, **_once(request, caller))
        return training_pb2.DeleteDatasetResponse()

    async def CreateTrainingJob(  # noqa: N802
        self, request: training_pb2.CreateTrainingJobRequest, context: Context
    ) -> training_pb2.CreateTrainingJobResponse:
        """Queue a job."""
        caller = self._counted()
        note(adapter_name=request.spec.publish.adapter_name[:140], dataset=request.spec.dataset[:80])
        job = await self._orders.order(request.spec, caller, **_once(request, caller))
        note(job=job.id)
        return training_pb2.CreateTrainingJobResponse(job=job_to(job))

    async def GetTrainingJob(  # noqa: N802
        self, request: training_pb2.GetTrainingJobRequest, context: Context
    ) -> training_pb2.GetTrainingJobResponse:
        """Return a job."""
        job = await self._run(self._training.jobs.get, self._counted().tenant_id, request.id)
        return training_pb2.GetTrainingJobResponse(job=job_to(job))

    async def ListTrainingJobs(  # noqa: N802
        self, request: training_pb2.ListTrainingJobsRequest, context: Context
    ) -> training_pb2.ListTrainingJobsResponse:
        """Return jobs by pages."""
        owner, state = self._counted().tenant_id, STATES.get(request.state)
        page = await self._run(self._training.jobs.list, owner, state, request.page_size, request.page_token)
        return training_pb2.ListTrainingJobsResponse(
            jobs=await _written(page.items), next_page_token=page.next_page_token
        )

    async def CancelTrainingJob(  # noqa: N802
        self, request: training_pb2.CancelTrainingJobRequest, context: Context
    ) -> training_pb2.CancelTrainingJobResponse:
        """End a job, or have it end at its next step."""
        caller = self._counted()
        job = await self._jobs.cancel(caller.tenant_id, request.id, **_once(request, caller))
        return training_pb2.CancelTrainingJobResponse(job=job_to(job))

    async def WatchTrainingJob(  # noqa: N802
        self, request: training_pb2.WatchTrainingJobRequest, context: Context
    ) -> AsyncIterator[training_pb2.WatchTrainingJobResponse]:
        """Send a job's events as they come."""
        owner = self._counted().tenant_id
        async with aclosing(self._jobs.watch(owner, request.id, request.after_sequence)) as events:
            async for event in events:
                yield training_pb2.WatchTrainingJobResponse(event=event_to(event))

    async def GetTrainingCapabilities(  # noqa: N802
        self, request: training_pb2.GetTrainingCapabilitiesRequest, context: Context
    ) -> training_pb2.GetTrainingCapabilitiesResponse:
        """Say what jobs can ask for, and who is there to do them."""
        self._counted()
        workers = await self._run(self._training.workers.list, HEARD_OF)
        counts = await self._run(self._training.jobs.counts)
        return training_pb2.GetTrainingCapabilitiesResponse(
            methods=list(METHODS),  # type: ignore[arg-type]
            workers=[worker_to(worker) for worker in workers],
            max_dataset_bytes=self._training.limits.max_dataset_bytes,
            max_datasets=MAX_DATASETS,
            queued_jobs=counts[JobState.QUEUED],
            running_jobs=counts[JobState.RUNNING],
        )

    def _counted(self) -> Caller:
        """Count the call that runs, and return who makes it."""
        caller = current_caller()
        self._count(caller)
        return caller


def _once(request: Any, caller: Caller) -> dict[str, str]:
    """Return what makes a change happen once: its id, in the namespace of the caller's tenant."""
    return {"request_id": request.request_id, "scope": caller.tenant_id}


async def _written(records: Iterable[JobRecord]) -> list[training_pb2.TrainingJob]:
    """Write jobs, whose texts take a while to read, and let others have their turn between them."""
    jobs = []
    for number, record in enumerate(records, 1):
        jobs.append(job_to(record))
        if number % JOBS_A_TURN == 0:
            await asyncio.sleep(0)
    return jobs
