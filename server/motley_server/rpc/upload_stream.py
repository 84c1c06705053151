"""The stream of an upload: a header, chunks, and a finish, in this order.

Runs on the event loop's thread, in the RPC's own task.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager

from motley.v1 import adapter_pb2

from motley_server.asked import Caller
from motley_server.errors import InvalidArgumentError, MotleyError
from motley_server.library.publishing import Publisher
from motley_server.library.uploads import OpenUpload, UploadDesk
from motley_server.registry.ownership import adapter_not_found
from motley_server.registry.records import AdapterVersion, Quota
from motley_server.rpc.call import set_subject
from motley_server.rpc.convert_adapters import upload_from
from motley_server.rpc.wire_checks import check_message

Messages = AsyncIterator[adapter_pb2.UploadAdapterRequest]
Owned = Callable[[str, str], tuple[str, str, str]]
"""From the text of a name and the field that wrote it: as whom the caller acts, whose it is, and its name."""

_HEADER_FIELDS = {field.name: field.name for field in adapter_pb2.UploadHeader.DESCRIPTOR.fields}
_CHUNK_FIELDS = {"name": "file", "offset": "offset", "data": "data"}
_FIRST_WORD = re.compile(r"\w+")


async def receive_upload(desk: UploadDesk, messages: Messages, caller: Caller, owned: Owned) -> AdapterVersion:
    """Read a stream to its end and return the version that it made.

    Semantics: what has arrived is safe on disk when this ends, however it ends.
    Raises: InvalidArgumentError (reason=HEADER_EXPECTED, CHUNK_EXPECTED or UPLOAD_UNFINISHED), and what the desk does.
    """
    header = await _header(messages)
    set_subject(header)
    acting, owner, name = owned(header.adapter_name, "header.adapter_name")
    if owner != acting:
        raise adapter_not_found(header.adapter_name, "header.adapter_name")
    quota = caller.quota if acting == caller.tenant_id else Quota()  # nobody's, for what is public
    publisher = Publisher(caller.tenant_id, caller.key_id, quota)
    with _naming("header", _HEADER_FIELDS):
        upload = await desk.open(upload_from(header, owner, name), publisher)
    if isinstance(upload, AdapterVersion):
        return upload
    try:
        await _take_chunks(upload, messages)
        with _naming("header", _HEADER_FIELDS):
            return await upload.finish()
    finally:
        await upload.close()


async def _header(messages: Messages) -> adapter_pb2.UploadHeader:
    first = await anext(messages, None)
    check_message(first)
    if first is None or first.WhichOneof("payload") != "header":
        raise InvalidArgumentError("an upload begins with its header", reason="HEADER_EXPECTED", field="header")
    return first.header


async def _take_chunks(upload: OpenUpload, messages: Messages) -> None:
    async for message in messages:
        check_message(message)
        match message.WhichOneof("payload"):
            case "chunk":
                with _naming("chunk", _CHUNK_FIELDS):
                    await upload.append(message.chunk.file, message.chunk.offset, message.chunk.data)
            case "finish":
                return
            case _:
                text = "after its header an upload has chunks, and then its finish"
                raise InvalidArgumentError(text, reason="CHUNK_EXPECTED", field="chunk")
    raise InvalidArgumentError("the stream ended without its finish", reason="UPLOAD_UNFINISHED", field="finish")


@contextmanager
def _naming(part: str, fields: Mapping[str, str]) -> Iterator[None]:
    """Spell the fields of errors as they are in the message's part that they came from."""
    try:
        yield
    except MotleyError as error:
        word = _FIRST_WORD.match(error.field or "")
        if error.field and word and word[0] in fields:
            error.field = f"{part}.{fields[word[0]]}{error.field[word.end() :]}"
        raise
