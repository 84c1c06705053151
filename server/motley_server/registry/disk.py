"""The changes that the store of bundles makes to a disk, all through one seam, and how its folders are opened.

It knows file descriptors and names, not what the bytes are. A name is always one component below an open folder, and
no link is followed. Everything here blocks and runs on the caller's thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from motley_server.errors import ResourceExhaustedError

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
CHANGE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Disk:
    """Make each change at once. A test breaks these to stop the store between any two of them."""

    def make_folder(self, folder: int, name: str) -> None:
        """Make an empty folder that is its owner's alone."""
        os.mkdir(name, 0o700, dir_fd=folder)

    def make_file(self, folder: int, name: str) -> None:
        """Make an empty file that is its owner's alone. Raises: FileExistsError."""
        os.close(os.open(name, _NEW, 0o600, dir_fd=folder))

    def write(self, file: int, data: memoryview, offset: int) -> int:
        """Write at an offset, and return how much was written, which may be less than all."""
        return os.pwrite(file, data, offset)

    def truncate(self, file: int, size_bytes: int) -> None:
        """Cut a file off."""
        os.ftruncate(file, size_bytes)

    def fsync(self, file: int) -> None:
        """Return when a file's bytes, or a folder's names, would outlive a loss of power."""
        os.fsync(file)

    def rename(self, folder: int, name: str, new_folder: int, new_name: str) -> None:
        """Move a file or a folder. Nobody sees it in both places or in none."""
        os.rename(name, new_name, src_dir_fd=folder, dst_dir_fd=new_folder)

    def remove(self, folder: int, name: str) -> None:
        """Remove a file, a link (never what it points to) or a whole folder."""
        if is_folder(folder, name):
            shutil.rmtree(name, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


@contextmanager
def opened(name: str | os.PathLike[str], flags: int, folder: int | None = None) -> Iterator[int]:
    """Open a file or folder for as long as the block runs. Raises: FileNotFoundError; OSError for a link."""
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: int, name: str) -> Iterator[None]:
    """Have a file locked for as long as the block runs or the process lives. Raises: BlockingIOError if another has it.

    Effects: makes the file, and leaves it.
    """
    with opened(name, CHANGE | os.O_CREAT, folder) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def filling() -> Iterator[None]:
    """Turn a full disk into an error of the tree. Raises: ResourceExhaustedError (reason=STORAGE_FULL)."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceExhaustedError("the server's disk is full", reason="STORAGE_FULL") from error


def is_there(folder: int, name: str) -> bool:
    """Return whether there is anything of that name, were it a link to nowhere."""
    try:
        os.lstat(name, dir_fd=folder)
    except FileNotFoundError:
        return False
    return True


def is_folder(folder: int, name: str) -> bool:
    """Return whether a folder of that name is there; a link to one is none."""
    try:
        return stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode)
    except FileNotFoundError:
        return False


def size_of(folder: int, name: str) -> int:
    """Return the bytes of a file, or of all files in a folder. Links count for what they are."""
    if not is_folder(folder, name):
        return os.lstat(name, dir_fd=folder).st_size
    return sum(
        os.lstat(file, dir_fd=inner).st_size for _, _, files, inner in os.fwalk(name, dir_fd=folder) for file in files
    )
