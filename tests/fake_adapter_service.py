"""An AdapterService in memory: keeps uploads by id and files by version, and cuts streams where it is told to."""

# ruff: noqa: N802 (the methods are named by the service)

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NoReturn

import grpc
from certificates import Certificates
from fake_service import FakeService, page, refusal, serving_service
from motley.v1 import adapter_pb2
from motley.v1.adapter_pb2_grpc import AdapterServiceServicer, add_AdapterServiceServicer_to_server

OWNER = "acme"


class FakeAdapterService(FakeService, AdapterServiceServicer):
    """Keep adapters, their versions, files and uploads.

    Semantics: each upload or download takes the first of `cuts`, if there is one, and ends with UNAVAILABLE, without a
    word, once it has carried more bytes of chunks than that; None lets one through. Every byte that came is committed,
    but `forgets_bytes` takes that many back from every file at a cut. `streams` has the chunks of each upload's stream
    as (file, offset, size); several may bring one upload, and what is the newest version already is not taken again.
    `damages` flips the first byte of every downloaded file; `stranger` names another file that downloads bring.
    """

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[str, list[adapter_pb2.AdapterVersion]] = {}
        self.aliases: dict[str, dict[str, adapter_pb2.Alias]] = {}
        self.shared: dict[str, tuple[Any, list[str]]] = {}
        self.files: dict[tuple[str, int], dict[str, bytes]] = {}
        self.uploads: dict[str, dict[str, bytearray]] = {}
        self.finished: dict[str, adapter_pb2.AdapterVersion] = {}
        self.streams: list[list[tuple[str, int, int]]] = []
        self.cuts: list[int | None] = []
        self.forgets_bytes = 0
        self.damages = False
        self.stranger = ""
        self._uploading = Lock()

    def UploadAdapter(
        self, request_iterator: Iterator[adapter_pb2.UploadAdapterRequest], context: Any
    ) -> adapter_pb2.UploadAdapterResponse:
        header = next(request_iterator).header
        self.enter("UploadAdapter", header, context)
        stream: list[tuple[str, int, int]] = []
        self.streams.append(stream)
        number = len(self.streams)
        if (made := self._made(header)) is not None:
            return adapter_pb2.UploadAdapterResponse(version=made)
        left = self.cuts.pop(0) if self.cuts else None
        self.uploads.setdefault(header.upload_id, {file.name: bytearray() for file in header.files})
        for message in request_iterator:
            self.before(number, header.upload_id, message)
            with self._uploading:
                if header.upload_id not in self.uploads:
                    self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", "upload_id"))
                kept = self.uploads[header.upload_id]
                if message.HasField("finish"):
                    return adapter_pb2.UploadAdapterResponse(version=self.finish(header, kept, context))
                chunk = message.chunk
                if left is not None and len(chunk.data) > left:
                    self._cut(kept, chunk, left, context)
                left = None if left is None else left - len(chunk.data)
                self.append(kept, chunk, context)
                stream.append((chunk.file, chunk.offset, len(chunk.data)))
        raise AssertionError("the stream ended without a finish")

    def before(self, stream: int, upload_id: str, message: adapter_pb2.UploadAdapterRequest) -> None:
        """Do what a test wants to happen before a chunk or a finish of the n-th stream is taken."""

    def _made(self, header: adapter_pb2.UploadHeader) -> adapter_pb2.AdapterVersion | None:
        """Return what an upload became before, or the newest version if that is what it would bring."""
        if header.upload_id in self.finished or not self.versions.get(header.adapter_name):
            return self.finished.get(header.upload_id)
        newest = self.versions[header.adapter_name][-1]
        kept = self.files[newest.name, newest.version]
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in kept.items()}
        if dict(newest.labels) != dict(header.labels) or hashes != {file.name: file.sha256 for file in header.files}:
            return None
        return self._name(header, newest)

    def _name(
        self, header: adapter_pb2.UploadHeader, version: adapter_pb2.AdapterVersion
    ) -> adapter_pb2.AdapterVersion:
        for alias in header.aliases or ["default"]:
            self.point(header.adapter_name, alias, version.version)
        self.finished[header.upload_id] = version
        return version

    def append(self, kept: dict[str, bytearray], chunk: adapter_pb2.UploadChunk, context: Any) -> None:
        """Keep a chunk."""
        assert len(chunk.data) <= 1 << 20
        if chunk.offset > len(kept[chunk.file]):
            self.abort(context, refusal(grpc.StatusCode.OUT_OF_RANGE, "UPLOAD_OFFSET", "offset"))
        kept[chunk.file][chunk.offset : chunk.offset + len(chunk.data)] = chunk.data

    def _cut(self, kept: dict[str, bytearray], chunk: adapter_pb2.UploadChunk, left: int, context: Any) -> NoReturn:
        kept[chunk.file] += chunk.data[:left]
        for data in kept.values():
            del data[max(0, len(data) - self.forgets_bytes) :]
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        raise AssertionError("abort returned")

    def finish(
        self, header: adapter_pb2.UploadHeader, kept: dict[str, bytearray], context: Any
    ) -> adapter_pb2.AdapterVersion:
        """Check an upload and make it a version."""
        for file in header.files:
            if hashlib.sha256(kept[file.name]).hexdigest() != file.sha256:
                self.abort(context, refusal(grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH", file.name))
        version = self.add(
            header.adapter_name, {name: bytes(data) for name, data in kept.items()}, dict(header.labels), header.kind
        )
        del self.uploads[header.upload_id]
        return self._name(header, version)

    def add(
        self, name: str, files: dict[str, bytes], labels: dict[str, str] | None = None, kind: Any = 0
    ) -> adapter_pb2.AdapterVersion:
        """Make a version of an adapter, as if it had been uploaded."""
        versions = self.versions.setdefault(name, [])
        number = versions[-1].version + 1 if versions else 1
        digest = hashlib.sha256(b"".join(files.values())).hexdigest()
        version = adapter_pb2.AdapterVersion(
            name=name,
            version=number,
            digest=f"sha256:{digest}",
            kind=kind or adapter_pb2.ADAPTER_KIND_LORA,
            state=adapter_pb2.ADAPTER_STATE_READY,
            size_bytes=sum(map(len, files.values())),
            ranks={"layers.0.q_proj": 8, "layers.1.q_proj": 8, "layers.0.k_proj": 4},
            device_bytes=4096,
            trained_on="undeclared",
            serves_on="undeclared",
            residency=adapter_pb2.ADAPTER_RESIDENCY_DISK,
            labels=labels or {},
            created_by="k0",
        )
        version.create_time.FromSeconds(self.now())
        versions.append(version)
        self.files[name, number] = dict(files)
        return version

    def point(self, name: str, alias: str, version: int) -> adapter_pb2.Alias:
        """Point an alias at a version."""
        aliases = self.aliases.setdefault(name, {})
        before = aliases.get(alias, adapter_pb2.Alias(etag="etag-0"))
        if before.version == version:
            return before
        etag = f"etag-{int(before.etag.removeprefix('etag-')) + 1}"
        aliases[alias] = adapter_pb2.Alias(name=alias, version=version, previous_version=before.version, etag=etag)
        return aliases[alias]

    def resolve(self, reference: str, context: Any) -> adapter_pb2.AdapterVersion:
        """Return the version that a name means."""
        name, _, selector = reference.partition("@")
        aliases = self.aliases.get(name, {})
        number = (
            int(selector) if selector.isdigit() else aliases.get(selector or "default", adapter_pb2.Alias()).version
        )
        found = next((one for one in self.versions.get(name, ()) if one.version == number), None)
        return found or self._not_found(context)

    def _not_found(self, context: Any) -> NoReturn:
        self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", "name"))

    def _adapter(self, name: str) -> adapter_pb2.Adapter:
        visibility, tenants = self.shared.get(name, (adapter_pb2.VISIBILITY_PRIVATE, []))
        return adapter_pb2.Adapter(
            owner=OWNER,
            name=name,
            aliases=[alias for _, alias in sorted(self.aliases.get(name, {}).items())],
            latest=self.versions[name][-1] if self.versions.get(name) else None,
            visibility=visibility,
            shared_with=tenants,
        )

    def GetUpload(self, request: adapter_pb2.GetUploadRequest, context: Any) -> adapter_pb2.GetUploadResponse:
        def act() -> adapter_pb2.GetUploadResponse:
            if request.upload_id not in self.uploads:
                self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", "upload_id"))
            sizes = {name: len(data) for name, data in self.uploads[request.upload_id].items()}
            response = adapter_pb2.GetUploadResponse(upload_id=request.upload_id, committed_bytes=sizes)
            response.expire_time.FromSeconds(self.now())
            return response

        return self.do("GetUpload", request, context, act)

    def AbortUpload(self, request: adapter_pb2.AbortUploadRequest, context: Any) -> adapter_pb2.AbortUploadResponse:
        def act() -> adapter_pb2.AbortUploadResponse:
            if self.uploads.pop(request.upload_id, None) is None:
                self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", "upload_id"))
            return adapter_pb2.AbortUploadResponse()

        return self.do("AbortUpload", request, context, act)

    def GetAdapter(self, request: adapter_pb2.GetAdapterRequest, context: Any) -> adapter_pb2.GetAdapterResponse:
        def act() -> adapter_pb2.GetAdapterResponse:
            version = self.resolve(request.name, context)
            return adapter_pb2.GetAdapterResponse(adapter=self._adapter(version.name), version=version)

        return self.do("GetAdapter", request, context, act)

    def ListAdapters(self, request: adapter_pb2.ListAdaptersRequest, context: Any) -> adapter_pb2.ListAdaptersResponse:
        def act() -> adapter_pb2.ListAdaptersResponse:
            wanted = dict(term.split("=") for term in request.filter.split())
            names, token = page([name for name in sorted(self.versions) if wanted.get("name", name) == name], request)
            adapters = [self._adapter(name) for name in names]
            for one in adapters:
                if one.HasField("latest"):
                    one.latest.ranks.clear()
            return adapter_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=token)

        return self.do("ListAdapters", request, context, act)

    def ListAdapterVersions(
        self, request: adapter_pb2.ListAdapterVersionsRequest, context: Any
    ) -> adapter_pb2.ListAdapterVersionsResponse:
        def act() -> adapter_pb2.ListAdapterVersionsResponse:
            if request.name not in self.versions:
                self._not_found(context)
            versions = {str(one.version): one for one in reversed(self.versions[request.name])}
            numbers, token = page(list(versions), request)
            response = adapter_pb2.ListAdapterVersionsResponse(
                versions=[versions[number] for number in numbers], next_page_token=token
            )
            for one in response.versions:
                one.ranks.clear()
            return response

        return self.do("ListAdapterVersions", request, context, act)

    def DownloadAdapter(
        self, request: adapter_pb2.DownloadAdapterRequest, context: Any
    ) -> Iterator[adapter_pb2.DownloadAdapterResponse]:
        self.enter("DownloadAdapter", request, context)
        yield from self.download(request, context)

    def download(
        self, request: adapter_pb2.DownloadAdapterRequest, context: Any
    ) -> Iterator[adapter_pb2.DownloadAdapterResponse]:
        """Send what a request to download asks for."""
        version = self.resolve(request.name, context)
        left = self.cuts.pop(0) if self.cuts else None
        yield adapter_pb2.DownloadAdapterResponse(version=version)
        files = self.files[version.name, version.version] | ({self.stranger: b"x"} if self.stranger else {})
        for name, data in files.items():
            told = adapter_pb2.UploadFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            yield adapter_pb2.DownloadAdapterResponse(file=told)
            sent = bytes([data[0] ^ 1]) + data[1:] if self.damages else data
            for offset in range(request.offsets.get(name, 0), len(data), 1000):
                piece = sent[offset : offset + 1000]
                if left is not None and (left := left - len(piece)) < 0:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                chunk = adapter_pb2.UploadChunk(file=name, offset=offset, data=piece)
                yield adapter_pb2.DownloadAdapterResponse(chunk=chunk)

    def SetAlias(self, request: adapter_pb2.SetAliasRequest, context: Any) -> adapter_pb2.SetAliasResponse:
        def act() -> adapter_pb2.SetAliasResponse:
            self._check_etag(request, context)
            if request.version == 0:
                return adapter_pb2.SetAliasResponse(alias=self.aliases[request.name].pop(request.alias))
            self.resolve(f"{request.name}@{request.version}", context)
            return adapter_pb2.SetAliasResponse(alias=self.point(request.name, request.alias, request.version))

        return self.do("SetAlias", request, context, act)

    def RollbackAlias(
        self, request: adapter_pb2.RollbackAliasRequest, context: Any
    ) -> adapter_pb2.RollbackAliasResponse:
        def act() -> adapter_pb2.RollbackAliasResponse:
            self._check_etag(request, context)
            before = self.aliases.get(request.name, {}).get(request.alias, adapter_pb2.Alias()).previous_version
            if not before:
                self.abort(context, refusal(grpc.StatusCode.FAILED_PRECONDITION, "NO_PREVIOUS_VERSION", "alias"))
            return adapter_pb2.RollbackAliasResponse(alias=self.point(request.name, request.alias, before))

        return self.do("RollbackAlias", request, context, act)

    def _check_etag(self, request: Any, context: Any) -> None:
        found = self.aliases.get(request.name, {}).get(request.alias, adapter_pb2.Alias())
        if request.HasField("etag") and request.etag != found.etag:
            self.abort(context, refusal(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "etag"))

    def ShareAdapter(self, request: adapter_pb2.ShareAdapterRequest, context: Any) -> adapter_pb2.ShareAdapterResponse:
        def act() -> adapter_pb2.ShareAdapterResponse:
            if request.name not in self.versions:
                self._not_found(context)
            self.shared[request.name] = (request.visibility, list(request.tenants))
            return adapter_pb2.ShareAdapterResponse(adapter=self._adapter(request.name))

        return self.do("ShareAdapter", request, context, act)

    def DeleteAdapterVersion(
        self, request: adapter_pb2.DeleteAdapterVersionRequest, context: Any
    ) -> adapter_pb2.DeleteAdapterVersionResponse:
        def act() -> adapter_pb2.DeleteAdapterVersionResponse:
            version = self.resolve(f"{request.name}@{request.version}", context)
            self.versions[request.name].remove(version)
            return adapter_pb2.DeleteAdapterVersionResponse(freed_bytes=version.size_bytes)

        return self.do("DeleteAdapterVersion", request, context, act)

    def PinAdapter(self, request: adapter_pb2.PinAdapterRequest, context: Any) -> adapter_pb2.PinAdapterResponse:
        def act() -> adapter_pb2.PinAdapterResponse:
            version = self.resolve(request.name, context)
            version.pinned, version.residency = True, adapter_pb2.ADAPTER_RESIDENCY_DEVICE
            return adapter_pb2.PinAdapterResponse(version=version)

        return self.do("PinAdapter", request, context, act)

    def UnpinAdapter(self, request: adapter_pb2.UnpinAdapterRequest, context: Any) -> adapter_pb2.UnpinAdapterResponse:
        def act() -> adapter_pb2.UnpinAdapterResponse:
            version = self.resolve(request.name, context)
            version.pinned = False
            return adapter_pb2.UnpinAdapterResponse(version=version)

        return self.do("UnpinAdapter", request, context, act)


@contextmanager
def serving_adapters(fake: FakeAdapterService, certificates: Certificates | None = None) -> Iterator[str]:
    """Serve on loopback while the block runs, by TLS where there are certificates; yield the address."""
    with serving_service(add_AdapterServiceServicer_to_server, fake, certificates) as address:
        yield address
