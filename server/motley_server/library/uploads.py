"""Uploads: an adapter's bytes on their way in, over as many streams as it takes.

An upload is its owner's id for it, what its header announced, and what has arrived. It outlives connections and
restarts: whoever sends its header again goes on with it, and whoever does so after its end is given what it became.
Several streams may bring it at once; what one has brought, the others need not. It knows no wire and no SQL. Runs on
the event loop's thread; bytes are written on threads of its own, and what they become is `publishing.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import ParamSpec, TypeVar

from motley_adapters.formats import max_bytes_of

from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.library.observer import LibraryObserver
from motley_server.library.publishing import AdapterRegistry, AskedUpload, Publisher, Publishing
from motley_server.registry.aliases import check_alias
from motley_server.registry.bundle_files import BundleFile, checked_files
from motley_server.registry.labels import check_labels
from motley_server.registry.records import AdapterVersion
from motley_server.registry.uploads import check_upload_id, store_id

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_CHUNK_BYTES = 1 << 20
SYNC_BYTES = 32 << 20  # what a loss of power may cost of an upload
THREADS = 2


class OpenUpload:
    """One stream of an upload's bytes; made by `UploadDesk.open` alone."""

    def __init__(self, desk: UploadDesk, asked: AskedUpload, publisher: Publisher) -> None:
        self.asked = asked
        self.publisher = publisher
        self._desk = desk
        self._num_unsynced = 0

    async def append(self, name: str, offset: int, data: bytes) -> None:
        """Write a chunk.

        Raises: InvalidArgumentError (reason=CHUNK_TOO_LARGE); NotFoundError (reason=UPLOAD_NOT_FOUND) once it was
        aborted, or made a version by another stream; and what `registry.staging.Upload.append` does.
        """
        if len(data) > MAX_CHUNK_BYTES:
            message = f"a chunk of {len(data)} bytes; {MAX_CHUNK_BYTES} are allowed"
            raise InvalidArgumentError(message, reason="CHUNK_TOO_LARGE", field="data")
        await self._desk.write(self.asked, name, offset, data)
        self._num_unsynced += len(data)
        if self._num_unsynced >= SYNC_BYTES:
            self._num_unsynced = 0
            await self._desk.sync(self.asked)

    async def finish(self) -> AdapterVersion:
        """Check what has arrived and make it a version; that goes on if the caller stops waiting.

        Effects: what is refused for what it is, is forgotten; what is incomplete, or over a quota, can go on.
        Raises: what `Publishing.publish` does.
        """
        self._num_unsynced = 0
        return await self._desk.finish(self)

    async def close(self) -> None:
        """Bring to disk what has arrived, so that nobody has to send it again; goes on if the caller stops waiting."""
        await self._desk.leave(self, is_synced=not self._num_unsynced)


