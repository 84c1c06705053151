"""AdapterService: tenants' adapters, from the upload to the deletion.

Reads a request, has the library or the registry do it, and writes the answer as the caller may see it. Who may call is
decided before (`access.py`). Runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from motley.v1 import adapter_pb2, adapter_pb2_grpc

from motley_server.asked import Caller, Role
from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.library.control import AdapterControl, DownloadPart, FileChunk
from motley_server.library.publishing import AdapterRegistry
from motley_server.library.sets import read_reference
from motley_server.library.uploads import UploadDesk
from motley_server.library.whereabouts import Whereabouts
from motley_server.registry.bundle_files import FILE_NAMES
from motley_server.registry.leases import Leases
from motley_server.registry.names import NAME_RULE, PUBLIC_OWNER, AdapterReference, is_name
from motley_server.registry.ownership import adapter_not_found
from motley_server.registry.records import AdapterVersion
from motley_server.rpc.call import current_caller, note
from motley_server.rpc.convert_adapters import (
    adapter_to,
    alias_to,
    file_to,
    timestamp_to,
    version_to,
    visibility_from,
)
from motley_server.rpc.lease_scope import check_adapter, check_download, check_upload, narrowed
from motley_server.rpc.upload_stream import Terms, receive_upload

Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_WAIT_SECONDS = 30.0
MAX_WAIT = timedelta(days=1)
MAX_NOTED_TENANTS = 20  # in a line of the audit


@dataclass(frozen=True, slots=True)
class AdapterLibrary:
    """Who keeps adapters, who takes them in and who changes them, and where one is just now.

    Semantics: without `leases` there is no training, and no caller with a lease.
    """

    registry: AdapterRegistry
    desk: UploadDesk
    control: AdapterControl
    whereabouts: Callable[[AdapterVersion], Whereabouts]
    leases: Leases | None = None


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """Take in, name, share, send back and delete adapters."""

    def __init__(self, library: AdapterLibrary, count: Callable[[Caller], None]) -> None:
        """Make the service; `count` counts a call, or refuses it."""
        self._run = library.registry.database.run
        self._adapters = library.registry.adapters
        self._uploads = library.registry.uploads
        self._desk = library.desk
        self._control = library.control
        self._whereabouts = library.whereabouts
        self._leases = library.leases
        self._count = count

    async def UploadAdapter(  # noqa: N802
        self, request_iterator: AsyncIterator[adapter_pb2.UploadAdapterRequest], context: Context
    ) -> adapter_pb2.UploadAdapterResponse:
        """Take an adapter in, and answer when it is a version."""
        caller = self._counted()
        version = await receive_upload(self._desk, request_iterator, caller, self._terms(caller))
        return adapter_pb2.UploadAdapterResponse(version=self._write(version, caller))

    async def GetUpload(  # noqa: N802
        self, request: adapter_pb2.GetUploadRequest, context: Context
    ) -> adapter_pb2.GetUploadResponse:
        """Say how far an upload has come."""
        self._counted()
        committed, expires = await self._desk.committed(*await self._begun(request.upload_id))
        return adapter_pb2.GetUploadResponse(
            upload_id=request.upload_id, committed_bytes=committed, expire_time=timestamp_to(expires)
        )

    async def AbortUpload(  # noqa: N802
        self, request: adapter_pb2.AbortUploadRequest, context: Context
    ) -> adapter_pb2.AbortUploadResponse:
        """Forget an upload."""
        self._counted()
        await self._desk.abort(*await self._begun(request.upload_id))
        return adapter_pb2.AbortUploadResponse()

    async def GetAdapter(  # noqa: N802
        self, request: adapter_pb2.GetAdapterRequest, context: Context
    ) -> adapter_pb2.GetAdapterResponse:
        """Return an adapter, and the version that a name of it means."""
        caller = self._counted()
        reference = read_reference(request.name, "name")
        version = await self._run(self._adapters.resolve, caller.tenant_id, reference)
        if version is None:
            raise adapter_not_found(request.name, "name")
        record = await self._run(self._adapters.get, caller.tenant_id, version.owner, version.name)
        return adapter_pb2.GetAdapterResponse(
            adapter=adapter_to(record, self._write(record.latest, caller)), version=self._write(version, caller)
        )

    async def ListAdapters(  # noqa: N802
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        """Return adapters by pages."""
        caller = self._counted()
        asked = (request.page_size, request.page_token, request.filter)
        page = await self._run(self._adapters.list, caller.tenant_id, *asked)
        return adapter_pb2.ListAdaptersResponse(
            adapters=[
                adapter_to(record, self._write(record.latest, caller, with_ranks=False)) for record in page.items
            ],
            next_page_token=page.next_page_token,
        )

    async def ListAdapterVersions(  # noqa: N802
        self, request: adapter_pb2.ListAdapterVersionsRequest, context: Context
    ) -> adapter_pb2.ListAdapterVersionsResponse:
        """Return an adapter's versions by pages."""
        caller = self._counted()
        owner, name = _named(request.name, caller)
        asked = (owner, name, request.page_size, request.page_token)
        page = await self._run(self._adapters.list_versions, caller.tenant_id, *asked)
        return adapter_pb2.ListAdapterVersionsResponse(
            versions=[self._write(version, caller, with_ranks=False) for version in page.items],
            next_page_token=page.next_page_token,
        )

    async def DownloadAdapter(  # noqa: N802
        self, request: adapter_pb2.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[adapter_pb2.DownloadAdapterResponse]:
        """Send the files of a version back."""
        caller = self._counted()
        if len(request.offsets) > len(FILE_NAMES):
            message = f"{len(request.offsets)} items; {len(FILE_NAMES)} are allowed"
            raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="offsets")
        owner, reference = await self._readable(request.name, caller)
        async with aclosing(self._control.download(owner, reference, dict(request.offsets))) as parts:
            async for part in parts:
                yield self._part_to(part, caller)

    async def SetAlias(  # noqa: N802
        self, request: adapter_pb2.SetAliasRequest, context: Context
    ) -> adapter_pb2.SetAliasResponse:
        """Point an alias at a version, or remove it."""
        acting, owner, name = _owned(current_caller(), request.name)
        etag = request.etag if request.HasField("etag") else None
        alias = await self._control.set_alias(
            acting, owner, name, request.alias, request.version, etag, self._once(request)
        )
        note(digest=await self._control.digest_of(owner, name, alias.version))
        return adapter_pb2.SetAliasResponse(alias=alias_to(alias))

    async def RollbackAlias(  # noqa: N802
        self, request: adapter_pb2.RollbackAliasRequest, context: Context
    ) -> adapter_pb2.RollbackAliasResponse:
        """Point an alias where it pointed before."""
        acting, owner, name = _owned(current_caller(), request.name)
        etag = request.etag if request.HasField("etag") else None
        alias = await self._control.rollback_alias(acting, owner, name, request.alias, etag, self._once(request))
        note(version=alias.version, digest=await self._control.digest_of(owner, name, alias.version))
        return adapter_pb2.RollbackAliasResponse(alias=alias_to(alias))

    async def ShareAdapter(  # noqa: N802
        self, request: adapter_pb2.ShareAdapterRequest, context: Context
    ) -> adapter_pb2.ShareAdapterResponse:
        """Replace who may use an adapter."""
        caller = current_caller()
        acting, owner, name = _owned(caller, request.name)
        visibility, tenants = visibility_from(request.visibility), list(request.tenants)
        note(tenants=" ".join(tenants[:MAX_NOTED_TENANTS]))
        record = await self._run(
            partial(self._adapters.share, acting, owner, name, visibility, tenants, **self._once(request))
        )
        return adapter_pb2.ShareAdapterResponse(adapter=adapter_to(record, self._write(record.latest, caller)))

    async def DeleteAdapterVersion(  # noqa: N802
        self, request: adapter_pb2.DeleteAdapterVersionRequest, context: Context
    ) -> adapter_pb2.DeleteAdapterVersionResponse:
        """Delete a version once no request holds it."""
        acting, owner, name = _owned(current_caller(), request.name)
        wait = _wait_seconds(request.timeout) if request.HasField("timeout") else DEFAULT_WAIT_SECONDS
        deleted = await self._control.delete(
            acting, owner, name, request.version, timeout_seconds=wait, force=request.force, once=self._once(request)
        )
        note(digest=deleted.digest)
        return adapter_pb2.DeleteAdapterVersionResponse(freed_bytes=deleted.size_bytes)

    async def PinAdapter(  # noqa: N802
        self, request: adapter_pb2.PinAdapterRequest, context: Context
    ) -> adapter_pb2.PinAdapterResponse:
        """Load a version onto the device, and keep it there."""
        caller = self._counted()
        pinned = await self._control.pin(*_owned_reference(request.name, caller))
        return adapter_pb2.PinAdapterResponse(version=self._write(pinned, caller))

    async def UnpinAdapter(  # noqa: N802
        self, request: adapter_pb2.UnpinAdapterRequest, context: Context
    ) -> adapter_pb2.UnpinAdapterResponse:
        """Let a version be evicted again."""
        caller = self._counted()
        unpinned = await self._control.unpin(*_owned_reference(request.name, caller))
        return adapter_pb2.UnpinAdapterResponse(version=self._write(unpinned, caller))

    async def _begun(self, upload_id: str) -> tuple[str, str]:
        """Return whose upload an id names: the caller's own, or one for `public` that an admin began."""
        caller = current_caller()
        if caller.lease is not None:
            check_upload(caller.lease, upload_id)
        try:
            await self._run(self._uploads.get, caller.tenant_id, upload_id)
        except NotFoundError:
            return _acting(PUBLIC_OWNER, caller), upload_id
        return caller.tenant_id, upload_id

    async def _readable(self, text: str, caller: Caller) -> tuple[str, AdapterReference]:
        """Return as whom a caller may download an adapter, and which: its own, or what its lease may read."""
        if caller.lease is None:
            return _owned_reference(text, caller)
        check_download(caller.lease, text)
        version = await self._run(self._adapters.resolve, caller.tenant_id, read_reference(text, "name"))
        if version is None:
            raise adapter_not_found(text, "name")
        return version.owner, AdapterReference(version.owner, version.name, version=version.version)

    def _terms(self, caller: Caller) -> Terms:
        """Return what a caller may upload: what it owns, or what its lease is for, while that lasts."""
        lease, leases = caller.lease, self._leases
        if lease is None or leases is None:
            return Terms(partial(_owned, caller))

        def owned(text: str, field: str) -> tuple[str, str, str]:
            acting, owner, name = _owned(caller, text, field)
            check_adapter(lease, owner, name, field)
            return acting, owner, name

        return Terms(owned, partial(narrowed, lease), lambda connection: leases.check(connection, lease.lease_id))

    def _write(self, version: AdapterVersion, caller: Caller, *, with_ranks: bool = True) -> adapter_pb2.AdapterVersion:
        return version_to(version, caller.tenant_id, self._whereabouts(version), with_ranks=with_ranks)

    def _part_to(self, part: DownloadPart, caller: Caller) -> adapter_pb2.DownloadAdapterResponse:
        if isinstance(part, AdapterVersion):
            return adapter_pb2.DownloadAdapterResponse(version=self._write(part, caller))
        if isinstance(part, FileChunk):
            chunk = adapter_pb2.UploadChunk(file=part.file, offset=part.offset, data=part.data)
            return adapter_pb2.DownloadAdapterResponse(chunk=chunk)
        return adapter_pb2.DownloadAdapterResponse(file=file_to(part))

    def _once(self, request: Any) -> dict[str, str]:
        """Return what makes a change happen once: its id, in the namespace of the caller's tenant."""
        return {"request_id": request.request_id, "scope": self._counted().tenant_id}

    def _counted(self) -> Caller:
        """Count the call that runs, and return who makes it."""
        caller = current_caller()
        self._count(caller)
        return caller


