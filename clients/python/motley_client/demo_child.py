"""`motley base` as a child process of the demo: run to its end, and gone whatever happens before.

Owns the process and how it is quoted when it fails. Knows nothing of what it makes. Runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress


class DemoError(Exception):
    """Say what keeps the demo from starting."""

    reason = "DEMO"
    field = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


async def run_base(*arguments: str) -> str:
    """Run `motley base` with these arguments, and return what it prints.

    Effects: if we are interrupted meanwhile, SIGKILL to it and to whatever it started; what it writes is not shown yet.
    Raises: DemoError, quoting its last line, if it does not end well.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "motley_client", "base", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # its own group: Ctrl-C reaches us alone, and the whole group can be ended
    )
    try:
        printed, said = await process.communicate()
    finally:
        with suppress(ProcessLookupError):  # nobody is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode != 0:
        lines = [line for line in re.split(r"[\r\n]+", said.decode(errors="replace")) if line.strip()]
        cause = lines[-1].strip().removeprefix("error: ") if lines else f"exit code {process.returncode}"
        raise DemoError(f"`motley base {arguments[0]}` failed: {cause}")
    return printed.decode()


async def run_each_base(commands: Iterable[tuple[str, ...]]) -> None:
    """Run several `motley base` side by side, and wait for all of them, whatever becomes of one.

    Raises: as `run_base` does for the first that fails.
    """
    ends = await asyncio.gather(*(run_base(*command) for command in commands), return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            raise end
