"""Uploads as messages: adapters of a few bytes, their headers, and streams of their chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from motley.v1 import adapter_pb2

KIB = 1 << 10


def paper_files(size_bytes: int = 3 * KIB, kind: str = "lora", seed: int = 0) -> dict[str, bytes]:
    """Return the files of an adapter that a paper intake takes in."""
    block = hashlib.sha256(str(seed).encode()).digest()
    content = (block * (size_bytes // len(block) + 1))[:size_bytes]
    return {"adapter_config.json": kind.encode(), "adapter_model.safetensors": content}


def header_of(
    files: Mapping[str, bytes], upload_id: str = "up-1", name: str = "mine", **fields: object
) -> adapter_pb2.UploadAdapterRequest:
    """Return the header that announces files."""
    announced = [
        adapter_pb2.UploadFile(name=file, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    ]
    header = adapter_pb2.UploadHeader(upload_id=upload_id, adapter_name=name, files=announced, **fields)  # type: ignore[arg-type]
    return adapter_pb2.UploadAdapterRequest(header=header)


def chunks_of(
    files: Mapping[str, bytes], offsets: Mapping[str, int] | None = None, size_bytes: int = KIB
) -> list[adapter_pb2.UploadAdapterRequest]:
    """Return the chunks of files from certain offsets on."""
    return [
        chunk_of(file, start, data[start : start + size_bytes])
        for file, data in files.items()
        for start in range((offsets or {}).get(file, 0), len(data), size_bytes)
    ]


def chunk_of(file: str, offset: int, data: bytes) -> adapter_pb2.UploadAdapterRequest:
    """Return one chunk."""
    return adapter_pb2.UploadAdapterRequest(chunk=adapter_pb2.UploadChunk(file=file, offset=offset, data=data))


FINISH = adapter_pb2.UploadAdapterRequest(finish=adapter_pb2.UploadFinish())


def whole(
    files: Mapping[str, bytes], size_bytes: int = KIB, **fields: object
) -> Iterable[adapter_pb2.UploadAdapterRequest]:
    """Return the stream of a whole upload, in chunks of a size."""
    return [header_of(files, **fields), *chunks_of(files, size_bytes=size_bytes), FINISH]  # type: ignore[arg-type]
