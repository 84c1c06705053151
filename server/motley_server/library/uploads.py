"""Uploads: an adapter's bytes on their way in, from the first to the version that they become.

An upload is its owner's id for it, the files that were announced, and what has arrived of them. It outlives connections
and restarts: whoever sends its header again goes on with it, and whoever does so after its end is given what it became.
It knows no wire and no SQL. Runs on the event loop's thread; bytes are written on threads of its own, and what they are
the intake finds out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from motley_adapters.errors import AdapterError
from motley_adapters.formats import MAX_JSON_BYTES, MAX_TENSOR_FILE_BYTES

from motley_server.errors import AbortedError, DataLossError, InvalidArgumentError, MotleyError
from motley_server.library.observer import LibraryObserver
from motley_server.registry.adapters import Adapters
from motley_server.registry.aliases import check_alias
from motley_server.registry.bundle_files import BundleFile, bundle_digest, checked_files
from motley_server.registry.bundles import BundleStore
from motley_server.registry.database import Database
from motley_server.registry.labels import check_labels
from motley_server.registry.names import DEFAULT_ALIAS
from motley_server.registry.publication import Publication
from motley_server.registry.records import AdapterVersion, NewVersion, Quota
from motley_server.registry.uploads import Uploads, check_upload_id, store_id

if TYPE_CHECKING:  # torch comes with them
    from motley_adapters.reader import Inspection
    from motley_adapters.spec import AdapterSpec

    from motley_server.library.intake import AdapterIntake

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_CHUNK_BYTES = 1 << 20
SYNC_BYTES = 32 << 20  # what a loss of power may cost of an upload
THREADS = 2


@dataclass(frozen=True, slots=True)
class AskedUpload:
    """What the header of an upload says, and for whom; an empty `kind` takes what the files say."""

    owner: str
    upload_id: str
    name: str
    kind: str = ""
    files: tuple[BundleFile, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = (DEFAULT_ALIAS,)

    @property
    def store_id(self) -> str:
        """Return what the upload is called where tenants' ids must not meet."""
        return store_id(self.owner, self.upload_id)


@dataclass(frozen=True, slots=True)
class Publisher:
    """By which key an upload is made, in which namespace its id counts, and what its owner may have."""

    tenant_id: str
    key_id: str
    quota: Quota


@dataclass(frozen=True, slots=True)
class AdapterRegistry:
    """Where adapters are kept: their rows, those of uploads, and the bytes of both."""

    database: Database
    adapters: Adapters
    uploads: Uploads
    store: BundleStore


class OpenUpload:
    """One stream of an upload's bytes; made by `UploadDesk.open` alone."""

    def __init__(self, desk: UploadDesk, asked: AskedUpload, publisher: Publisher) -> None:
        self.asked = asked
        self.publisher = publisher
        self._desk = desk
        self._num_unsynced = 0

    async def append(self, name: str, offset: int, data: bytes) -> None:
        """Write a chunk.

        Raises: InvalidArgumentError (reason=CHUNK_TOO_LARGE); AbortedError (reason=UPLOAD_TAKEN_OVER); NotFoundError
        (reason=UPLOAD_NOT_FOUND) once it was aborted; and what `registry.staging.Upload.append` does.
        """
        if len(data) > MAX_CHUNK_BYTES:
            message = f"a chunk of {len(data)} bytes; {MAX_CHUNK_BYTES} are allowed"
            raise InvalidArgumentError(message, reason="CHUNK_TOO_LARGE", field="data")
        await self._desk.write(self, name, offset, data)
        self._num_unsynced += len(data)
        if self._num_unsynced >= SYNC_BYTES:
            await self._sync()

    async def finish(self) -> AdapterVersion:
        """Check what has arrived and make it a version; that goes on if the caller stops waiting.

        Effects: what is refused for what it is, is forgotten; what is incomplete, or over a quota, can go on.
        Raises: FailedPreconditionError (reason=UPLOAD_INCOMPLETE or BASE_UNDECLARED); DataLossError;
        AdapterFormatError; AdapterMismatchError; InvalidArgumentError (reason=KIND_MISMATCH); and what
        `Adapters.publish` does.
        """
        await self._sync()
        return await self._desk.finish(self)

    async def close(self) -> None:
        """Bring to disk what has arrived, so that nobody has to send it again; goes on if the caller stops waiting."""
        await self._desk.leave(self, is_synced=not self._num_unsynced)

    async def _sync(self) -> None:
        if self._num_unsynced:
            self._num_unsynced = 0
            await self._desk.sync(self)


