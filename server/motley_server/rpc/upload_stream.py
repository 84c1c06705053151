"""The stream of an upload: a header, chunks, and a finish, in this order.

Runs on the event loop's thread, in the RPC's own task.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from motley.v1 import adapter_pb2

from motley_server.asked import Caller
from motley_server.library.publishing import AskedUpload, Publisher
from motley_server.library.uploads import UploadDesk
from motley_server.registry.adapters import Guard
from motley_server.registry.ownership import adapter_not_found
from motley_server.registry.records import AdapterVersion, Quota
from motley_server.rpc.call import set_subject
from motley_server.rpc.convert_adapters import upload_from
from motley_server.rpc.fields import naming
from motley_server.rpc.stream_parts import read_chunks, read_header

Messages = AsyncIterator[adapter_pb2.UploadAdapterRequest]
Owned = Callable[[str, str], tuple[str, str, str]]
"""From the text of a name and the field that wrote it: as whom the caller acts, whose it is, and its name."""

_HEADER_FIELDS = {field.name: field.name for field in adapter_pb2.UploadHeader.DESCRIPTOR.fields}
_CHUNK_FIELDS = {"name": "file", "offset": "offset", "data": "data"}


@dataclass(frozen=True, slots=True)
class Terms:
    """What a caller may upload: under which names, as what, and who must still agree when it becomes a version."""

    owned: Owned
    narrowed: Callable[[AskedUpload], AskedUpload] | None = None
    guard: Guard | None = None


async def receive_upload(desk: UploadDesk, messages: Messages, caller: Caller, terms: Terms) -> AdapterVersion:
    """Read a stream to its end and return the version that it made.

    Semantics: what has arrived is safe on disk when this ends, however it ends.
    Raises: InvalidArgumentError (reason=HEADER_EXPECTED, CHUNK_EXPECTED or UPLOAD_UNFINISHED), and what the desk does.
    """
    header = await read_header(messages, "an upload")
    set_subject(header)
    acting, owner, name = terms.owned(header.adapter_name, "header.adapter_name")
    if owner != acting:
        raise adapter_not_found(header.adapter_name, "header.adapter_name")
    quota = caller.quota if acting == caller.tenant_id else Quota()  # nobody's, for what is public
    publisher = Publisher(caller.tenant_id, caller.key_id, quota, terms.guard)
    with naming("header", _HEADER_FIELDS):
        asked = upload_from(header, owner, name)
        upload = await desk.open(asked if terms.narrowed is None else terms.narrowed(asked), publisher)
    if isinstance(upload, AdapterVersion):
        return upload
    try:
        async for chunk in read_chunks(messages, "an upload"):
            with naming("chunk", _CHUNK_FIELDS):
                await upload.append(chunk.file, chunk.offset, chunk.data)
        with naming("header", _HEADER_FIELDS):
            return await upload.finish()
    finally:
        await upload.close()