def _named(text: str, caller: Caller, field: str = "name") -> tuple[str, str]:
    """Read `NAME` or `OWNER/NAME`, and return whose and which.

    Raises: InvalidArgumentError (reason=INVALID_ADAPTER_NAME).
    """
    first, slash, second = text.partition("/")
    owner, name = (first, second) if slash else (caller.tenant_id, first)
    for part in (owner, name):
        if not is_name(part):
            message = f"{text[:140]!r} is neither NAME nor OWNER/NAME, each {NAME_RULE}"
            raise InvalidArgumentError(message, reason="INVALID_ADAPTER_NAME", field=field)
    return owner, name


def _acting(owner: str, caller: Caller) -> str:
    """Return the tenant that a caller acts as on what an owner has: an admin is `public` too."""
    return PUBLIC_OWNER if owner == PUBLIC_OWNER and Role.ADMIN in caller.roles else caller.tenant_id


def _owned(caller: Caller, text: str, field: str = "name") -> tuple[str, str, str]:
    """Return as whom a caller acts on an adapter, whose it is, and its name; whether it may, the registry says."""
    owner, name = _named(text, caller, field)
    return _acting(owner, caller), owner, name


def _owned_reference(text: str, caller: Caller) -> tuple[str, AdapterReference]:
    reference = read_reference(text, "name")
    return _acting(reference.owner or caller.tenant_id, caller), reference


def _wait_seconds(duration: Duration) -> float:
    seconds: float = duration.seconds + duration.nanos / 1e9
    if not 0 <= seconds <= MAX_WAIT.total_seconds():
        message = f"{seconds:g} s is not within 0 and {MAX_WAIT.total_seconds():g}"
        raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="timeout")
    return seconds
