"""Datasets on their way in: a file's bytes over as many streams as it takes, checked, and then on record.

A dataset is its owner's name for the bytes of one file: their digest. An upload of one outlives connections and
restarts: whoever sends its header again goes on with it, or is given what it became. Several streams may bring it at
once. It knows no wire and no SQL. Runs on the event loop's thread; bytes are written on threads of its own, and lines
are checked on another, one file after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final, ParamSpec, TypeVar

from motley_server.errors import DataLossError, InvalidArgumentError, NotFoundError, OutOfRangeError
from motley_server.registry.database import Database
from motley_server.registry.dataset_intake import DatasetIntake
from motley_server.registry.dataset_records import DatasetRecord
from motley_server.registry.dataset_uploads import DatasetUploads
from motley_server.registry.datasets import Datasets
from motley_server.registry.uploads import store_id
from motley_server.training.lines import check_lines
from motley_server.training.observer import TrainingObserver

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_CHUNK_BYTES: Final = 1 << 20
SYNC_BYTES: Final = 32 << 20  # what a loss of power may cost of an upload
THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class AskedDataset:
    """What the header of an upload says, and for whom."""

    owner: str
    digest: str
    size_bytes: int
    display_name: str = ""

    @property
    def store_id(self) -> str:
        """Return what the upload is called where tenants' datasets must not meet."""
        return store_id(self.owner, self.digest)


@dataclass(frozen=True, slots=True)
class DatasetRegistry:
    """Where datasets are kept: their rows, those of uploads, and the bytes of both."""

    database: Database
    datasets: Datasets
    uploads: DatasetUploads
    intake: DatasetIntake


class OpenDataset:
    """One stream of a dataset's bytes; made by `DatasetDesk.open` alone."""

    def __init__(self, desk: DatasetDesk, asked: AskedDataset) -> None:
        self.asked = asked
        self._desk = desk
        self._num_unsynced = 0

    async def append(self, offset: int, data: bytes) -> None:
        """Write a chunk.

        Raises: InvalidArgumentError (reason=CHUNK_TOO_LARGE); NotFoundError (reason=DATASET_NOT_FOUND) once it was
        deleted, or made a dataset by another stream; and what `DatasetIntake.append` does.
        """
        if len(data) > MAX_CHUNK_BYTES:
            message = f"a chunk of {len(data)} bytes; {MAX_CHUNK_BYTES} are allowed"
            raise InvalidArgumentError(message, reason="CHUNK_TOO_LARGE", field="data")
        await self._desk.write(self.asked, offset, data)
        self._num_unsynced += len(data)
        if self._num_unsynced >= SYNC_BYTES:
            self._num_unsynced = 0
            await self._desk.sync(self.asked)

    async def finish(self) -> DatasetRecord:
        """Check what has arrived and put it on record; that goes on if the caller stops waiting.

        Effects: what is refused for what it is, is forgotten; what is incomplete can go on.
        Raises: FailedPreconditionError (reason=UPLOAD_INCOMPLETE); DataLossError (reason=CHECKSUM_MISMATCH); and what
        `check_lines` and `DatasetIntake.finish` do.
        """
        self._num_unsynced = 0
        return await self._desk.finish(self.asked)

    async def close(self) -> None:
        """Bring to disk what has arrived, so that nobody has to send it again; goes on if the caller stops waiting."""
        await self._desk.leave(self.asked, is_synced=not self._num_unsynced)