class UploadDesk:
    """Take uploads in, any number at a time, each from the stream that was opened last."""

    def __init__(self, registry: AdapterRegistry, intake: AdapterIntake, observer: LibraryObserver) -> None:
        self._registry = registry
        self._store = registry.store
        self._publication = Publication(registry.store, registry.adapters, registry.uploads)
        self._intake = intake
        self._observer = observer
        self._open: dict[str, OpenUpload] = {}
        self._endings: dict[str, asyncio.Task[AdapterVersion]] = {}
        self._syncing: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(THREADS, "motley-uploads")

    @property
    def active(self) -> set[str]:
        """Return the uploads that somebody works on just now, as the store calls them."""
        return {*self._open, *self._endings}

    async def open(self, asked: AskedUpload, publisher: Publisher) -> OpenUpload | AdapterVersion:
        """Begin an upload, or go on with it; the version that it became if it was finished before.

        Semantics: bytes that are its owner's newest version already need not be sent again. Whoever streams the same
        upload already is cut off: its connection is likely to be a dead one.
        Raises: InvalidArgumentError (reason=INVALID_UPLOAD_ID, FILE_TOO_LARGE, INVALID_LABEL or INVALID_ALIAS, or as
        `checked_files`);
        AlreadyExistsError (reason=UPLOAD_EXISTS or REQUEST_ID_REUSED); and what `Publication.begin` does.
        """
        check_upload_id(asked.upload_id)
        files = checked_files(asked.files)
        for index, file in enumerate(asked.files):
            _check_size(file, f"files[{index}].size_bytes")
        check_labels(asked.labels)
        for index, alias in enumerate(asked.aliases):
            check_alias(alias, f"aliases[{index}]")
        made = await self._registry.database.run(self._made, asked, publisher, bundle_digest(files))
        if made is not None:
            return made
        begin = self._publication.begin
        await self._run(begin, asked.owner, asked.upload_id, asked.name, files, publisher.quota)
        upload = self._open[asked.store_id] = OpenUpload(self, asked, publisher)
        return upload

    async def committed(self, owner: str, upload_id: str) -> tuple[Mapping[str, int], datetime]:
        """Return how many bytes of each file are kept, and until when at least.

        Raises: NotFoundError (reason=UPLOAD_NOT_FOUND).
        """
        record = await self._registry.database.run(self._registry.uploads.get, owner, upload_id)
        name = store_id(owner, upload_id)
        await self._run(self._store.sync, name)
        return await self._run(self._store.committed, name), record.expires_at

    async def abort(self, owner: str, upload_id: str) -> None:
        """Forget an upload and its bytes.

        Raises: NotFoundError (reason=UPLOAD_NOT_FOUND).
        """
        await self._registry.database.run(self._registry.uploads.get, owner, upload_id)
        self._open.pop(store_id(owner, upload_id), None)
        await self._run(self._publication.abort, owner, upload_id)

    async def stop(self) -> None:
        """Let what is being finished end."""
        await asyncio.gather(*self._endings.values(), *self._syncing, return_exceptions=True)
        self._threads.shutdown()

    async def write(self, upload: OpenUpload, name: str, offset: int, data: bytes) -> None:
        """Write a chunk of the upload's newest stream; see `OpenUpload.append`."""
        self._check_newest(upload)
        await self._run(self._store.append, upload.asked.store_id, name, offset, data)
        self._observer.bytes_uploaded(len(data))

    async def sync(self, upload: OpenUpload) -> None:
        """Bring to disk what has arrived, if it is still wanted."""
        if self._open.get(upload.asked.store_id) is upload:
            await self._run(self._store.sync, upload.asked.store_id)

    async def finish(self, upload: OpenUpload) -> AdapterVersion:
        """End an upload, or wait for its end if another stream of it has begun that; see `OpenUpload.finish`."""
        self._check_newest(upload)
        name = upload.asked.store_id
        if name not in self._endings:
            ending = self._endings[name] = asyncio.create_task(self._end(upload))
            ending.add_done_callback(partial(self._note_end, name))
        return await asyncio.shield(self._endings[name])

    async def leave(self, upload: OpenUpload, *, is_synced: bool) -> None:
        """Take note that a stream has ended; see `OpenUpload.close`."""
        name = upload.asked.store_id
        if self._open.get(name) is not upload:
            return
        del self._open[name]
        if not is_synced:
            syncing = asyncio.create_task(self._run(self._settle, upload.asked))
            self._syncing.add(syncing)
            syncing.add_done_callback(self._syncing.discard)
            await asyncio.shield(syncing)

    def _settle(self, asked: AskedUpload) -> None:
        """Bring to disk what has arrived, and let the day until it expires begin anew."""
        self._store.sync(asked.store_id)
        self._registry.uploads.touch(asked.owner, asked.upload_id)

    def _made(self, asked: AskedUpload, publisher: Publisher, bundle: str) -> AdapterVersion | None:
        """Return the version that was made of this very upload, or of the same bytes just before."""
        adapters, labels = self._registry.adapters, dict(asked.labels)
        once = {"request_id": asked.upload_id, "scope": publisher.tenant_id}
        made = adapters.earlier_publication(asked.owner, asked.name, bundle, labels, asked.aliases, **once)
        if made is not None:
            return made
        newest = adapters.newest(asked.owner, asked.name)
        if newest is None or newest.bundle != bundle or newest.labels != labels or asked.kind not in ("", newest.kind):
            return None
        content = NewVersion(**{name: getattr(newest, name) for name in NewVersion.__dataclass_fields__})
        return adapters.publish(asked.owner, asked.name, content, asked.aliases, quota=publisher.quota, **once)

    async def _end(self, upload: OpenUpload) -> AdapterVersion:
        asked, publisher = upload.asked, upload.publisher
        try:
            await self._run(self._store.verify, asked.store_id)
        except DataLossError:
            await self._run(self._publication.abort, asked.owner, asked.upload_id)
            raise
        try:
            inspection = await self._intake.inspect(self._store.directory_of_upload(asked.store_id))
            _check_kind(asked, inspection)
        except (AdapterError, MotleyError):
            await self._run(self._publication.abort, asked.owner, asked.upload_id)
            raise
        content = content_of(inspection.spec, asked.files, asked.labels, publisher.key_id)
        version = await self._run(
            self._publication.publish, asked.owner, asked.upload_id, asked.name, content, asked.aliases,
            quota=publisher.quota, request_id=asked.upload_id, scope=publisher.tenant_id,
        )  # fmt: skip
        self._intake.accept(version, inspection)
        return version

    def _note_end(self, name: str, ending: asyncio.Task[AdapterVersion]) -> None:
        del self._endings[name]
        # Nobody may be waiting any more: what it raised is theirs to hear, and here only seen.
        if not ending.cancelled() and (error := ending.exception()) is not None:
            log.debug("an upload was not made a version: %s", error)

    def _check_newest(self, upload: OpenUpload) -> None:
        if self._open.get(upload.asked.store_id) is not upload:
            message = "another stream has taken over this upload, or it was aborted"
            raise AbortedError(message, reason="UPLOAD_TAKEN_OVER", field="upload_id")

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))


