"""A process that dies at a chosen point of a registry's work, and may take the power with it.

A point is every change of the store's disk, and the moments before and after each commit of the database. The process
dies by `os._exit`: nothing of it runs on. If power is lost too, what no fsync had made safe in the store is taken
back; of the database it is SQLite's word that a commit is on disk.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from breaking_disk import BreakingDisk, Crash
from motley_server.registry.database import Database
from sqlalchemy import Connection

KILLED, POWER_LOST, POWER_AND_NAMES_LOST = "killed", "power lost", "power and names lost"
DIED = 77


class DyingDisk(BreakingDisk):
    """A disk whose process dies at the chosen change, and may lose power with it."""

    def __init__(self, stop_at: int | None, store: Path, way: str) -> None:
        super().__init__(stop_at)
        self.store = store
        self.way = way

    def die(self) -> None:
        if self.way != KILLED:
            self.lose_power(self.store, with_names=self.way == POWER_AND_NAMES_LOST)
        os._exit(DIED)

    @contextmanager
    def living(self) -> Iterator[None]:
        try:
            yield
        except Crash:
            self.die()

    def pass_by(self, what: str) -> None:
        """Have a point that is no change of this disk."""
        with self.living():
            self.reach(what)


def _dying(name: str) -> Callable[..., object]:
    def change(self: DyingDisk, *args: object, **kwargs: object) -> object:
        with self.living():
            return getattr(BreakingDisk, name)(self, *args, **kwargs)

    return change


for _name in ("make_folder", "make_file", "write", "truncate", "fsync", "rename", "remove"):
    setattr(DyingDisk, _name, _dying(_name))


class DyingDatabase(Database):
    """A database with a point just before each commit and one just after it."""

    disk: DyingDisk

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        with super().writing() as connection:
            yield connection
            self.disk.pass_by("before commit")
        self.disk.pass_by("after commit")


def in_a_child(function: Callable[[Callable[[str], None]], None]) -> tuple[int, list[str]]:
    """Run a function in a process of its own; return its exit status and the whole lines that it said."""
    reading, writing = os.pipe()
    process_id = os.fork()
    if not process_id:
        status = 1

        def say(line: str) -> None:
            os.write(writing, f"{line}\n".encode())

        try:
            os.close(reading)
            function(say)
            status = 0
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as lines:
        said = lines.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]), said
