"""Watching a training job by both clients: its events as they come, over as many connections as it takes.

Owns how a watch goes on behind the last event that came; when it is given up is in `resuming`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator

import grpc
from motley.v1 import training_pb2

from motley_client import convert_training as convert
from motley_client.dataset_upload import AsyncDatasetCalls, DatasetCalls
from motley_client.errors import MotleyClientError, from_rpc_error
from motley_client.resuming import Resuming
from motley_client.types_training import JobEvent

PATIENCE_SECONDS = 600.0  # a server that is moved or restarted is back by then


class WatchCalls(DatasetCalls):
    """Watch training jobs, blocking."""

    def watch_training_job(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        patience: float = PATIENCE_SECONDS,
        timeout: float | None = None,
    ) -> Generator[JobEvent, None, None]:
        """Yield a job's events behind one of them, in their order, as they come, and end after its last.

        Semantics: a server that goes away once it has answered is asked again behind the last event that came, until it
        is back or has been away for `patience`. `timeout` is for the whole. Closing the generator ends the watch, and
        not the job.
        Units: `patience` in seconds.
        """
        request = convert.watch_job_request(job_id, after_sequence)
        return self._watch(request, Resuming(self._effective(timeout), patience))

    def _watch(
        self, request: training_pb2.WatchTrainingJobRequest, resuming: Resuming
    ) -> Generator[JobEvent, None, None]:
        while True:
            try:
                # A watch says nothing while nothing happens: that the server is there is for another call to tell.
                self.get_training_job(request.id, timeout=resuming.seconds_left())
                resuming.answered()
                call = self._training.WatchTrainingJob(
                    request, timeout=resuming.seconds_left(), metadata=self._endpoint.metadata
                )
                try:
                    for response in call:
                        event = convert.job_event(response.event)
                        request.after_sequence = event.sequence
                        resuming.reached(event.sequence)
                        yield event
                    return
                except grpc.RpcError as error:
                    raise from_rpc_error(error, self._endpoint.address) from error
                finally:
                    call.cancel()
            except MotleyClientError as error:
                pause = resuming.pause_after(error)
                if pause is None:
                    raise
                time.sleep(pause)


class AsyncWatchCalls(AsyncDatasetCalls):
    """Watch training jobs, awaiting; as WatchCalls otherwise."""

    def watch_training_job(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        patience: float = PATIENCE_SECONDS,
        timeout: float | None = None,
    ) -> AsyncGenerator[JobEvent, None]:
        """Yield a job's events as WatchCalls.watch_training_job does; see there."""
        request = convert.watch_job_request(job_id, after_sequence)
        return self._watch(request, Resuming(self._effective(timeout), patience))

    async def _watch(
        self, request: training_pb2.WatchTrainingJobRequest, resuming: Resuming
    ) -> AsyncGenerator[JobEvent, None]:
        while True:
            try:
                await self.get_training_job(request.id, timeout=resuming.seconds_left())
                resuming.answered()
                call = self._training.WatchTrainingJob(
                    request, timeout=resuming.seconds_left(), metadata=self._endpoint.metadata
                )
                try:
                    async for response in call:
                        event = convert.job_event(response.event)
                        request.after_sequence = event.sequence
                        resuming.reached(event.sequence)
                        yield event
                    return
                except grpc.RpcError as error:
                    raise from_rpc_error(error, self._endpoint.address) from error
                finally:
                    call.cancel()
            except MotleyClientError as error:
                pause = resuming.pause_after(error)
                if pause is None:
                    raise
                await asyncio.sleep(pause)