class UploadDesk:
    """Take uploads in, any number at a time, each from any number of streams."""

    def __init__(self, registry: AdapterRegistry, publishing: Publishing, observer: LibraryObserver) -> None:
        self._registry = registry
        self._store = registry.store
        self._publishing = publishing
        self._observer = observer
        self._num_streams: Counter[str] = Counter()  # by store id; without those that have none
        self._endings: dict[str, asyncio.Task[AdapterVersion]] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(THREADS, "motley-uploads")

    @property
    def active(self) -> frozenset[str]:
        """Return the uploads that somebody works on just now, as the store calls them."""
        return frozenset({*self._num_streams, *self._endings})

    async def open(self, asked: AskedUpload, publisher: Publisher) -> OpenUpload | AdapterVersion:
        """Begin an upload, or go on with it; the version that it became if it was finished before.

        Semantics: bytes that are its owner's newest version already need not be sent again.
        Raises: InvalidArgumentError (reason=INVALID_UPLOAD_ID, FILE_TOO_LARGE, INVALID_LABEL or INVALID_ALIAS, or as
        `checked_files`); AlreadyExistsError (reason=UPLOAD_EXISTS or REQUEST_ID_REUSED); and what `Publication.begin`
        does.
        """
        _check_header(asked)
        made = await self._publishing.find_or_repeat(asked, publisher)
        if made is not None:
            return made
        await self._run(self._publishing.begin, asked, publisher)
        self._num_streams[asked.store_id] += 1
        return OpenUpload(self, asked, publisher)

    async def committed(self, owner: str, upload_id: str) -> tuple[Mapping[str, int], datetime]:
        """Return how many bytes of each file are kept, and until when at least.

        Raises: NotFoundError (reason=UPLOAD_NOT_FOUND).
        """
        record = await self._registry.database.run(self._registry.uploads.get, owner, upload_id)
        name = store_id(owner, upload_id)
        await self._run(self._store.sync, name)
        return await self._run(self._store.committed, name), record.expires_at

    async def abort(self, owner: str, upload_id: str) -> None:
        """Forget an upload and its bytes; one that is being finished has its end first.

        Raises: NotFoundError (reason=UPLOAD_NOT_FOUND).
        """
        if (ending := self._endings.get(store_id(owner, upload_id))) is not None:
            await asyncio.wait({ending})
        await self._registry.database.run(self._registry.uploads.get, owner, upload_id)
        await self._run(self._publishing.abort, owner, upload_id)

    async def stop(self) -> None:
        """Let what is being finished end."""
        await asyncio.gather(*self._endings.values(), *self._settling, return_exceptions=True)
        self._threads.shutdown()

    async def write(self, asked: AskedUpload, name: str, offset: int, data: bytes) -> None:
        """Write a chunk; see `OpenUpload.append`."""
        await self._run(self._store.append, asked.store_id, name, offset, data)
        self._observer.bytes_uploaded(len(data))

    async def sync(self, asked: AskedUpload) -> None:
        """Bring to disk what has arrived."""
        await self._run(self._store.sync, asked.store_id)

    async def finish(self, upload: OpenUpload) -> AdapterVersion:
        """End an upload, or wait for its end if another stream of it has begun that; see `OpenUpload.finish`."""
        name = upload.asked.store_id
        if name not in self._endings:
            publish = self._publishing.publish(upload.asked, upload.publisher, self._run)
            ending = self._endings[name] = asyncio.create_task(publish)
            ending.add_done_callback(partial(self._note_end, name))
        return await asyncio.shield(self._endings[name])

    async def leave(self, upload: OpenUpload, *, is_synced: bool) -> None:
        """Take note that a stream has ended; see `OpenUpload.close`."""
        name = upload.asked.store_id
        self._num_streams[name] -= 1
        if not self._num_streams[name]:
            del self._num_streams[name]
        if not is_synced:
            settling = asyncio.create_task(self._run(self._settle, upload.asked))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            await asyncio.shield(settling)

    def _settle(self, asked: AskedUpload) -> None:
        """Bring to disk what has arrived, and let the day until it expires begin anew."""
        try:
            self._store.sync(asked.store_id)
            self._registry.uploads.touch(asked.owner, asked.upload_id)
        except NotFoundError:
            log.debug("upload %s is gone by now", asked.store_id)

    def _note_end(self, name: str, ending: asyncio.Task[AdapterVersion]) -> None:
        del self._endings[name]
        # Nobody may be waiting any more: what it raised is theirs to hear, and here only seen.
        if not ending.cancelled() and (error := ending.exception()) is not None:
            log.debug("an upload was not made a version: %s", error)

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))


def _check_header(asked: AskedUpload) -> None:
    check_upload_id(asked.upload_id)
    checked_files(asked.files)
    for index, file in enumerate(asked.files):
        _check_size(file, f"files[{index}].size_bytes")
    check_labels(asked.labels)
    for index, alias in enumerate(asked.aliases):
        check_alias(alias, f"aliases[{index}]")


def _check_size(file: BundleFile, field: str) -> None:
    most = max_bytes_of(file.name)
    if file.size_bytes > most:
        message = f"{file.name} has {file.size_bytes} bytes, and {most} are read"
        raise InvalidArgumentError(message, reason="FILE_TOO_LARGE", field=field)
