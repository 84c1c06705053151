"""Downloads of both clients: an adapter's files on their way back, checked, over as many connections as it takes.

Owns what is written where: only files of the names that adapters have, beside their place until all of them are right.
When a download is given up is in `resuming`.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import grpc
from motley.v1 import adapter_pb2

from motley_client import convert_adapters as convert
from motley_client.adapter_files import FILE_NAMES
from motley_client.convert_fields import checked
from motley_client.errors import DataLossError, InternalError, MotleyClientError, from_rpc_error
from motley_client.resuming import Resuming
from motley_client.types_adapters import AdapterVersion
from motley_client.upload import AsyncUploadCalls, UploadCalls

if TYPE_CHECKING:  # hashlib names its type for checkers alone
    from hashlib import _Hash


class DownloadCalls(UploadCalls):
    """Download adapters, blocking."""

    def download_adapter(
        self, name: str, directory: str | os.PathLike[str], *, overwrite: bool = False, timeout: float | None = None
    ) -> AdapterVersion:
        """Write the files of an adapter of one's own into a directory, and return the version that they are.

        Semantics: all files appear, under their names, once all are there and their checksums right; a connection that
        is cut is taken up where it broke. With `overwrite` they take the place of an adapter that lies there, whole.
        `timeout` is for the whole.
        Raises: MotleyClientError for what the server refuses; DataLossError (reason=CHECKSUM_MISMATCH);
        FileExistsError for an adapter that lies there; OSError.
        """
        resuming = Resuming(self._effective(timeout))
        with _Arrival(name, Path(directory), overwrite) as arrival:
            while True:
                try:
                    self._receive(arrival, resuming)
                    return arrival.settle()
                except MotleyClientError as error:
                    resuming.reached(arrival.num_bytes)
                    pause = resuming.pause_after(error)
                    if pause is None:
                        raise
                    time.sleep(pause)

    def _receive(self, arrival: _Arrival, resuming: Resuming) -> None:
        call = self._adapters.DownloadAdapter(
            arrival.request(), timeout=resuming.seconds_left(), metadata=self._endpoint.metadata
        )
        try:
            for response in call:
                arrival.take(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._endpoint.address) from error
        finally:
            call.cancel()


class AsyncDownloadCalls(AsyncUploadCalls):
    """Download adapters, awaiting; as DownloadCalls otherwise."""

    async def download_adapter(
        self, name: str, directory: str | os.PathLike[str], *, overwrite: bool = False, timeout: float | None = None
    ) -> AdapterVersion:
        """Write the files of an adapter of one's own into a directory, and return the version that they are.

        Semantics: as DownloadCalls.download_adapter, but files are written on threads.
        Raises: as DownloadCalls.download_adapter.
        """
        resuming = Resuming(self._effective(timeout))
        with _Arrival(name, Path(directory), overwrite) as arrival:
            while True:
                try:
                    await self._receive(arrival, resuming)
                    return await asyncio.to_thread(arrival.settle)
                except MotleyClientError as error:
                    resuming.reached(arrival.num_bytes)
                    pause = resuming.pause_after(error)
                    if pause is None:
                        raise
                    await asyncio.sleep(pause)

    async def _receive(self, arrival: _Arrival, resuming: Resuming) -> None:
        call = self._adapters.DownloadAdapter(
            arrival.request(), timeout=resuming.seconds_left(), metadata=self._endpoint.metadata
        )
        try:
            async for response in call:
                await asyncio.to_thread(arrival.take, response)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._endpoint.address) from error
        finally:
            call.cancel()


@dataclass(slots=True)
class _ArrivingFile:
    """A file as it was announced, and what has come of it."""

    name: str
    size_bytes: int
    sha256: str
    path: Path
    sink: BinaryIO
    num_bytes: int = 0
    hasher: _Hash = field(default_factory=hashlib.sha256)


class _Arrival:
    """The files of one download: what has come, what is asked for next, and their way to their names."""

    def __init__(self, name: str, directory: Path, overwrite: bool) -> None:
        self._name = name
        self._directory = directory
        self._overwrite = overwrite
        self._version: adapter_pb2.AdapterVersion | None = None
        self._files: dict[str, _ArrivingFile] = {}

    def __enter__(self) -> _Arrival:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._check_free()
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.sink.close()
            file.path.unlink(missing_ok=True)

    @property
    def num_bytes(self) -> int:
        """Return how many bytes of all files have come."""
        return sum(file.num_bytes for file in self._files.values())

    def request(self) -> adapter_pb2.DownloadAdapterRequest:
        """Ask for what is missing, of the version that the first answer told: an alias may have moved since."""
        name = self._name
        if self._version is not None:
            name = f"{self._name.partition('@')[0]}@{self._version.version}"
        request = checked("name", adapter_pb2.DownloadAdapterRequest, name=name)
        for file in self._files.values():
            request.offsets[file.name] = file.num_bytes
        return request

    def take(self, response: adapter_pb2.DownloadAdapterResponse) -> None:
        """Take a message in.

        Raises: InternalError (reason=BAD_DOWNLOAD) for one that cannot follow what came before; OSError.
        """
        match response.WhichOneof("payload"):
            case "version":
                self._version = self._version or response.version
                if response.version.digest != self._version.digest:
                    raise _bad("the version changed on the way")
            case "file":
                self._announce(response.file)
            case "chunk":
                self._append(response.chunk)

    def settle(self) -> AdapterVersion:
        """Check that all is there and right, and give every file its name.

        Raises: InternalError (reason=BAD_DOWNLOAD); DataLossError (reason=CHECKSUM_MISMATCH); FileExistsError; OSError.
        """
        if self._version is None or not self._files:
            raise _bad("the answer ended before it told of files")
        for file in self._files.values():
            if file.num_bytes < file.size_bytes:
                raise _bad(f"{file.name} ended after {file.num_bytes} of {file.size_bytes} bytes")
            if file.hasher.hexdigest() != file.sha256:
                message = f"{file.name} arrived with sha256 {file.hasher.hexdigest()}, and {file.sha256} was said"
                raise DataLossError(message, reason="CHECKSUM_MISMATCH", field=file.name)
            file.sink.flush()
            os.fsync(file.sink.fileno())
            file.sink.close()
        self._check_free()
        for name in FILE_NAMES:
            if name in self._files:
                self._files[name].path.replace(self._directory / name)
            else:  # of the adapter that is overwritten
                (self._directory / name).unlink(missing_ok=True)
        return convert.version(self._version)

    def _check_free(self) -> None:
        for path in (self._directory / name for name in FILE_NAMES):
            if not self._overwrite and os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    def _announce(self, told: adapter_pb2.UploadFile) -> None:
        known = self._files.get(told.name)
        if known is not None:
            if (known.size_bytes, known.sha256) != (told.size_bytes, told.sha256):
                raise _bad(f"{told.name} is told of twice, and not alike")
            return
        if told.name not in FILE_NAMES or told.size_bytes < 0:
            raise _bad(f"no adapter has a file {told.name[:80]!r} of {told.size_bytes} bytes")
        path = self._directory / f"{told.name}.partial"
        path.unlink(missing_ok=True)
        self._files[told.name] = _ArrivingFile(told.name, told.size_bytes, told.sha256, path, path.open("xb"))

    def _append(self, chunk: adapter_pb2.UploadChunk) -> None:
        file = self._files.get(chunk.file)
        if file is None or chunk.offset != file.num_bytes or file.num_bytes + len(chunk.data) > file.size_bytes:
            raise _bad(f"bytes of {chunk.file[:80]!r} from {chunk.offset} on belong nowhere")
        file.sink.write(chunk.data)
        file.hasher.update(chunk.data)
        file.num_bytes += len(chunk.data)


def _bad(message: str) -> InternalError:
    return InternalError(f"the server's answer breaks off or apart: {message}", reason="BAD_DOWNLOAD")
