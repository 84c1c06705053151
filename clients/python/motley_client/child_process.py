"""A `motley` command as a child process: started, and gone again with whatever it started, however the block ends.

Owns the process's environment, its log and its end. Knows no command. Runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path


@asynccontextmanager
async def child_process(
    arguments: Sequence[str], log: Path, *, grace_seconds: float, variables: Mapping[str, str] | None = None
) -> AsyncIterator[Process]:
    """Run `motley` with these arguments while the block runs; what it writes to stderr goes to `log`.

    Semantics: its stdout is a pipe, which the caller reads. The environment is ours with `variables`, and without
    MOTLEY_*: what is set there is meant for other servers.
    Effects: at the end, however it comes, SIGTERM, after `grace_seconds` SIGKILL to it and to whatever it started.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOTLEY_")}
    with log.open("wb") as messages:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "motley_client", *arguments),
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=messages,
            env=environment | dict(variables or {}),
            start_new_session=True,  # its own group: Ctrl-C reaches us alone, and the whole group can be ended
        )
    try:
        yield process
    finally:
        await _end(process, grace_seconds)


def stdout_of(process: Process) -> asyncio.StreamReader:
    """Return the reading end of a child's stdout."""
    if process.stdout is None:
        raise RuntimeError("the child's stdout is a pipe")
    return process.stdout


def last_words(process: Process, log: Path) -> str:
    """Return the last line with a word in it of the log of a process that has ended, or its exit code without one."""
    lines = [line.strip("│ ") for line in log.read_text(errors="replace").split("\n")]
    said = next((line for line in reversed(lines) if any(map(str.isalnum, line))), f"exit code {process.returncode}")
    return said.removeprefix("error: ")


async def _end(process: Process, grace_seconds: float) -> None:
    try:
        if process.returncode is None:
            process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    await process.wait()
    finally:
        with suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
