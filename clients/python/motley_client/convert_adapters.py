"""Adapters, versions and aliases: Python values to protobuf requests, protobuf responses to Python values.

Owns both directions of AdapterService's unary calls as `convert` does those of the other services; what uploads and
downloads say is in `upload` and `download`. Knows nothing of channels. Pure functions but for the request ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from motley.v1 import adapter_pb2

from motley_client.convert_fields import checked, duration, fill_page_size, fill_request_id, moment
from motley_client.errors import InvalidArgumentError
from motley_client.types_adapters import (
    Adapter,
    AdapterKind,
    AdapterResidency,
    AdapterState,
    AdapterVersion,
    Alias,
    ResolvedAdapter,
    UploadStatus,
    Visibility,
)

_KINDS = {
    adapter_pb2.ADAPTER_KIND_LORA: AdapterKind.LORA,
    adapter_pb2.ADAPTER_KIND_S2FT: AdapterKind.S2FT,
    adapter_pb2.ADAPTER_KIND_GOAT: AdapterKind.GOAT,
    adapter_pb2.ADAPTER_KIND_LORAM: AdapterKind.LORAM,
}
_KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}
_STATES = {
    adapter_pb2.ADAPTER_STATE_READY: AdapterState.READY,
    adapter_pb2.ADAPTER_STATE_DELETING: AdapterState.DELETING,
}
_RESIDENCIES = {
    adapter_pb2.ADAPTER_RESIDENCY_DISK: AdapterResidency.DISK,
    adapter_pb2.ADAPTER_RESIDENCY_HOST: AdapterResidency.HOST,
    adapter_pb2.ADAPTER_RESIDENCY_DEVICE: AdapterResidency.DEVICE,
}
_VISIBILITIES = {
    adapter_pb2.VISIBILITY_PRIVATE: Visibility.PRIVATE,
    adapter_pb2.VISIBILITY_TENANTS: Visibility.TENANTS,
    adapter_pb2.VISIBILITY_PUBLIC: Visibility.PUBLIC,
}
_VISIBILITY_NUMBERS = {visibility: number for number, visibility in _VISIBILITIES.items()}


def get_adapter_request(name: str) -> adapter_pb2.GetAdapterRequest:
    """Make a request for what a name means."""
    return checked("name", adapter_pb2.GetAdapterRequest, name=name)


def list_adapters_request(filter_: str, page_size: int | None) -> adapter_pb2.ListAdaptersRequest:
    """Make a request for the first page of adapters; None leaves its size to the server."""
    request = checked("filter", adapter_pb2.ListAdaptersRequest, filter=filter_)
    fill_page_size(request, page_size)
    return request


def list_versions_request(name: str, page_size: int | None) -> adapter_pb2.ListAdapterVersionsRequest:
    """Make a request for the first page of an adapter's versions; None leaves its size to the server."""
    request = checked("name", adapter_pb2.ListAdapterVersionsRequest, name=name)
    fill_page_size(request, page_size)
    return request


def set_alias_request(
    name: str, alias: str, version: int | None, etag: str | None, request_id: str | None
) -> adapter_pb2.SetAliasRequest:
    """Make a request to point an alias at a version, or with None to remove it.

    Raises: InvalidArgumentError for version 0, by which the message says to remove it: nobody asks for that in passing.
    """
    if version == 0:
        raise InvalidArgumentError("versions begin at 1", reason="INVALID_VALUE", field="version")
    request = adapter_pb2.SetAliasRequest()
    for field, value in (("name", name), ("alias", alias), ("version", version), ("etag", etag)):
        request.MergeFrom(checked(field, adapter_pb2.SetAliasRequest, **{field: value}))
    fill_request_id(request, request_id)
    return request


def rollback_alias_request(
    name: str, alias: str, etag: str | None, request_id: str | None
) -> adapter_pb2.RollbackAliasRequest:
    """Make a request to point an alias at its previous target."""
    request = adapter_pb2.RollbackAliasRequest()
    for field, value in (("name", name), ("alias", alias), ("etag", etag)):
        request.MergeFrom(checked(field, adapter_pb2.RollbackAliasRequest, **{field: value}))
    fill_request_id(request, request_id)
    return request


def share_adapter_request(
    name: str, visibility: Visibility, tenants: Iterable[str], request_id: str | None
) -> adapter_pb2.ShareAdapterRequest:
    """Make a request to replace who may use an adapter."""
    request = checked("name", adapter_pb2.ShareAdapterRequest, name=name)
    request.MergeFrom(checked("visibility", _of_visibility, visibility=visibility))
    request.tenants.extend(strings("tenants", tenants))
    fill_request_id(request, request_id)
    return request


