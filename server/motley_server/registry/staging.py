"""One upload on its way in: what was announced, how far each file has come, and whether the bytes are the right ones.

    <staging>/<upload id>/plan.json    what was announced; an upload without it was never begun
    <staging>/<upload id>/files/NAME   what has arrived, and nothing else

It knows no bundles, tenants or SQL. Whoever calls an upload's methods holds its lock. Everything blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from motley_server.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, OutOfRangeError
from motley_server.registry.bundle_files import BundleFile
from motley_server.registry.disk import CHANGE, FOLDER, READ, Disk, filling, opened

if TYPE_CHECKING:  # hashlib names its type for checkers alone
    from hashlib import _Hash

PLAN = "plan.json"
FILES = "files"
_NEW_PLAN = "plan.json.new"
_READ_BYTES = 1 << 20


@dataclass(slots=True)
class _Progress:
    """How far a file has come. `hasher` has seen exactly what is written; None where only the disk has."""

    file: BundleFile
    written: int = 0
    synced: int = 0
    hasher: _Hash | None = field(default_factory=hashlib.sha256)
    is_verified: bool = False


class Upload:
    """The files of one upload. After `moved` they are elsewhere, whole, and nothing here touches them."""

    def __init__(self, disk: Disk, staging: int, upload_id: str, files: tuple[BundleFile, ...]) -> None:
        self.id = upload_id
        self.files = files
        self.lock = Lock()
        self._disk = disk
        self._staging = staging
        self._progress = {file.name: _Progress(file) for file in files}
        self._is_moved = False
        self._is_taken_up = True

    @classmethod
    def create(cls, disk: Disk, staging: int, upload_id: str, files: tuple[BundleFile, ...]) -> Upload:
        """Begin an upload; it is there, after a crash too, once its plan has its name."""
        with filling():
            disk.make_folder(staging, upload_id)
            with opened(upload_id, FOLDER, staging) as folder:
                disk.make_folder(folder, FILES)
                with opened(FILES, FOLDER, folder) as inner:
                    for file in files:
                        disk.make_file(inner, file.name)
                    disk.fsync(inner)
                disk.make_file(folder, _NEW_PLAN)
                with opened(_NEW_PLAN, CHANGE, folder) as plan:
                    text = memoryview(json.dumps([asdict(file) for file in files]).encode())
                    written = 0
                    while written < len(text):
                        written += disk.write(plan, text[written:], written)
                    disk.fsync(plan)
                disk.rename(folder, _NEW_PLAN, folder, PLAN)
                disk.fsync(folder)
            disk.fsync(staging)
        return cls(disk, staging, upload_id, files)

    @classmethod
    def load(cls, disk: Disk, staging: int, upload_id: str) -> Upload | None:
        """Find an upload that another process began, at the bytes that its files have; None if there is none.

        Semantics: this is quick, and none of the bytes counts as committed before `take_up`; `verify` reads them again.
        """
        files = read_plan(staging, upload_id)
        if files is None:
            return None
        upload = cls(disk, staging, upload_id, files)
        upload._is_taken_up = False
        try:
            with upload.opened_files() as folder:
                for progress in upload._progress.values():
                    with opened(progress.file.name, READ, folder) as file:
                        progress.written = os.fstat(file).st_size
                    if progress.written:
                        progress.hasher = None
        except FileNotFoundError:
            upload.moved()
        return upload

    @property
    def is_moved(self) -> bool:
        """Say whether the files have left staging."""
        return self._is_moved

    def moved(self) -> None:
        """Note that the files have left staging."""
        self._is_moved = True
        for progress in self._progress.values():
            progress.written = progress.synced = progress.file.size_bytes
            progress.is_verified = True

    def take_up(self) -> None:
        """Bring to disk what another process wrote, however much that is, before anything else is done with it."""
        if not self._is_taken_up:
            self.sync()
            self._is_taken_up = True

    def committed(self) -> Mapping[str, int]:
        """Return how many bytes of each file would outlive a loss of power."""
        return {name: progress.synced for name, progress in self._progress.items()}

    def append(self, name: str, offset: int, data: bytes | memoryview) -> int:
        """Write what is new of some bytes of a file, and return how many bytes the file has now.

        Semantics: what was there before is compared and skipped; a file that has moved away is whole already.
        Raises: InvalidArgumentError (reason=FILE_NOT_IN_UPLOAD or OUT_OF_RANGE); OutOfRangeError (reason=UPLOAD_OFFSET
        or UPLOAD_PAST_END); DataLossError (reason=UPLOAD_BYTES_DIFFER); ResourceExhaustedError (reason=STORAGE_FULL).
        """
        progress = self._progress.get(name)
        if progress is None:
            message = f"this upload was begun without a file {name[:80]!r}"
            raise InvalidArgumentError(message, reason="FILE_NOT_IN_UPLOAD", field="name")
        if offset < 0:
            raise InvalidArgumentError("an offset is not negative", reason="OUT_OF_RANGE", field="offset")
        view = memoryview(data)
        _check_range(progress, offset, len(view))
        if self._is_moved:
            return progress.written
        repeated = min(progress.written - offset, len(view))
        with self.opened_files() as folder, opened(name, CHANGE, folder) as file:
            if os.pread(file, repeated, offset) != view[:repeated]:
                message = f"{name}: the bytes from {offset} on are not those that were sent before"
                raise DataLossError(message, reason="UPLOAD_BYTES_DIFFER", field=name)
            with filling():
                self._write(file, progress, view[repeated:])
        return progress.written

    def _write(self, file: int, progress: _Progress, data: memoryview) -> None:
        while data:
            count = self._disk.write(file, data, progress.written)
            if progress.hasher is not None:
                progress.hasher.update(data[:count])
            progress.written += count
            data = data[count:]

    def sync(self) -> None:
        """Bring what was written to disk.

        Semantics: after a failure the disk may have dropped any of it and would not say so again, so that none counts.
        """
        for name, progress in self._progress.items():
            if progress.synced == progress.written:
                continue
            with self.opened_files() as folder, opened(name, CHANGE, folder) as file:
                try:
                    with filling():
                        self._disk.fsync(file)
                except Exception:
                    progress.written, progress.hasher, progress.is_verified = progress.synced, None, False
                    self._disk.truncate(file, progress.synced)
                    raise
            progress.synced = progress.written

    def verify(self) -> None:
        """Check that every file is the one that was announced; what was found right is not read again.

        Raises: FailedPreconditionError (reason=UPLOAD_INCOMPLETE); DataLossError (reason=CHECKSUM_MISMATCH).
        """
        for name, progress in self._progress.items():
            wanted = progress.file
            if progress.written < wanted.size_bytes:
                message = f"{name}: {progress.written} of {wanted.size_bytes} bytes have arrived"
                raise FailedPreconditionError(message, reason="UPLOAD_INCOMPLETE", field=name)
            if progress.is_verified:
                continue
            found = self._sha256_on_disk(name) if progress.hasher is None else progress.hasher.hexdigest()
            if progress.written != wanted.size_bytes or found != wanted.sha256:
                message = f"{name}: {progress.written} bytes with sha256 {found} arrived, and {wanted.sha256} was said"
                raise DataLossError(message, reason="CHECKSUM_MISMATCH", field=name)
            progress.is_verified = True

    def _sha256_on_disk(self, name: str) -> str:
        hasher = hashlib.sha256()
        with self.opened_files() as folder, opened(name, READ, folder) as file:
            while part := os.read(file, _READ_BYTES):
                hasher.update(part)
        return hasher.hexdigest()

    @contextmanager
    def opened_folder(self) -> Iterator[int]:
        """Open the folder that has the plan. Raises: FileNotFoundError."""
        with opened(self.id, FOLDER, self._staging) as folder:
            yield folder

    @contextmanager
    def opened_files(self) -> Iterator[int]:
        """Open the folder that has the files alone. Raises: FileNotFoundError, also once they have moved."""
        with self.opened_folder() as folder, opened(FILES, FOLDER, folder) as files:
            yield files


def read_plan(staging: int, upload_id: str) -> tuple[BundleFile, ...] | None:
    """Return what an upload announced; None if it was never begun, or not to the end."""
    try:
        with opened(upload_id, FOLDER, staging) as folder, opened(PLAN, READ, folder) as plan:
            text = os.read(plan, _READ_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return tuple(BundleFile(**file) for file in json.loads(text))


def _check_range(progress: _Progress, offset: int, num_bytes: int) -> None:
    name, size = progress.file.name, progress.file.size_bytes
    if offset > progress.written:
        message = f"{name}: offset {offset} leaves a gap: go on from {progress.synced}, the bytes that are committed"
        raise OutOfRangeError(message, reason="UPLOAD_OFFSET", field="offset")
    if offset + num_bytes > size:
        message = f"{name}: {num_bytes} bytes from {offset} on go past its end: {size} bytes were announced"
        raise OutOfRangeError(message, reason="UPLOAD_PAST_END", field="offset")
