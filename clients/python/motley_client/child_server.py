"""A server as a child process: started, waited for, and gone again whatever happens in between.

Owns how a server gets ready. Knows it by its command line and by the line `ready on HOST:PORT` alone. Runs on the
caller's event loop.
"""

from __future__ import annotations

import asyncio
import re
import socket
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from motley_client.child_process import child_process, last_words, stdout_of

_READY = re.compile(rb"^ready on (\S+)\s*$")


class ServerStartError(Exception):
    """Say why a child server did not get ready."""

    reason = "SERVER_DID_NOT_START"
    field = None

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.message = f"the server did not start: {cause}"


@dataclass(frozen=True, slots=True)
class ChildServer:
    """Where a child listens, and under which process id it runs."""

    address: str
    metrics_port: int
    pid: int


@asynccontextmanager
async def child_server(
    arguments: Sequence[str], folder: Path, *, start_seconds: float = 120.0, grace_seconds: float = 10.0
) -> AsyncIterator[ChildServer]:
    """Run `motley serve` on free loopback ports while the block runs.

    Semantics: `arguments` go to `serve` after the ports; its messages go to `folder`/server.log.
    Effects: as those of `child_process`.
    Raises: ServerStartError if it ends, or takes longer than `start_seconds`, before it is ready.
    """
    metrics_port, log = _free_port(), folder / "server.log"
    listening = ("--listen", "127.0.0.1:0", "--metrics", f"127.0.0.1:{metrics_port}")
    async with child_process(["serve", *listening, *arguments], log, grace_seconds=grace_seconds) as process:
        address = await _wait_until_ready(process, log, start_seconds)
        drained = asyncio.create_task(stdout_of(process).read())  # a full pipe would stop the server
        try:
            yield ChildServer(address, metrics_port, process.pid)
        finally:
            drained.cancel()


async def _wait_until_ready(process: Process, log: Path, start_seconds: float) -> str:
    try:
        async with asyncio.timeout(start_seconds):
            async for line in stdout_of(process):
                if match := _READY.match(line):
                    return match[1].decode()
            await process.wait()
    except TimeoutError as error:
        raise ServerStartError(f"not ready after {start_seconds:.0f} seconds") from error
    raise ServerStartError(last_words(process, log).removeprefix("motley serve: "))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