def delete_version_request(
    name: str, version: int, wait_seconds: float | None, force: bool, request_id: str | None
) -> adapter_pb2.DeleteAdapterVersionRequest:
    """Make a request to delete a version; None leaves the waiting to the server."""
    request = checked("name", adapter_pb2.DeleteAdapterVersionRequest, name=name)
    request.MergeFrom(checked("version", adapter_pb2.DeleteAdapterVersionRequest, version=version))
    request.MergeFrom(checked("force", adapter_pb2.DeleteAdapterVersionRequest, force=force))
    if wait_seconds is not None:
        request.timeout.CopyFrom(checked("timeout", duration, seconds=wait_seconds))
    fill_request_id(request, request_id)
    return request


def pin_adapter_request(name: str) -> adapter_pb2.PinAdapterRequest:
    """Make a request to keep a version on the device."""
    return checked("name", adapter_pb2.PinAdapterRequest, name=name)


def unpin_adapter_request(name: str) -> adapter_pb2.UnpinAdapterRequest:
    """Make a request to let a version be evicted again."""
    return checked("name", adapter_pb2.UnpinAdapterRequest, name=name)


def get_upload_request(upload_id: str) -> adapter_pb2.GetUploadRequest:
    """Make a request for how far an upload has come."""
    return checked("upload_id", adapter_pb2.GetUploadRequest, upload_id=upload_id)


def abort_upload_request(upload_id: str) -> adapter_pb2.AbortUploadRequest:
    """Make a request to forget an upload."""
    return checked("upload_id", adapter_pb2.AbortUploadRequest, upload_id=upload_id)


def kind_number(kind: AdapterKind | None) -> adapter_pb2.AdapterKind.ValueType:
    """Return a kind as it travels; None takes what the files say."""
    return adapter_pb2.ADAPTER_KIND_UNSPECIFIED if kind is None else _KIND_NUMBERS[AdapterKind(kind)]


def strings(field: str, values: Iterable[str]) -> tuple[str, ...]:
    """Return the strings of a repeated field.

    Raises: InvalidArgumentError for a bare string, which would be taken letter by letter, or what is no text.
    """
    message = checked(field, _strings, values=values)
    return tuple(message.tenants)


def resolved_adapter(response: adapter_pb2.GetAdapterResponse) -> ResolvedAdapter:
    """Read what a name means."""
    return ResolvedAdapter(adapter(response.adapter), version(response.version))


def adapter(message: adapter_pb2.Adapter, *, is_listed: bool = False) -> Adapter:
    """Read an adapter; of a list, it comes without ranks."""
    return Adapter(
        owner=message.owner,
        name=message.name,
        aliases=tuple(map(alias, message.aliases)),
        latest=version(message.latest, is_listed=is_listed) if message.HasField("latest") else None,
        visibility=_VISIBILITIES.get(message.visibility),
        shared_with=tuple(message.shared_with),
    )


def version(message: adapter_pb2.AdapterVersion, *, is_listed: bool = False) -> AdapterVersion:
    """Read a version; of a list, it comes without ranks."""
    return AdapterVersion(
        name=message.name,
        version=message.version,
        digest=message.digest,
        kind=_KINDS.get(message.kind),
        state=_STATES.get(message.state),
        size_bytes=message.size_bytes,
        ranks=None if is_listed else dict(message.ranks),
        device_bytes=message.device_bytes,
        trained_on=message.trained_on,
        serves_on=message.serves_on,
        residency=_RESIDENCIES.get(message.residency),
        pinned=message.pinned,
        labels=dict(message.labels),
        create_time=moment(message.create_time),
        created_by=message.created_by,
    )


def alias(message: adapter_pb2.Alias) -> Alias:
    """Read an alias."""
    return Alias(message.name, message.version, message.previous_version or None, message.etag)


def upload_status(response: adapter_pb2.GetUploadResponse) -> UploadStatus:
    """Read how far an upload has come."""
    return UploadStatus(response.upload_id, dict(response.committed_bytes), moment(response.expire_time))


def _of_visibility(visibility: Visibility) -> adapter_pb2.ShareAdapterRequest:
    return adapter_pb2.ShareAdapterRequest(visibility=_VISIBILITY_NUMBERS[Visibility(visibility)])


def _strings(values: Any) -> adapter_pb2.ShareAdapterRequest:
    if isinstance(values, str):
        raise TypeError(f"a sequence of strings, not the string {values!r}")
    return adapter_pb2.ShareAdapterRequest(tenants=values)
