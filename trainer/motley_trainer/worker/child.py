"""A job's process: started bound to this one, heard, weighed, and ended in good order or by force.

Owns the process and what it leaves behind when it ends; knows of a job nothing but the lines that it prints. Runs on
the event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from motley_trainer.worker import child_start
from motley_trainer.worker.lines import LineSplitter
from motley_trainer.worker.settings import Timings

EXIT_DONE = 0
EXIT_FAILED = 1
READ_BYTES = 1 << 16
LAST_LINES = 5  # of what it wrote to stderr
SHOWN_LETTERS = 500  # of a line, in the log
TOLD_MALFORMED = 10  # then they are only counted

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Hears what a job's process tells, and sees what it takes."""

    @property
    def is_full(self) -> bool:
        """Tell whether nothing more should be heard for now: the process waits meanwhile, its pipe being full."""

    def told(self, line: Mapping[str, Any]) -> None:
        """Hear a line.

        Raises: ValueError for one that means nothing.
        """

    def weighed(self, num_bytes: int) -> None:
        """See how much memory the process takes."""


@dataclass(frozen=True, slots=True)
class ChildOrder:
    """A process to run. Semantics: `name` is for the log; a `memory_limit_bytes` of None does not limit."""

    name: str
    command: tuple[str, ...]
    environ: Mapping[str, str]
    nice: int
    memory_limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How a process ended: its exit code, a signal's number below 0; why it failed, if it said so.

    Semantics: `last_words` are the last lines of its stderr; `over_bytes` is what it took when it was killed for that.
    """

    code: int
    failure: Mapping[str, Any] | None
    last_words: str
    over_bytes: int | None

    @property
    def cause(self) -> str:
        """Return in words how it ended."""
        if self.code >= 0:
            return f"exit code {self.code}"
        with suppress(ValueError):
            return f"killed by {signal.Signals(-self.code).name}"
        return f"killed by signal {-self.code}"


async def run_child(order: ChildOrder, listener: Listener, timings: Timings, hurried: asyncio.Event) -> ChildEnd:
    """Run a process to its end; being cancelled ends it: SIGTERM first, SIGKILL after the grace, or when hurried.

    Effects: what it says until it has ended is heard, also after the cancellation. Nothing of its session is left.
    """
    launcher = [sys.executable, "-I", "-S", child_start.__file__, str(os.getpid()), str(order.nice)]
    process = await asyncio.create_subprocess_exec(
        *launcher,
        *order.command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(order.environ),
        start_new_session=True,  # its own group: Ctrl-C reaches us alone, and the whole group can be ended
    )
    child = _Child(order, process, listener, timings)
    log.info("%s: process %d trains it", order.name, process.pid)
    hearing = [asyncio.create_task(child.hear()), asyncio.create_task(child.hear_errors())]
    watching = asyncio.create_task(child.watch())
    ended = asyncio.create_task(process.wait())
    try:
        await asyncio.wait([ended, *hearing], return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await child.end(hurried)
        await asyncio.wait([ended, *hearing], timeout=timings.goodbye_seconds)
        for task in (watching, *hearing):
            task.cancel()
        await asyncio.wait([watching, *hearing])
    for task in hearing:
        if not task.cancelled():
            task.result()
    return child.summary(await process.wait())


class _Child:
    def __init__(
        self, order: ChildOrder, process: asyncio.subprocess.Process, listener: Listener, timings: Timings
    ) -> None:
        self._order = order
        self._process = process
        self._listener = listener
        self._timings = timings
        self._failure: Mapping[str, Any] | None = None
        self._last_words: deque[str] = deque(maxlen=LAST_LINES)
        self._over_bytes: int | None = None
        self._num_malformed = 0
        self._is_ending = False

    def summary(self, code: int) -> ChildEnd:
        if self._num_malformed > TOLD_MALFORMED:
            log.warning("%s: %d lines in all meant nothing", self._order.name, self._num_malformed)
        return ChildEnd(code, self._failure, "\n".join(self._last_words), self._over_bytes)

    async def hear(self) -> None:
        splitter, stream = LineSplitter(), _stream(self._process.stdout)
        while data := await stream.read(READ_BYTES):
            for line in splitter.feed(data):
                self._take(line)
            while self._listener.is_full and not self._is_ending:
                await asyncio.sleep(self._timings.watch_seconds)
        for line in splitter.finish():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            told = json.loads(line)
            if not isinstance(told, dict):
                raise ValueError("not an object")
            if isinstance(failure := told.get("failed"), dict):
                self._failure = failure
            elif told.get("cancelled") is not True:
                self._listener.told(told)
        except (ValueError, RecursionError) as error:
            self._num_malformed += 1
            if self._num_malformed <= TOLD_MALFORMED:
                shown = line[:SHOWN_LETTERS].decode(errors="replace")
                log.warning("%s: a line means nothing (%s): %r", self._order.name, error, shown)

    async def hear_errors(self) -> None:
        splitter, stream = LineSplitter(SHOWN_LETTERS), _stream(self._process.stderr)
        while data := await stream.read(READ_BYTES):
            for line in splitter.feed(data):
                self._note(line)
        for line in splitter.finish():
            self._note(line)

    def _note(self, line: bytes) -> None:
        if text := line.decode(errors="replace").rstrip():
            self._last_words.append(text)
            log.info("%s: %s", self._order.name, text)

    async def watch(self) -> None:
        limit = self._order.memory_limit_bytes
        while self._process.returncode is None:
            found = resident_bytes(self._process.pid)
            self._listener.weighed(found)
            if limit is not None and found > limit:
                self._over_bytes = found
                break
            await asyncio.sleep(self._timings.watch_seconds)
        self._kill()  # also what it left behind, which would hold its pipes open

    async def end(self, hurried: asyncio.Event) -> None:
        """Have the process end, if it has not."""
        self._is_ending = True
        if self._process.returncode is None:
            log.info("%s: process %d shall stop", self._order.name, self._process.pid)
            with suppress(ProcessLookupError):
                self._process.terminate()
            waits = [asyncio.create_task(self._process.wait()), asyncio.create_task(hurried.wait())]
            await asyncio.wait(waits, timeout=self._timings.grace_seconds, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        if self._process.returncode is None:
            log.warning("%s: process %d did not stop in time, and is killed", self._order.name, self._process.pid)
        self._kill()
        await self._process.wait()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(self._process.pid, signal.SIGKILL)


def resident_bytes(pid: int) -> int:
    """Return how much memory a process has in RAM; 0 for one that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def num_oom_kills() -> int | None:
    """Return how many processes the kernel has killed for want of memory since it started; None if it does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def _stream(stream: asyncio.StreamReader | None) -> asyncio.StreamReader:
    if stream is None:
        raise RuntimeError("the child's output is a pipe")
    return stream