def _check_size(file: BundleFile, field: str) -> None:
    most = MAX_JSON_BYTES if file.name.endswith(".json") else MAX_TENSOR_FILE_BYTES
    if file.size_bytes > most:
        message = f"{file.name} has {file.size_bytes} bytes, and {most} are read"
        raise InvalidArgumentError(message, reason="FILE_TOO_LARGE", field=field)


def _check_kind(asked: AskedUpload, inspection: Inspection) -> None:
    if asked.kind not in ("", inspection.spec.kind):
        message = f"the header says {asked.kind}, and the files are {inspection.spec.kind}"
        raise InvalidArgumentError(message, reason="KIND_MISMATCH", field="kind")


def content_of(
    spec: AdapterSpec, files: Iterable[BundleFile], labels: Mapping[str, str] | None = None, created_by: str = ""
) -> NewVersion:
    """Return what the registry keeps of an adapter that was checked and of its files."""
    kept = checked_files(files)
    return NewVersion(
        digest=spec.digest,
        kind=spec.kind,
        trained_on=spec.trained_on,
        serves_on=spec.serves_on,
        ranks=dict(spec.ranks),
        size_bytes=sum(file.size_bytes for file in kept),
        device_bytes=spec.nbytes,
        bundle=bundle_digest(kept),
        files=kept,
        labels=dict(labels or {}),
        created_by=created_by,
    )
