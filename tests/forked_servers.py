"""A server that forks from a process which has torch loaded: a process of its own to kill, without seconds of imports.

For tests of what a server does. That `motley serve` starts from nothing is for others to show.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from motley_client import cli
from motley_client.child_server import ChildServer

START_SECONDS = 120.0
GRACE_SECONDS = 10.0
READY = re.compile(r"^ready on (\S+)$", re.MULTILINE)
# What a server over the embedded base has imported by the time that it is ready.
PRELOADED = (
    "motley_client.cli", "motley_server.app", "motley_server.engine.engine", "motley_server.library.opening",
    "motley_bases.loader", "transformers.models.llama.modeling_llama", "motley_kernels.adapter_delta.singles_kernel",
)  # fmt: skip
FORKING = multiprocessing.get_context("forkserver")


def _serve(arguments: Sequence[str], printed: Path, log: Path) -> None:
    for descriptor, path in ((1, printed), (2, log)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), descriptor)
    for name in [name for name in os.environ if name.startswith("MOTLEY_")]:
        del os.environ[name]
    sys.argv = ["motley", "serve", "--listen", "127.0.0.1:0", "--metrics", "", *arguments]
    cli.main()


@contextmanager
def blocking_forked_server(arguments: Sequence[str], folder: Path) -> Iterator[ChildServer]:
    """Run `motley serve` on a free loopback port, without metrics, while the block runs.

    Semantics: `arguments` go to `serve` after those; its messages are added to `folder`/server.log.
    Effects: at the end SIGTERM, and SIGKILL if that is not enough.
    """
    printed, log = folder / "server.out", folder / "server.log"
    printed.unlink(missing_ok=True)
    FORKING.set_forkserver_preload(list(PRELOADED))
    process = FORKING.Process(target=_serve, args=(list(arguments), printed, log))
    process.start()
    try:
        yield ChildServer(_wait_until_ready(process, printed, log), 0, process.pid or 0)
    finally:
        process.terminate()
        process.join(GRACE_SECONDS)
        process.kill()
        process.join()
        process.close()


@asynccontextmanager
async def forked_server(arguments: Sequence[str], folder: Path) -> AsyncIterator[ChildServer]:
    """Run `motley serve` as `blocking_forked_server` does, in the midst of an event loop."""
    running = blocking_forked_server(arguments, folder)
    server = await asyncio.to_thread(running.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


def _wait_until_ready(process: BaseProcess, printed: Path, log: Path) -> str:
    until = time.monotonic() + START_SECONDS
    while not (printed.exists() and (ready := READY.search(printed.read_text()))):
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < until, "it does not get ready"
        time.sleep(0.02)
    return ready[1]
