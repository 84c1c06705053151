"""The stream of a dataset: a header, chunks, and a finish, in this order.

Runs on the event loop's thread, in the RPC's own task.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from motley.v1 import training_pb2

from motley_server.registry.dataset_records import DatasetRecord
from motley_server.rpc.call import set_subject
from motley_server.rpc.fields import naming
from motley_server.rpc.stream_parts import read_chunks, read_header
from motley_server.training.datasets import AskedDataset, DatasetDesk

Messages = AsyncIterator[training_pb2.UploadDatasetRequest]

_HEADER_FIELDS = {field.name: field.name for field in training_pb2.DatasetHeader.DESCRIPTOR.fields}
_CHUNK_FIELDS = {"offset": "offset", "data": "data"}


async def receive_dataset(desk: DatasetDesk, messages: Messages, owner: str) -> DatasetRecord:
    """Read a stream to its end, or as far as it takes, and return the dataset that it brought.

    Semantics: what has arrived is safe on disk when this ends, however it ends.
    Raises: InvalidArgumentError (reason=HEADER_EXPECTED, CHUNK_EXPECTED or UPLOAD_UNFINISHED), and what the desk does.
    """
    header = await read_header(messages, "a dataset")
    set_subject(header)
    with naming("header", _HEADER_FIELDS):
        upload = await desk.open(AskedDataset(owner, header.digest, header.size_bytes, header.display_name))
    if isinstance(upload, DatasetRecord):
        return upload
    try:
        async for chunk in read_chunks(messages, "a dataset"):
            with naming("chunk", _CHUNK_FIELDS):
                await upload.append(chunk.offset, chunk.data)
        with naming("header", _HEADER_FIELDS):
            return await upload.finish()
    finally:
        await upload.close()
