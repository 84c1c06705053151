"""Between AdapterService's messages and plain values: enums to words, rows to messages.

Reads fields and nothing else: whether their values make sense is the library's and the registry's business, but for
lists whose length alone is too much. Runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from motley.v1 import adapter_pb2

from motley_server.errors import InvalidArgumentError
from motley_server.library.publishing import AskedUpload
from motley_server.library.whereabouts import Whereabouts
from motley_server.registry.aliases import MAX_ALIASES
from motley_server.registry.bundle_files import FILE_NAMES, BundleFile
from motley_server.registry.names import DEFAULT_ALIAS
from motley_server.registry.records import AdapterRecord, AdapterVersion, Alias, Visibility

KINDS: Final[Mapping[int, str]] = MappingProxyType({
    adapter_pb2.ADAPTER_KIND_UNSPECIFIED: "",
    adapter_pb2.ADAPTER_KIND_LORA: "lora",
    adapter_pb2.ADAPTER_KIND_S2FT: "s2ft",
    adapter_pb2.ADAPTER_KIND_GOAT: "goat",
    adapter_pb2.ADAPTER_KIND_LORAM: "loram",
})  # fmt: skip
KIND_NUMBERS: Final[Mapping[str, Any]] = MappingProxyType({kind: number for number, kind in KINDS.items()})
VISIBILITIES: Final[Mapping[int, Visibility]] = MappingProxyType({
    adapter_pb2.VISIBILITY_PRIVATE: Visibility.PRIVATE,
    adapter_pb2.VISIBILITY_TENANTS: Visibility.TENANTS,
    adapter_pb2.VISIBILITY_PUBLIC: Visibility.PUBLIC,
})  # fmt: skip
VISIBILITY_NUMBERS: Final[Mapping[Visibility, Any]] = MappingProxyType({
    visibility: number for number, visibility in VISIBILITIES.items()
})  # fmt: skip


def upload_from(header: adapter_pb2.UploadHeader, owner: str, name: str) -> AskedUpload:
    """Read an upload's header.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE) for lists that are too long.
    """
    for field, maximum in (("files", len(FILE_NAMES)), ("aliases", MAX_ALIASES)):
        if len(items := getattr(header, field)) > maximum:
            message = f"{len(items)} items; {maximum} are allowed"
            raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field=field)
    return AskedUpload(
        owner=owner,
        upload_id=header.upload_id,
        name=name,
        kind=KINDS[header.kind],
        files=tuple(BundleFile(file.name, file.size_bytes, file.sha256) for file in header.files),
        labels=dict(header.labels),
        aliases=tuple(header.aliases) or (DEFAULT_ALIAS,),
    )


def visibility_from(number: int) -> Visibility:
    """Read a visibility.

    Raises: InvalidArgumentError (reason=VISIBILITY_REQUIRED) for the one that means none.
    """
    if number not in VISIBILITIES:
        raise InvalidArgumentError("say who may use it", reason="VISIBILITY_REQUIRED", field="visibility")
    return VISIBILITIES[number]


def version_to(
    version: AdapterVersion, tenant_id: str, whereabouts: Whereabouts, *, with_ranks: bool = True
) -> adapter_pb2.AdapterVersion:
    """Write a version as a tenant may see it; a page of them goes without ranks, which are hundreds each."""
    return adapter_pb2.AdapterVersion(
        name=version.name_for(tenant_id),
        version=version.version,
        digest=version.digest,
        kind=KIND_NUMBERS[version.kind],
        state=adapter_pb2.ADAPTER_STATE_DELETING if whereabouts.is_deleting else adapter_pb2.ADAPTER_STATE_READY,
        size_bytes=version.size_bytes,
        ranks=version.ranks if with_ranks else {},
        device_bytes=version.device_bytes,
        trained_on=version.trained_on,
        serves_on=version.serves_on,
        residency=_residency(whereabouts),
        pinned=version.is_pinned,
        labels=version.labels,
        create_time=timestamp_to(version.created_at),
        created_by=version.created_by if version.owner == tenant_id else "",
    )


def adapter_to(record: AdapterRecord, latest: adapter_pb2.AdapterVersion) -> adapter_pb2.Adapter:
    """Write an adapter, with its newest version as it was written."""
    return adapter_pb2.Adapter(
        owner=record.owner,
        name=record.name,
        aliases=[alias_to(alias) for alias in record.aliases],
        latest=latest,
        visibility=VISIBILITY_NUMBERS[record.visibility],
        shared_with=record.shared_with,
    )


def alias_to(alias: Alias) -> adapter_pb2.Alias:
    """Write an alias."""
    return adapter_pb2.Alias(
        name=alias.alias, version=alias.version, previous_version=alias.previous_version, etag=alias.etag
    )


def file_to(file: BundleFile) -> adapter_pb2.UploadFile:
    """Write a stored file's name, size and checksum."""
    return adapter_pb2.UploadFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)


def timestamp_to(time: datetime) -> Timestamp:
    """Write a moment."""
    message = Timestamp()
    message.FromDatetime(time)
    return message


def _residency(whereabouts: Whereabouts) -> Any:
    if whereabouts.is_on_device:
        return adapter_pb2.ADAPTER_RESIDENCY_DEVICE
    return adapter_pb2.ADAPTER_RESIDENCY_HOST if whereabouts.is_in_memory else adapter_pb2.ADAPTER_RESIDENCY_DISK
