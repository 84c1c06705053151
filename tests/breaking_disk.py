"""A disk that stops its process before or in the middle of a chosen change, and one that then loses power.

`BreakingDisk` counts changes; at the chosen one it raises `Crash`, and from then on every change raises, as a process
that is gone makes none. `lose_power` afterwards takes back what no fsync had made safe: bytes that were written to a
file, new names, and renames, newest first.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from motley_server.registry.disk import Disk


class Crash(BaseException):
    """The process has stopped here."""


def path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


@dataclass(slots=True)
class BreakingDisk(Disk):
    stop_at: int | None = None  # the number of the change that does not happen, from 0
    changes: list[str] = field(default_factory=list)
    unsafe_names: list[tuple[Path | None, Path]] = field(default_factory=list)  # what it was before, if anything
    safe_bytes: dict[int, int] = field(default_factory=dict)  # by inode

    def reach(self, what: str) -> None:
        """Count a change, of this disk or of something beside it, and stop there if it is the chosen one."""
        self.changes.append(what)
        if self.stop_at is not None and len(self.changes) > self.stop_at:
            raise Crash(what)

    def make_folder(self, folder: int, name: str) -> None:
        self.reach(f"make_folder {name}")
        Disk.make_folder(self, folder, name)
        self.unsafe_names.append((None, path_of(folder) / name))

    def make_file(self, folder: int, name: str) -> None:
        self.reach(f"make_file {name}")
        Disk.make_file(self, folder, name)
        self.unsafe_names.append((None, path_of(folder) / name))
        self.safe_bytes[os.lstat(name, dir_fd=folder).st_ino] = 0  # a number that a removed file may have had

    def write(self, file: int, data: memoryview, offset: int) -> int:
        try:
            self.reach("write")
        except Crash:
            if len(self.changes) - 1 == self.stop_at:
                Disk.write(self, file, data[: len(data) // 2], offset)
            raise
        self.safe_bytes.setdefault(os.fstat(file).st_ino, 0)
        return Disk.write(self, file, data, offset)

    def truncate(self, file: int, size_bytes: int) -> None:
        self.reach("truncate")
        Disk.truncate(self, file, size_bytes)

    def fsync(self, file: int) -> None:
        path = path_of(file)
        self.reach(f"fsync {path.name}")
        Disk.fsync(self, file)
        if path.is_dir():
            unsafe = [(old, new) for old, new in self.unsafe_names if new.parent != path]
            # What is safely gone from one folder and not yet safe in the other may be in neither.
            self.unsafe_names = [(None if old is not None and old.parent == path else old, new) for old, new in unsafe]
        else:
            self.safe_bytes[os.fstat(file).st_ino] = os.fstat(file).st_size

    def rename(self, folder: int, name: str, new_folder: int, new_name: str) -> None:
        self.reach(f"rename {name}")
        Disk.rename(self, folder, name, new_folder, new_name)
        self.unsafe_names.append((path_of(folder) / name, path_of(new_folder) / new_name))

    def remove(self, folder: int, name: str) -> None:
        try:
            self.reach("remove")
        except Crash:
            if len(self.changes) - 1 == self.stop_at:
                self._remove_one_file(path_of(folder) / name)
            raise
        Disk.remove(self, folder, name)

    @staticmethod
    def _remove_one_file(folder: Path) -> None:
        next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()

    def lose_power(self, root: Path, *, with_names: bool) -> None:
        """Take back unsafe bytes, and unsafe names unless the disk happened to bring them out."""
        for path in root.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.safe_bytes:
                safe = self.safe_bytes[path.stat().st_ino]
                os.truncate(path, min(safe, path.stat().st_size))
        for old, new in reversed(self.unsafe_names if with_names else []):
            if old is None and new.is_dir():
                shutil.rmtree(new)
            elif old is None:
                new.unlink(missing_ok=True)
            elif new.exists() and old.parent.is_dir():
                new.rename(old)
