"""A server as a child process: started, waited for, and gone again whatever happens in between.

Owns the process and everything that must not outlive it. Knows the server by its command line and by the line
`ready on HOST:PORT` alone. Runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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

    Semantics: `arguments` go to `serve` after the ports; its messages go to `folder`/server.log. The environment is
    ours without MOTLEY_*: what is set there is meant for other servers.
    Effects: at the end, however it comes, SIGTERM, after `grace_seconds` SIGKILL to it and to whatever it started.
    Raises: ServerStartError if it ends, or takes longer than `start_seconds`, before it is ready.
    """
    metrics_port = _free_port()
    command = [sys.executable, "-m", "motley_client", "serve", "--listen", "127.0.0.1:0"]
    command += ["--metrics", f"127.0.0.1:{metrics_port}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOTLEY_")}
    log = folder / "server.log"
    with log.open("wb") as messages:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=messages,
            env=environment,
            start_new_session=True,  # its own group: Ctrl-C reaches us alone, and the whole group can be ended
        )
    drained: asyncio.Task[bytes] | None = None
    try:
        address = await _wait_until_ready(process, log, start_seconds)
        drained = asyncio.create_task(_stdout(process).read())  # a full pipe would stop the server
        yield ChildServer(address, metrics_port, process.pid)
    finally:
        if drained is not None:
            drained.cancel()
        await _stop(process, grace_seconds)


async def _wait_until_ready(process: asyncio.subprocess.Process, log: Path, start_seconds: float) -> str:
    try:
        async with asyncio.timeout(start_seconds):
            async for line in _stdout(process):
                if match := _READY.match(line):
                    return match[1].decode()
            await process.wait()
    except TimeoutError as error:
        raise ServerStartError(f"not ready after {start_seconds:.0f} seconds") from error
    lines = log.read_text(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
    raise ServerStartError(said.removeprefix("error: ").removeprefix("motley serve: "))


async def _stop(process: asyncio.subprocess.Process, grace_seconds: float) -> None:
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


def _stdout(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    if process.stdout is None:
        raise RuntimeError("the child's stdout is a pipe")
    return process.stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
