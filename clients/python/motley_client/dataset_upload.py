"""Uploads of datasets by both clients, over as many connections as it takes.

Owns how an upload goes on after a cut; what it says is in `dataset_plan`, how messages are streamed in `sending`, when
it is given up in `resuming`. Of a file, at most a few pieces are in memory.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from motley_client import convert_training as convert
from motley_client.dataset_plan import DatasetPlan, DatasetSource
from motley_client.errors import MotleyClientError, NotFoundError
from motley_client.resuming import Resuming
from motley_client.sending import on_threads, send, send_awaiting
from motley_client.telling import ProgressCall
from motley_client.training_calls import AsyncTrainingCalls, TrainingCalls
from motley_client.types_adapters import UploadPhase
from motley_client.types_training import Dataset


class DatasetCalls(TrainingCalls):
    """Upload datasets, blocking."""

    def upload_dataset(
        self,
        source: DatasetSource,
        display_name: str | None = None,
        *,
        progress: ProgressCall | None = None,
        timeout: float | None = None,
    ) -> Dataset:
        """Bring a dataset to the server, unless it is there, and return it.

        Semantics: `source` is the path of a JSONL file, or samples: mappings, or lines of JSON. A file's name is its
        display name unless one is given. A connection that is cut is taken up where the server has got to, and so is
        an upload whose client ended, by the same call. `timeout` is for the whole.
        Effects: `progress` is called from a thread of gRPC's while bytes are sent.
        Raises: MotleyClientError for what the server refuses, lines by their number; InvalidArgumentError for what is
        no file and no lines; OSError.
        """
        plan = DatasetPlan(source, display_name, progress)
        for done in plan.hashing():
            plan.tell(UploadPhase.HASHING, done)
        resuming = Resuming(self._effective(timeout))
        while True:
            try:
                committed = self._arrived(plan.digest, resuming)
                resuming.reached(committed)
                return self._send_dataset(plan, committed, resuming)
            except MotleyClientError as error:
                pause = resuming.pause_after(error)
                if pause is None:
                    raise
                time.sleep(pause)

    def _arrived(self, digest: str, resuming: Resuming) -> int:
        try:
            return self.get_dataset(digest, timeout=resuming.seconds_left()).committed_bytes
        except NotFoundError:
            return 0

    def _send_dataset(self, plan: DatasetPlan, committed: int, resuming: Resuming) -> Dataset:
        response = send(
            self._training.UploadDataset,
            plan.messages(committed),
            partial(plan.tell, UploadPhase.SENDING),
            resuming.seconds_left(),
            self._endpoint,
        )
        plan.tell(UploadPhase.SENDING, plan.total_bytes)
        return convert.dataset(response.dataset)


class AsyncDatasetCalls(AsyncTrainingCalls):
    """Upload datasets, awaiting; as DatasetCalls otherwise."""

    async def upload_dataset(
        self,
        source: DatasetSource,
        display_name: str | None = None,
        *,
        progress: ProgressCall | None = None,
        timeout: float | None = None,
    ) -> Dataset:
        """Bring a dataset to the server, unless it is there, and return it.

        Semantics: as DatasetCalls.upload_dataset, but files are read on threads, and `progress` is called on the loop.
        Raises: as DatasetCalls.upload_dataset.
        """
        plan = DatasetPlan(source, display_name, progress)
        async for done in on_threads(plan.hashing()):
            plan.tell(UploadPhase.HASHING, done)
        resuming = Resuming(self._effective(timeout))
        while True:
            try:
                committed = await self._arrived(plan.digest, resuming)
                resuming.reached(committed)
                return await self._send_dataset(plan, committed, resuming)
            except MotleyClientError as error:
                pause = resuming.pause_after(error)
                if pause is None:
                    raise
                await asyncio.sleep(pause)

    async def _arrived(self, digest: str, resuming: Resuming) -> int:
        try:
            return (await self.get_dataset(digest, timeout=resuming.seconds_left())).committed_bytes
        except NotFoundError:
            return 0

    async def _send_dataset(self, plan: DatasetPlan, committed: int, resuming: Resuming) -> Dataset:
        response = await send_awaiting(
            self._training.UploadDataset,
            plan.messages(committed),
            partial(plan.tell, UploadPhase.SENDING),
            resuming.seconds_left(),
            self._endpoint,
        )
        plan.tell(UploadPhase.SENDING, plan.total_bytes)
        return convert.dataset(response.dataset)