class DatasetDesk:
    """Take datasets in, any number at a time, each from any number of streams, and give their bytes out again."""

    def __init__(self, registry: DatasetRegistry, observer: TrainingObserver, max_bytes: int) -> None:
        """Make a desk that takes files of at most so many bytes."""
        self.max_bytes = max_bytes
        self._registry = registry
        self._intake = registry.intake
        self._observer = observer
        self._num_streams: Counter[str] = Counter()  # by store id; without those that have none
        self._endings: dict[str, asyncio.Task[DatasetRecord]] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(THREADS, "motley-datasets")
        self._lines = ThreadPoolExecutor(1, "motley-lines")

    @property
    def active(self) -> frozenset[str]:
        """Return the uploads that somebody works on just now, as the store calls them."""
        return frozenset({*self._num_streams, *self._endings})

    async def open(self, asked: AskedDataset) -> OpenDataset | DatasetRecord:
        """Begin an upload, or go on with it; the dataset if its owner has it already.

        Raises: InvalidArgumentError (reason=EMPTY_DATASET or DATASET_TOO_LARGE); and what `DatasetIntake.begin` does.
        """
        self._check_size(asked.size_bytes)
        made = await self._run(
            self._intake.begin, asked.owner, asked.digest, asked.size_bytes, asked.display_name
        )  # fmt: skip
        if made is not None:
            return made
        self._num_streams[asked.store_id] += 1
        return OpenDataset(self, asked)

    async def committed(self, owner: str, digest: str) -> int:
        """Return how many bytes of an upload are kept.

        Raises: NotFoundError (reason=DATASET_NOT_FOUND).
        """
        return await self._run(self._intake.committed, owner, digest)

    async def delete(self, owner: str, digest: str, *, request_id: str, scope: str) -> None:
        """Forget a dataset, or an upload of one; one that is being finished has its end first.

        Raises: what `DatasetIntake.delete` does.
        """
        if (ending := self._endings.get(store_id(owner, digest))) is not None:
            await asyncio.wait({ending})
        await self._run(self._intake.delete, owner, digest, request_id=request_id, scope=scope)

    async def read(self, owner: str, digest: str, offset: int) -> AsyncGenerator[bytes, None]:
        """Yield a dataset's bytes from an offset on.

        Raises: NotFoundError (reason=DATASET_NOT_FOUND); InvalidArgumentError (reason=OUT_OF_RANGE); OutOfRangeError
        (reason=PAST_END); and what `DatasetIntake.file` does.
        """
        record = await self._registry.database.run(self._registry.datasets.get, owner, digest)
        if offset < 0:
            raise InvalidArgumentError("an offset is not negative", reason="OUT_OF_RANGE", field="offset")
        if offset > record.size_bytes:
            message = f"the dataset has {record.size_bytes} bytes, and offset {offset} is not among them"
            raise OutOfRangeError(message, reason="PAST_END", field="offset")
        with ExitStack() as closing:
            # Held open, it can be read to its end, whatever is deleted meanwhile.
            file = closing.enter_context(await self._run(self._opened, owner, digest))
            while data := await self._run(_read_at, file, offset):
                yield data
                offset += len(data)

    async def stop(self) -> None:
        """Let what is being finished end."""
        await asyncio.gather(*self._endings.values(), *self._settling, return_exceptions=True)
        self._threads.shutdown()
        self._lines.shutdown()

    async def write(self, asked: AskedDataset, offset: int, data: bytes) -> None:
        """Write a chunk; see `OpenDataset.append`."""
        await self._run(self._intake.append, asked.owner, asked.digest, offset, data)
        self._observer.dataset_bytes_uploaded(len(data))

    async def sync(self, asked: AskedDataset) -> None:
        """Bring to disk what has arrived."""
        await self._run(self._settle, asked)

    async def finish(self, asked: AskedDataset) -> DatasetRecord:
        """End an upload, or wait for its end if another stream of it has begun that; see `OpenDataset.finish`."""
        name = asked.store_id
        if name not in self._endings:
            ending = self._endings[name] = asyncio.create_task(self._end(asked))
            ending.add_done_callback(partial(self._note_end, name))
        return await asyncio.shield(self._endings[name])

    async def leave(self, asked: AskedDataset, *, is_synced: bool) -> None:
        """Take note that a stream has ended; see `OpenDataset.close`."""
        name = asked.store_id
        self._num_streams[name] -= 1
        if not self._num_streams[name]:
            del self._num_streams[name]
        if not is_synced:
            settling = asyncio.create_task(self._run(self._settle, asked))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
            await asyncio.shield(settling)

    async def _end(self, asked: AskedDataset) -> DatasetRecord:
        try:
            path = await self._run(self._intake.staged_file, asked.owner, asked.digest)
            lines = await asyncio.get_running_loop().run_in_executor(self._lines, check_lines, path)
        except (DataLossError, InvalidArgumentError):
            await self._run(self._intake.abort, asked.owner, asked.digest)
            raise
        said = (asked.owner, asked.digest, asked.display_name, lines.format, lines.num_samples)
        return await self._run(self._intake.finish, *said)

    def _settle(self, asked: AskedDataset) -> None:
        """Bring to disk what has arrived, and let the day until it expires begin anew."""
        try:
            self._intake.sync(asked.owner, asked.digest)
            self._registry.uploads.touch(asked.owner, asked.digest)
        except NotFoundError:
            log.debug("the upload of dataset %s is gone by now", asked.digest)

    def _note_end(self, name: str, ending: asyncio.Task[DatasetRecord]) -> None:
        del self._endings[name]
        # Nobody may be waiting any more: what it raised is theirs to hear, and here only seen.
        if not ending.cancelled() and (error := ending.exception()) is not None:
            log.debug("an upload was not made a dataset: %s", error)

    def _opened(self, owner: str, digest: str) -> BinaryIO:
        return self._intake.file(owner, digest).open("rb")

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes <= 0:
            message = f"a dataset has two lines at least, and {size_bytes} bytes hold none"
            raise InvalidArgumentError(message, reason="EMPTY_DATASET", field="size_bytes")
        if size_bytes > self.max_bytes:
            message = f"{size_bytes} bytes; {self.max_bytes} are allowed"
            raise InvalidArgumentError(message, reason="DATASET_TOO_LARGE", field="size_bytes")

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))


def _read_at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(MAX_CHUNK_BYTES)
