"""A worker as a child process, beside a child server: started, waited for, and gone again like the server.

Owns how a worker gets ready, and that nobody waits for one that has ended. Knows it by its command line and by what the
server says of it. Runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from motley_client.aio import AsyncClient
from motley_client.child_process import child_process, last_words, stdout_of
from motley_client.demo_child import DemoError

Result = TypeVar("Result")

POLL_SECONDS = 0.2


class ChildWorker:
    """A worker that runs."""

    def __init__(self, process: Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def while_it_runs(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return what a coroutine returns that needs the worker.

        Raises: DemoError, quoting the worker's last line, if that ends first; whatever the coroutine raises.
        """
        doing, ended = asyncio.create_task(work), asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait([doing, ended], return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise DemoError(f"the worker ended: {last_words(self._process, self._log)}")
        finally:
            for task in (doing, ended):
                task.cancel()
            await asyncio.gather(doing, ended, return_exceptions=True)


@asynccontextmanager
async def child_worker(
    client: AsyncClient, address: str, folder: Path, *, start_seconds: float = 60.0, grace_seconds: float = 10.0
) -> AsyncIterator[ChildWorker]:
    """Run `motley worker` on the embedded base for a child server while the block runs.

    Semantics: it has jobs in `folder`/work, and its messages go to `folder`/worker.log. What files of settings say of
    other servers is kept from it.
    Effects: as those of `child_process`; a job that it has is given back to the server.
    Raises: DemoError if it ends, or takes longer than `start_seconds`, before the server has heard of it.
    """
    log = folder / "worker.log"
    arguments = ("worker", "--server", address, "--base", "tiny", "--work-dir", str(folder / "work"))
    no_settings = {"XDG_CONFIG_HOME": str(folder)}
    async with child_process(arguments, log, grace_seconds=grace_seconds, variables=no_settings) as process:
        drained = asyncio.create_task(stdout_of(process).read())  # a full pipe would stop the worker
        worker = ChildWorker(process, log)
        try:
            await _until_known(worker, client, start_seconds)
            yield worker
        finally:
            drained.cancel()


async def _until_known(worker: ChildWorker, client: AsyncClient, start_seconds: float) -> None:
    try:
        async with asyncio.timeout(start_seconds):
            await worker.while_it_runs(_any_worker(client))
    except TimeoutError as error:
        raise DemoError(f"the worker was not ready after {start_seconds:.0f} seconds") from error


async def _any_worker(client: AsyncClient) -> None:
    while not (await client.training_capabilities()).workers:
        await asyncio.sleep(POLL_SECONDS)
