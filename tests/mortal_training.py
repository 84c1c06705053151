"""A server and a worker that are killed while they train, over the same directories again and again.

What is killed is one process: the server, the worker, or the process that trains a job, which the worker started. What
each wrote stays, as after a loss of power that no cache survived. Runs on the test's event loop; all of them are other
processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from forked_servers import forked_server
from job_folders import make_job
from motley_client import (
    AdapterVersion,
    AsyncClient,
    Checkpoint,
    Evaluation,
    JobEvent,
    JobState,
    MotleyClientError,
    StateChange,
    TrainingJob,
    TrainingProgress,
    TrainingSpec,
)
from motley_client.child_process import child_process
from motley_client.convert_training_spec import spec_json
from motley_trainer.worker.work import child_environ

CONFIG = "log_level = 'error'\n[engine]\nkv_cache_bytes = 16777216\nthreads = 1\n[training]\nlease_seconds = {}\n"
PATIENCE_SECONDS = 240.0  # with machines that are busy with other things; nothing here takes as long


class MortalTraining:
    """A server and a worker, each there or not, and the ways to end them."""

    def __init__(self, folder: Path, lease_seconds: float) -> None:
        self.folder = folder
        self._server = AsyncExitStack()
        self._worker = AsyncExitStack()
        self._server_pid = self._worker_pid = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"  # the same after every restart
        (folder / "motley.toml").write_text(CONFIG.format(lease_seconds))
        self.client = AsyncClient(self.address, timeout=60)

    async def __aenter__(self) -> MortalTraining:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self._worker.aclose()
        await self._server.aclose()

    async def start_server(self) -> None:
        """Start the server, or another one in its place, and wait until it answers."""
        await self._server.aclose()
        arguments = ["--listen", self.address, "--config", str(self.folder / "motley.toml")]
        arguments += ["--base", "tiny", "--dtype", "float32", "--data-dir", str(self.folder / "data")]
        server = await self._server.enter_async_context(forked_server(arguments, self.folder))
        self._server_pid = server.pid
        await eventually(self._answers)

    async def start_worker(self) -> None:
        """Start the worker, or another one in its place, in the same directory."""
        await self._worker.aclose()
        arguments = ["worker", "--server", self.address, "--base", "tiny", "--work-dir", str(self.folder / "work")]
        log = self.folder / f"worker-{self._worker_pid}.log"  # of the one after it
        process = await self._worker.enter_async_context(child_process(arguments, log, grace_seconds=10))
        self._worker_pid = process.pid

    def kill_server(self) -> None:
        """End the server at once."""
        os.kill(self._server_pid, signal.SIGKILL)

    def kill_worker(self) -> None:
        """End the worker at once, and with it what it started."""
        os.kill(self._worker_pid, signal.SIGKILL)

    def kill_job(self) -> bool:
        """End the process that trains at once, and tell whether there was one."""
        for pid in children_of(self._worker_pid):
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    def checkpoints(self, job_id: str) -> list[int]:
        """Return the steps of the checkpoints that lie in a job's directory."""
        found = (self.folder / "work" / "jobs" / job_id / "checkpoints").glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in found)

    async def goes_on(self, job_id: str) -> None:
        """Wait until a job has a checkpoint that it has not now."""
        last = max(self.checkpoints(job_id))
        await eventually(lambda: max(self.checkpoints(job_id)) > last)

    async def watch(self, job_id: str) -> list[JobEvent]:
        """Return what happens to a job, once it has ended, whatever becomes of the server meanwhile."""
        return [event async for event in self.client.watch_training_job(job_id, timeout=PATIENCE_SECONDS)]

    async def versions(self, name: str) -> list[AdapterVersion]:
        """Return an adapter's versions, none if there is no such adapter."""
        names = {one.name async for one in self.client.list_adapters()}
        return [one async for one in self.client.list_adapter_versions(name)] if name in names else []

    async def _answers(self) -> bool:
        try:
            await self.client.info()
        except MotleyClientError:
            return False
        return True


def children_of(parent: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


async def eventually(holds: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until something holds, or its coroutine says so, looking often."""
    async with asyncio.timeout(seconds):
        while not (await found if asyncio.iscoroutine(found := holds()) else found):
            await asyncio.sleep(0.005)


async def trained_undisturbed(folder: Path, samples: Sequence[Mapping[str, Any]], spec: TrainingSpec) -> str:
    """Train in a process as a worker starts it, without a worker, and return the adapter's digest."""
    folder.mkdir()
    fields = spec_json(spec)
    make_job(folder, samples, method=fields.pop("method").removeprefix("TRAINING_METHOD_"), **fields)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "motley_trainer.job", str(folder)),
        env=child_environ(os.environ, 1),
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    digest: str = json.loads((folder / "result.json").read_text())["digest"]
    return digest


def check_history(watched: Sequence[JobEvent], recorded: Sequence[JobEvent], job: TrainingJob) -> None:
    """Check that a watch over all kills has seen what is on record, that nothing is there twice, and in its order."""
    assert list(watched) == list(recorded)
    assert [one.sequence for one in recorded] == list(range(1, job.last_sequence + 1))
    events = [one.event for one in recorded]
    states = [one.state for one in events if isinstance(one, StateChange)]
    assert states == [JobState.QUEUED, JobState.RUNNING] * job.attempts + [JobState.SUCCEEDED]
    assert [one for one in events if isinstance(one, AdapterVersion)] == [job.version]
    assert {one for one in events if isinstance(one, Evaluation)} == {job.evaluation}
    kept = 0
    for one in events:
        if isinstance(one, Checkpoint):
            assert one.step > kept, "a checkpoint was told twice"
            kept = one.step
        if isinstance(one, TrainingProgress):
            assert one.step > kept, "a training that had a checkpoint began before it"
