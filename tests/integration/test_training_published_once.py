"""A worker that dies while it publishes: another one goes on, and its job has made one version, neither none nor two.

The server's shell, its registry and the workers are real; adapters and jobs are of paper. The worker is killed at
moments that are known to the call, because the server is in this process.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from motley_client import AdapterVersion, AsyncClient, JobState, LoraSettings, PublishSettings, TrainingSpec
from motley_trainer.worker.stopping import Stop
from motley_trainer.worker.workplace import Workplace
from paper_worker import paper_worker
from rpc_harness import Shell, serving
from training_calls import DATA, FINGERPRINT, digest_of, let_pass

SCRIPT = Path(__file__).parents[1] / "paper_worker.py"
SPEC = TrainingSpec(dataset=digest_of(DATA), settings=LoraSettings(), publish=PublishSettings("trained", ("prod",)))
SECONDS = 30.0  # that nothing here should take
Process = asyncio.subprocess.Process


class Moment:
    """The first of the server's calls of a kind, in which the worker that asked for it dies.

    Semantics: where it is `cut`, what the worker asked for has not arrived, and is not done.
    """

    def __init__(self, owner: object, name: str, *, is_cut: bool, ends: bool = False) -> None:
        """Wait for a call of this name, one that tells of an end if it `ends`."""
        self._call: Callable[..., Awaitable[Any]] = getattr(owner, name)
        self._is_cut = is_cut
        self._ends = ends
        self.victim: Process | None = None
        self.rest: asyncio.Task[Any] | None = None
        self.has_come = asyncio.Event()
        setattr(owner, name, self)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.has_come.is_set() or (self._ends and args[0].ending is None):
            return await self._call(*args, **kwargs)
        self.rest = asyncio.create_task(self._die(args, kwargs))
        return await asyncio.shield(self.rest)  # nobody waits for the answer any more

    async def _die(self, args: Any, kwargs: Any) -> Any:
        assert self.victim is not None
        self.victim.kill()
        self.has_come.set()
        assert await self.victim.wait() == -signal.SIGKILL
        return None if self._is_cut else await self._call(*args, **kwargs)


@asynccontextmanager
async def mortal_worker(shell: Shell, directory: Path, letter: str) -> AsyncIterator[Process]:
    """Run a worker as a process while the block runs, or until it is killed."""
    command = (sys.executable, str(SCRIPT), f"127.0.0.1:{shell.port}", str(directory), FINGERPRINT, letter)
    with directory.with_suffix(".log").open("wb") as messages:
        process = await asyncio.create_subprocess_exec(*command, stderr=messages)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def worker(shell: Shell, directory: Path, letter: str) -> AsyncIterator[None]:
    """Run a worker in this process while the block runs."""
    with Workplace(directory) as workplace:
        stop = Stop()
        working = paper_worker(f"127.0.0.1:{shell.port}", workplace, FINGERPRINT, letter, stop)
        running = asyncio.create_task(working.run())
        try:
            yield
        finally:
            stop.interrupt()
            await running


def in_call(find: Callable[[Shell], object], name: str, **how: bool) -> Callable[[Shell], Moment]:
    return lambda shell: Moment(find(shell), name, **how)


MOMENTS: dict[str, Callable[[Shell], Moment]] = {
    "its bytes are on their way": in_call(lambda shell: shell.library.desk, "write", is_cut=False),
    "all bytes are there": in_call(lambda shell: shell.library.desk._publishing, "publish", is_cut=True),
    "a version is being made": in_call(lambda shell: shell.library.desk._publishing, "publish", is_cut=False),
    "nobody was told of it": in_call(lambda shell: shell.training.job_desk, "report", is_cut=True, ends=True),
    "the report is being taken": in_call(lambda shell: shell.training.job_desk, "report", is_cut=False, ends=True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_job_whose_worker_dies_while_it_publishes_has_one_version(tmp_path: Path, moment: str) -> None:
    publish_once(tmp_path, moment, "a")


@pytest.mark.parametrize("moment", ["its bytes are on their way", "a version is being made", "nobody was told of it"])
def test_a_job_that_goes_on_elsewhere_to_other_bytes_has_one_version(tmp_path: Path, moment: str) -> None:
    publish_once(tmp_path, moment, "b")


def publish_once(folder: Path, moment: str, second: str) -> None:
    """Kill a worker at a moment, and let a second one go on, in the first one's directory if it is called the same."""

    async def scenario() -> None:
        async with serving() as shell, AsyncClient(f"127.0.0.1:{shell.port}", timeout=SECONDS) as client:
            dying = MOMENTS[moment](shell)
            await client.upload_dataset(DATA.decode().splitlines())
            job = await client.create_training_job(SPEC)
            async with mortal_worker(shell, folder / "a", "a") as dying.victim, asyncio.timeout(SECONDS):
                await dying.has_come.wait()
                assert dying.rest is not None
                await dying.rest
            let_pass(shell, 31)
            await shell.training.keeper.end_leases()
            async with worker(shell, folder / second, second):
                events = [event.event async for event in client.watch_training_job(job.id, timeout=SECONDS)]
            ended = await client.get_training_job(job.id)
            assert (ended.state, ended.reason, ended.message) == (JobState.SUCCEEDED, "", "")
            [version] = [one async for one in client.list_adapter_versions("trained")]
            [published] = [one for one in events if isinstance(one, AdapterVersion)]
            assert ended.version == published
            assert (published.version, published.digest) == (version.version, version.digest) == (1, version.digest)
            assert version.labels == {"motley.job": job.id}
            assert (await client.get_adapter("trained@prod")).version.version == 1

    asyncio.run(scenario())
