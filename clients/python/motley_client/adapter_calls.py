"""The calls that manage adapters, of both clients side by side.

Owns what is asked of AdapterService but for the files themselves, which `upload` and `download` carry, and how lists
are walked; what calls say is in `convert_adapters`, how they wait and end in `connection`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from motley.v1.adapter_pb2_grpc import AdapterServiceStub

from motley_client import convert_adapters as convert
from motley_client.connection import AsyncConnection, Connection
from motley_client.types_adapters import Adapter, AdapterVersion, Alias, ResolvedAdapter, UploadStatus, Visibility

if TYPE_CHECKING:  # of the stubs alone
    from motley.v1.adapter_pb2_grpc import AdapterServiceAsyncStub


class AdapterCalls(Connection):
    """Manage adapters, blocking.

    Semantics: a `name` is `NAME`, or `OWNER/NAME`; where a version is meant, `NAME@alias`, `NAME@3` and
    `NAME@sha256:...` too. An `etag` is that of the alias as it was last seen, empty for one that was not there; None
    overwrites. A change that meets an unavailable server is tried again under the one request id of its call, so that
    it happens once; `request_id` stands in for that id where a caller repeats a call by itself.
    """

    @cached_property
    def _adapters(self) -> AdapterServiceStub:
        return AdapterServiceStub(self._channel)

    def get_adapter(self, name: str, *, timeout: float | None = None) -> ResolvedAdapter:
        """Return an adapter, and the version that the name means."""
        request = convert.get_adapter_request(name)
        return convert.resolved_adapter(self._call(self._adapters.GetAdapter, request, timeout))

    def list_adapters(
        self, filter: str = "", *, page_size: int | None = None, timeout: float | None = None
    ) -> Iterator[Adapter]:
        """Yield every adapter that can be used and fits, fetching a page when the iteration gets there.

        Semantics: `filter` has `key=value` terms over owner, name, kind and `labels.KEY`; `timeout` is a page's.
        """
        request = convert.list_adapters_request(filter, page_size)
        while True:
            response = self._call(self._adapters.ListAdapters, request, timeout)
            yield from (convert.adapter(one, is_listed=True) for one in response.adapters)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def list_adapter_versions(
        self, name: str, *, page_size: int | None = None, timeout: float | None = None
    ) -> Iterator[AdapterVersion]:
        """Yield every version of an adapter, newest first, fetching a page when the iteration gets there."""
        request = convert.list_versions_request(name, page_size)
        while True:
            response = self._call(self._adapters.ListAdapterVersions, request, timeout)
            yield from (convert.version(one, is_listed=True) for one in response.versions)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Alias:
        """Point an alias at a version, atomically."""
        request = convert.set_alias_request(name, alias, version, etag, request_id)
        return convert.alias(self._call(self._adapters.SetAlias, request, timeout).alias)

    def remove_alias(
        self,
        name: str,
        alias: str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Remove an alias; the version that it pointed at stays."""
        self._call(self._adapters.SetAlias, convert.set_alias_request(name, alias, None, etag, request_id), timeout)

    def rollback_alias(
        self,
        name: str,
        alias: str = "default",
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Alias:
        """Point an alias at its previous target, atomically."""
        request = convert.rollback_alias_request(name, alias, etag, request_id)
        return convert.alias(self._call(self._adapters.RollbackAlias, request, timeout).alias)

    def share_adapter(
        self,
        name: str,
        visibility: Visibility,
        tenants: Iterable[str] = (),
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Replace who may use an adapter; `tenants` go with `Visibility.TENANTS` only."""
        request = convert.share_adapter_request(name, visibility, tenants, request_id)
        return convert.adapter(self._call(self._adapters.ShareAdapter, request, timeout).adapter)

    def delete_adapter_version(
        self,
        name: str,
        version: int,
        *,
        wait_seconds: float | None = None,
        force: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Delete a version once no request holds it, and return how many bytes that freed.

        Semantics: the server waits `wait_seconds` for those requests (30 unless set, at most a day), and with `force`
        cancels them then. A `timeout` should be longer, or the call ends before it is told.
        """
        request = convert.delete_version_request(name, version, wait_seconds, force, request_id)
        return self._call(self._adapters.DeleteAdapterVersion, request, timeout).freed_bytes

    def pin_adapter(self, name: str, *, timeout: float | None = None) -> AdapterVersion:
        """Load a version onto the device, and keep it there until it is unpinned."""
        return convert.version(
            self._call(self._adapters.PinAdapter, convert.pin_adapter_request(name), timeout).version
        )

    def unpin_adapter(self, name: str, *, timeout: float | None = None) -> AdapterVersion:
        """Let a version be evicted from the device again."""
        return convert.version(
            self._call(self._adapters.UnpinAdapter, convert.unpin_adapter_request(name), timeout).version
        )

    def get_upload(self, upload_id: str, *, timeout: float | None = None) -> UploadStatus:
        """Return how far an unfinished upload has come."""
        request = convert.get_upload_request(upload_id)
        return convert.upload_status(self._call(self._adapters.GetUpload, request, timeout))

    def abort_upload(self, upload_id: str, *, timeout: float | None = None) -> None:
        """Have the server forget an unfinished upload."""
        self._call(self._adapters.AbortUpload, convert.abort_upload_request(upload_id), timeout)


class AsyncAdapterCalls(AsyncConnection):
    """Manage adapters, awaiting; as AdapterCalls otherwise."""

    @cached_property
    def _adapters(self) -> AdapterServiceAsyncStub:
        return AdapterServiceStub(self._channel)

    async def get_adapter(self, name: str, *, timeout: float | None = None) -> ResolvedAdapter:
        """Return an adapter, and the version that the name means."""
        request = convert.get_adapter_request(name)
        return convert.resolved_adapter(await self._call(self._adapters.GetAdapter, request, timeout))

    async def list_adapters(
        self, filter: str = "", *, page_size: int | None = None, timeout: float | None = None
    ) -> AsyncIterator[Adapter]:
        """Yield every adapter that can be used and fits, fetching a page when the iteration gets there.

        Semantics: `filter` has `key=value` terms over owner, name, kind and `labels.KEY`; `timeout` is a page's.
        """
        request = convert.list_adapters_request(filter, page_size)
        while True:
            response = await self._call(self._adapters.ListAdapters, request, timeout)
            for message in response.adapters:
                yield convert.adapter(message, is_listed=True)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def list_adapter_versions(
        self, name: str, *, page_size: int | None = None, timeout: float | None = None
    ) -> AsyncIterator[AdapterVersion]:
        """Yield every version of an adapter, newest first, fetching a page when the iteration gets there."""
        request = convert.list_versions_request(name, page_size)
        while True:
            response = await self._call(self._adapters.ListAdapterVersions, request, timeout)
            for message in response.versions:
                yield convert.version(message, is_listed=True)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Alias:
        """Point an alias at a version, atomically."""
        request = convert.set_alias_request(name, alias, version, etag, request_id)
        return convert.alias((await self._call(self._adapters.SetAlias, request, timeout)).alias)

    async def remove_alias(
        self,
        name: str,
        alias: str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Remove an alias; the version that it pointed at stays."""
        await self._call(
            self._adapters.SetAlias, convert.set_alias_request(name, alias, None, etag, request_id), timeout
        )

    async def rollback_alias(
        self,
        name: str,
        alias: str = "default",
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Alias:
        """Point an alias at its previous target, atomically."""
        request = convert.rollback_alias_request(name, alias, etag, request_id)
        return convert.alias((await self._call(self._adapters.RollbackAlias, request, timeout)).alias)

    async def share_adapter(
        self,
        name: str,
        visibility: Visibility,
        tenants: Iterable[str] = (),
        *,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Replace who may use an adapter; `tenants` go with `Visibility.TENANTS` only."""
        request = convert.share_adapter_request(name, visibility, tenants, request_id)
        return convert.adapter((await self._call(self._adapters.ShareAdapter, request, timeout)).adapter)

    async def delete_adapter_version(
        self,
        name: str,
        version: int,
        *,
        wait_seconds: float | None = None,
        force: bool = False,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Delete a version once no request holds it, and return how many bytes that freed.

        Semantics: the server waits `wait_seconds` for those requests (30 unless set, at most a day), and with `force`
        cancels them then. A `timeout` should be longer, or the call ends before it is told.
        """
        request = convert.delete_version_request(name, version, wait_seconds, force, request_id)
        return (await self._call(self._adapters.DeleteAdapterVersion, request, timeout)).freed_bytes

    async def pin_adapter(self, name: str, *, timeout: float | None = None) -> AdapterVersion:
        """Load a version onto the device, and keep it there until it is unpinned."""
        return convert.version(
            (await self._call(self._adapters.PinAdapter, convert.pin_adapter_request(name), timeout)).version
        )

    async def unpin_adapter(self, name: str, *, timeout: float | None = None) -> AdapterVersion:
        """Let a version be evicted from the device again."""
        return convert.version(
            (await self._call(self._adapters.UnpinAdapter, convert.unpin_adapter_request(name), timeout)).version
        )

    async def get_upload(self, upload_id: str, *, timeout: float | None = None) -> UploadStatus:
        """Return how far an unfinished upload has come."""
        request = convert.get_upload_request(upload_id)
        return convert.upload_status(await self._call(self._adapters.GetUpload, request, timeout))

    async def abort_upload(self, upload_id: str, *, timeout: float | None = None) -> None:
        """Have the server forget an unfinished upload."""
        await self._call(self._adapters.AbortUpload, convert.abort_upload_request(upload_id), timeout)
