"""Uploads of both clients: an adapter's files on their way to a server, over as many connections as it takes.

Owns how an upload goes on after a cut; what it says is in `upload_plan`, how messages are streamed in `sending`, when
it is given up in `resuming`. At most a few pieces of a file are in memory.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from functools import partial

from motley_client import convert_adapters as convert
from motley_client.adapter_calls import AdapterCalls, AsyncAdapterCalls
from motley_client.errors import MotleyClientError, NotFoundError
from motley_client.resuming import Resuming
from motley_client.sending import on_threads, send, send_awaiting
from motley_client.telling import ProgressCall
from motley_client.types_adapters import AdapterKind, AdapterVersion, UploadPhase
from motley_client.upload_plan import Standing, UploadPlan


class UploadCalls(AdapterCalls):
    """Upload adapters, blocking."""

    def upload_adapter(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        aliases: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        kind: AdapterKind | None = None,
        upload_id: str | None = None,
        progress: ProgressCall | None = None,
        timeout: float | None = None,
    ) -> AdapterVersion:
        """Publish the adapter in a directory, and return the version that it became.

        Semantics: without `aliases`, `default` is pointed at it. A connection that is cut is taken up where the server
        has got to; so is, by the same call, an upload whose client ended, unless the aliases moved meanwhile. Bytes
        that are the newest version already stay that version. `upload_id` is chosen from all this unless given; under
        a given one, what was done before is answered, and not done again. `timeout` is for the whole.
        Effects: `progress` is called from a thread of gRPC's while bytes are sent.
        Raises: MotleyClientError for what the server refuses; InvalidArgumentError for a directory that holds no
        adapter, or not as plain files; OSError.
        """
        plan = UploadPlan(name, directory, aliases, labels, kind, progress)
        for done in plan.hashing():
            plan.tell(UploadPhase.HASHING, done)
        resuming = Resuming(self._effective(timeout))
        before = None
        if upload_id is not None:
            plan.settle(upload_id)
        else:
            before = self._standing(plan, resuming)
            plan.settle_by(before)
        while True:
            try:
                committed = self._committed(plan.upload_id, resuming)
                resuming.reached(sum(committed.values()))
                version = self._send(plan, committed, resuming)
                if before is None or before.has_every_alias:
                    return version
                if self._standing(plan, resuming).has_every_alias:
                    return version
                # Nothing tells a name that never was from one that is gone: this answered a push that was undone since.
                before = None
                plan.settle(uuid.uuid4().hex)
            except MotleyClientError as error:
                pause = resuming.pause_after(error)
                if pause is None:
                    raise
                time.sleep(pause)

    def _standing(self, plan: UploadPlan, resuming: Resuming) -> Standing:
        """Ask how the adapter stands, by its newest version: the name alone is unknown where `default` is missing."""
        name = plan.adapter_name
        try:
            versions = self.list_adapter_versions(name, page_size=1, timeout=resuming.seconds_left())
            newest = next((one.version for one in versions), 0)
            found = self.get_adapter(f"{name}@{newest}", timeout=resuming.seconds_left()) if newest else None
        except NotFoundError:
            found = None
        return plan.standing(found)

    def _committed(self, upload_id: str, resuming: Resuming) -> Mapping[str, int]:
        try:
            return self.get_upload(upload_id, timeout=resuming.seconds_left()).committed_bytes
        except NotFoundError:
            return {}

    def _send(self, plan: UploadPlan, committed: Mapping[str, int], resuming: Resuming) -> AdapterVersion:
        response = send(
            self._adapters.UploadAdapter,
            plan.messages(committed),
            partial(plan.tell, UploadPhase.SENDING),
            resuming.seconds_left(),
            self._endpoint,
        )
        plan.tell(UploadPhase.SENDING, plan.total_bytes)
        return convert.version(response.version)


class AsyncUploadCalls(AsyncAdapterCalls):
    """Upload adapters, awaiting; as UploadCalls otherwise."""

    async def upload_adapter(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        aliases: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        kind: AdapterKind | None = None,
        upload_id: str | None = None,
        progress: ProgressCall | None = None,
        timeout: float | None = None,
    ) -> AdapterVersion:
        """Publish the adapter in a directory, and return the version that it became.

        Semantics: as UploadCalls.upload_adapter, but files are read on threads, and `progress` is called on the loop.
        Raises: as UploadCalls.upload_adapter.
        """
        plan = UploadPlan(name, directory, aliases, labels, kind, progress)
        async for done in on_threads(plan.hashing()):
            plan.tell(UploadPhase.HASHING, done)
        resuming = Resuming(self._effective(timeout))
        before = None
        if upload_id is not None:
            plan.settle(upload_id)
        else:
            before = await self._standing(plan, resuming)
            plan.settle_by(before)
        while True:
            try:
                committed = await self._committed(plan.upload_id, resuming)
                resuming.reached(sum(committed.values()))
                version = await self._send(plan, committed, resuming)
                if before is None or before.has_every_alias:
                    return version
                if (await self._standing(plan, resuming)).has_every_alias:
                    return version
                # Nothing tells a name that never was from one that is gone: this answered a push that was undone since.
                before = None
                plan.settle(uuid.uuid4().hex)
            except MotleyClientError as error:
                pause = resuming.pause_after(error)
                if pause is None:
                    raise
                await asyncio.sleep(pause)

    async def _standing(self, plan: UploadPlan, resuming: Resuming) -> Standing:
        """Ask how the adapter stands; see UploadCalls."""
        name = plan.adapter_name
        try:
            request = convert.list_versions_request(name, 1)
            listed = await self._call(self._adapters.ListAdapterVersions, request, resuming.seconds_left())
            newest = max((one.version for one in listed.versions), default=0)
            found = await self.get_adapter(f"{name}@{newest}", timeout=resuming.seconds_left()) if newest else None
        except NotFoundError:
            found = None
        return plan.standing(found)

    async def _committed(self, upload_id: str, resuming: Resuming) -> Mapping[str, int]:
        try:
            return (await self.get_upload(upload_id, timeout=resuming.seconds_left())).committed_bytes
        except NotFoundError:
            return {}

    async def _send(self, plan: UploadPlan, committed: Mapping[str, int], resuming: Resuming) -> AdapterVersion:
        response = await send_awaiting(
            self._adapters.UploadAdapter,
            plan.messages(committed),
            partial(plan.tell, UploadPhase.SENDING),
            resuming.seconds_left(),
            self._endpoint,
        )
        plan.tell(UploadPhase.SENDING, plan.total_bytes)
        return convert.version(response.version)
