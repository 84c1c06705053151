"""The calls of a worker: those under its own key, and those under the token of a lease.

Owns how a worker asks for jobs, fetches their data and reports; publishing is UploadAdapter's, under the token. There
is no blocking twin: a worker must hear its job while it reports. What is said is in `convert_worker`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from motley.v1.training_pb2_grpc import WorkerServiceStub

from motley_client import convert_worker as convert
from motley_client.connection import AsyncConnection
from motley_client.dataset_arrival import DatasetArrival
from motley_client.download import AsyncDownloadCalls
from motley_client.errors import DataLossError, MotleyClientError, OutOfRangeError, from_rpc_error
from motley_client.resuming import Resuming
from motley_client.types_worker import JobEnding, Lease, WorkerEvent, WorkerTerms

if TYPE_CHECKING:  # of the stubs alone
    from motley.v1.training_pb2_grpc import WorkerServiceAsyncStub

ANSWER_SECONDS = 15.0  # what an answer may take beyond the time that it was asked to wait


class WorkerClient(AsyncConnection):
    """Ask for jobs, under a key of role worker."""

    @cached_property
    def _workers(self) -> WorkerServiceAsyncStub:
        return WorkerServiceStub(self._channel)

    async def register_worker(
        self,
        name: str,
        methods: Iterable[str],
        base_fingerprint: str,
        device: str,
        version: str,
        *,
        timeout: float | None = None,
    ) -> WorkerTerms:
        """Tell what a worker can do, in the place of what was told before under its name."""
        request = convert.register_request(name, methods, base_fingerprint, device, version)
        return convert.terms(await self._call(self._workers.RegisterWorker, request, timeout))

    async def lease_job(self, worker: str, wait_seconds: float) -> Lease | None:
        """Wait for a job and return it in a lease; None if there was none in that time."""
        request = convert.lease_request(worker, wait_seconds)
        response = await self._call(self._workers.LeaseJob, request, wait_seconds + ANSWER_SECONDS)
        return convert.lease(response)


class LeaseClient(AsyncDownloadCalls):
    """Fetch what a job needs, report, and publish, under the token of its lease."""

    @cached_property
    def _workers(self) -> WorkerServiceAsyncStub:
        return WorkerServiceStub(self._channel)

    async def report_job(
        self,
        events: Iterable[WorkerEvent],
        num_reported: int,
        ending: JobEnding | None = None,
        *,
        timeout: float | None = None,
    ) -> bool:
        """Tell what happened after the first `num_reported` events, keep the lease, and return whether to cancel."""
        request = convert.report_request(events, num_reported, ending)
        return (await self._call(self._workers.ReportJob, request, timeout)).cancel_requested

    async def fetch_dataset(self, digest: str, path: Path, *, timeout: float | None = None) -> None:
        """Write a dataset of the job to a file, which is there once it is whole and its checksum right.

        Semantics: a connection that is cut, and an attempt that ended before, are taken up where they broke.
        Raises: MotleyClientError for what the server refuses; DataLossError (reason=CHECKSUM_MISMATCH); OSError.
        """
        resuming = Resuming(self._effective(timeout))
        with DatasetArrival(digest, path) as arrival:
            await asyncio.to_thread(arrival.take_up)
            while True:
                try:
                    if not arrival.is_right:
                        await self._receive_dataset(arrival, resuming)
                    return await asyncio.to_thread(arrival.settle)
                except MotleyClientError as error:
                    if isinstance(error, DataLossError | OutOfRangeError):
                        may_be_older = arrival.began_with_some  # what lay there may have been damaged since
                        await asyncio.to_thread(arrival.forget)
                        if may_be_older:
                            continue
                    resuming.reached(arrival.num_bytes)
                    pause = resuming.pause_after(error)
                    if pause is None:
                        raise
                    await asyncio.sleep(pause)

    async def _receive_dataset(self, arrival: DatasetArrival, resuming: Resuming) -> None:
        call = self._workers.FetchDataset(
            convert.fetch_request(arrival.digest, arrival.num_bytes),
            timeout=resuming.seconds_left(),
            metadata=self._endpoint.metadata,
        )
        try:
            async for response in call:
                await asyncio.to_thread(arrival.take, response.data)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._endpoint.address) from error
        finally:
            call.cancel()
