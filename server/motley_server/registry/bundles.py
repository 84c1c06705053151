"""Bundles: adapters, or datasets, as they were uploaded, kept under the digest of their bytes, never changed.

    root/staging/<upload id>/    uploads on their way in, as staging.py has them
    root/bundles/<64 hex>/NAME   bundles, each whole, or it would not be here
    root/trash/                  what is being removed; anything in it may go at any time
    root/lock                    locked by the process that has the store open

A bundle comes into being by one rename, after its bytes are on disk and were found right. It knows no owners, names or
versions, and no SQL: who calls says what is still wanted. Methods may be called from any thread; they block.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

from motley_server.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from motley_server.registry.bundle_files import FILE_NAMES, PREFIX, SHA256, BundleFile, bundle_digest, checked_files
from motley_server.registry.disk import FOLDER, Disk, is_folder, is_there, locked, opened, size_of
from motley_server.registry.staging import FILES, Upload, read_plan

_FOLDERS = ("staging", "bundles", "trash")
_LOCK = "lock"
_UPLOAD_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class BundleStoreError(Exception):
    """Say why a store cannot be opened; `reason` is a stable word, as in the tree of errors."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


class BundleStore:
    """Keep bundles and uploads in a folder.

    Semantics: an upload is known, across restarts and also after its commit, until `abort` or `collect` forgets it.
    Forget it once what it became is on record: until then it keeps its bundle from being collected.
    Raises: all methods but `begin`, `abort` and `collect`: NotFoundError (reason=UPLOAD_NOT_FOUND or
    BUNDLE_NOT_FOUND).
    """

    def __init__(self, root: Path, disk: Disk | None = None, names: Collection[str] = FILE_NAMES) -> None:
        """Open a store for this process alone, and make its folders where they are missing.

        Semantics: `names` are those that the files of its bundles may have.
        Raises: BundleStoreError (reason=DATA_DIR_IN_USE).
        """
        self._root = root
        self._names = names
        self._disk = Disk() if disk is None else disk
        self._moves = Lock()  # held for every change of what lies in staging and bundles, and never for long
        self._deletions = Lock()
        self._uploads: dict[str, Upload] = {}
        self._recent_uploads: set[str] = set()
        self._recent_bundles: set[str] = set()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as closing, opened(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as folder:
            try:
                closing.enter_context(locked(folder, _LOCK))
            except BlockingIOError:
                message = f"{root} is in use: another server has it open"
                raise BundleStoreError(message, reason="DATA_DIR_IN_USE") from None
            for name in _FOLDERS:
                if not is_folder(folder, name):
                    self._disk.make_folder(folder, name)
            self._disk.fsync(folder)
            self._staging, self._bundles, self._trash = (
                closing.enter_context(_kept_open(name, folder)) for name in _FOLDERS
            )
            self._closing = closing.pop_all()

    def close(self) -> None:
        """Close the store's folders, so that others may open it. A second time does nothing."""
        self._closing.close()

    def begin(self, upload_id: str, files: Iterable[BundleFile]) -> None:
        """Begin an upload of certain files; one that was begun with the same files goes on as it is.

        Raises: InvalidArgumentError (reason=INVALID_UPLOAD_ID, or as `checked_files`); AlreadyExistsError
        (reason=UPLOAD_EXISTS); ResourceExhaustedError (reason=STORAGE_FULL).
        """
        if not _UPLOAD_ID.fullmatch(upload_id):
            message = "an upload's id is 1 to 64 letters, digits, `_` and `-`, the first a letter or digit"
            raise InvalidArgumentError(message, reason="INVALID_UPLOAD_ID", field="upload_id")
        wanted = checked_files(files, self._names)
        with self._moves:
            self._recent_uploads.add(upload_id)
            upload = self._known(upload_id)
            trashed = []
            if upload is None:
                if is_there(self._staging, upload_id):  # it was not begun to the end, or its bundle is lost
                    trashed.append(self._to_trash(self._staging, upload_id))
                self._uploads[upload_id] = Upload.create(self._disk, self._staging, upload_id, wanted)
            elif upload.files != wanted:
                message = "this upload was begun with other files"
                raise AlreadyExistsError(message, reason="UPLOAD_EXISTS", field="upload_id")
        self._delete(trashed)

    def append(self, upload_id: str, name: str, offset: int, data: bytes | memoryview) -> int:
        """Write bytes of a file as `Upload.append` does, and return how many the file has now."""
        with self._held(upload_id) as upload:
            return upload.append(name, offset, data)

    def sync(self, upload_id: str) -> None:
        """Bring to disk what was written, so that it counts as committed."""
        with self._held(upload_id) as upload:
            upload.sync()

    def committed(self, upload_id: str) -> Mapping[str, int]:
        """Return how many bytes of each file are kept whatever happens: where to go on."""
        with self._held(upload_id) as upload:
            return upload.committed()

    def verify(self, upload_id: str) -> None:
        """Check size and checksum of every file, as `Upload.verify` does."""
        with self._held(upload_id) as upload:
            upload.verify()

    def directory_of_upload(self, upload_id: str) -> Path:
        """Return the folder that has the files, wherever they are by now, and nothing else."""
        with self._held(upload_id) as upload:
            if upload.is_moved:
                return self.directory(bundle_digest(upload.files))
            return self._root / "staging" / upload_id / FILES

    def commit(self, upload_id: str) -> str:
        """Make a bundle of a complete upload, on disk when this returns, and return its digest.

        Semantics: if the bundle is there already, it stays, and the upload's bytes go. A second time does no harm.
        Raises: what `verify` does.
        """
        with self._held(upload_id) as upload:
            upload.verify()
            if not upload.is_moved:
                upload.sync()
                with upload.opened_files() as folder:
                    self._disk.fsync(folder)
            digest = bundle_digest(upload.files)
            with self._moves:
                self._recent_uploads.add(upload_id)
                self._recent_bundles.add(digest)
                trashed = self._move(upload, digest.removeprefix(PREFIX))
                # Also of a bundle that was there: whoever made it may have been stopped before its name was safe. And
                # first where the files are, then where they were, or a loss of power might leave them in neither.
                self._disk.fsync(self._bundles)
                with upload.opened_folder() as folder:
                    self._disk.fsync(folder)
        self._delete(trashed)
        return digest

    def bundles(self) -> set[str]:
        """Return the digests of the bundles that are there."""
        return {PREFIX + name for name in os.listdir(self._bundles)}

    def directory(self, digest: str) -> Path:
        """Return the folder that has a bundle's files and nothing else."""
        name = digest.removeprefix(PREFIX)
        if not digest.startswith(PREFIX) or not SHA256.fullmatch(name) or not is_folder(self._bundles, name):
            raise NotFoundError(f"there is no bundle {digest[:80]!r}", reason="BUNDLE_NOT_FOUND", field="digest")
        return self._root / "bundles" / name

    def abort(self, upload_id: str) -> None:
        """Forget an upload and remove what it staged; its bundle stays, if it has one. An unknown one is no error."""
        if not _UPLOAD_ID.fullmatch(upload_id):
            return
        with self._moves:
            upload = self._known(upload_id)
        with ExitStack() as locks:
            if upload is not None:
                locks.enter_context(upload.lock)
            with self._moves:
                if not is_there(self._staging, upload_id):
                    return
                if upload is not None:
                    self._recent_bundles.add(bundle_digest(upload.files))
                self._uploads.pop(upload_id, None)
                trashed = [self._to_trash(self._staging, upload_id)]
                self._disk.fsync(self._staging)
        self._delete(trashed)

    def collect(self, keep_bundles: Set[str], keep_uploads: Set[str]) -> int:
        """Remove every upload and bundle that nobody keeps, and return the bytes that came free.

        Semantics: who calls reads both sets after the collection before has ended, uploads no later than bundles, and
        puts a bundle on record before it forgets the upload. What was begun, committed or aborted since that
        collection is kept, as the sets may be older than it, and so is the bundle of an upload that is kept.
        """
        with self._moves:
            uploads = keep_uploads | self._recent_uploads
            for name in os.listdir(self._staging):
                if name not in uploads:
                    self._to_trash(self._staging, name)
                    self._uploads.pop(name, None)
            plans = (read_plan(self._staging, name) for name in os.listdir(self._staging))
            digests = {bundle_digest(files) for files in plans if files is not None}
            bundles = {digest.removeprefix(PREFIX) for digest in keep_bundles | self._recent_bundles | digests}
            for name in os.listdir(self._bundles):
                if name not in bundles:
                    self._to_trash(self._bundles, name)
            self._disk.fsync(self._staging)
            self._disk.fsync(self._bundles)
            self._recent_uploads.clear()
            self._recent_bundles.clear()
        return self._delete(None)

    @contextmanager
    def _held(self, upload_id: str) -> Iterator[Upload]:
        """Hold an upload's lock, so that it is what it was when it was found."""
        with ExitStack() as locks:
            while True:
                with self._moves:
                    upload = self._known(upload_id) if _UPLOAD_ID.fullmatch(upload_id) else None
                if upload is None:
                    raise _upload_not_found()
                locks.enter_context(upload.lock)
                if self._uploads.get(upload_id) is upload:
                    break
                locks.close()
            try:
                upload.take_up()  # here, where nobody waits who has another upload
                yield upload
            except FileNotFoundError:  # collected meanwhile
                raise _upload_not_found() from None

    def _known(self, upload_id: str) -> Upload | None:
        """Return an upload, from an earlier process too; one whose files have moved has its bundle still."""
        upload = self._uploads.get(upload_id) or Upload.load(self._disk, self._staging, upload_id)
        if upload is None:
            return None
        if upload.is_moved and not is_folder(self._bundles, bundle_digest(upload.files).removeprefix(PREFIX)):
            self._uploads.pop(upload_id, None)
            return None
        self._uploads[upload_id] = upload
        return upload

    def _move(self, upload: Upload, name: str) -> list[str]:
        """Move an upload's files to where bundles are, or to the trash if they are there already."""
        if upload.is_moved:
            return []
        with upload.opened_folder() as folder:
            if is_folder(self._bundles, name):
                trashed = [self._to_trash(folder, FILES)]
            else:
                self._disk.rename(folder, FILES, self._bundles, name)
                trashed = []
            upload.moved()
        return trashed

    def _to_trash(self, folder: int, name: str) -> str:
        trashed = secrets.token_hex(16)
        self._disk.rename(folder, name, self._trash, trashed)
        return trashed

    def _delete(self, trashed: list[str] | None) -> int:
        """Empty the trash of certain things, or of all, and return their bytes."""
        freed = 0
        with self._deletions:
            present = set(os.listdir(self._trash)) if trashed is None or trashed else set()
            for name in present if trashed is None else present.intersection(trashed):
                size_bytes = size_of(self._trash, name)
                self._disk.remove(self._trash, name)
                freed += size_bytes
        return freed


@contextmanager
def _kept_open(name: str, folder: int) -> Iterator[int]:
    with opened(name, FOLDER, folder) as descriptor:
        yield descriptor


def _upload_not_found() -> NotFoundError:
    message = "there is no such upload: it was never begun, was aborted, or has expired"
    return NotFoundError(message, reason="UPLOAD_NOT_FOUND", field="upload_id")
