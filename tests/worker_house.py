"""A worker and the server that it works for in one process, its jobs in others without a model."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fake_adapter_service import FakeAdapterService
from fake_worker_service import BASE, FakeWorkerService, serving_workers
from motley_client.endpoint import Endpoint
from motley_trainer.worker.made_bases import MadeBases
from motley_trainer.worker.metrics import WorkerMetrics
from motley_trainer.worker.settings import Timings, WorkerBase, WorkerSettings
from motley_trainer.worker.stopping import Stop
from motley_trainer.worker.supervisor import Worker
from motley_trainer.worker.workplace import Workplace

KEY = "mk_worker_key"
SECONDS = 20.0  # that nothing here should take
FAST = Timings(
    poll_seconds=0.1,
    idle_seconds=0.01,
    flush_seconds=0.005,
    heartbeat_seconds=0.05,
    first_pause_seconds=0.01,
    last_pause_seconds=0.03,
    grace_seconds=10.0,
    watch_seconds=0.01,
    goodbye_seconds=0.5,
    first_fault_seconds=0.02,
    last_fault_seconds=0.05,
)


def fake_command(mode: str) -> tuple[str, ...]:
    """Return what starts a job that behaves so."""
    return (sys.executable, "-I", "-S", str(Path(__file__).parent / "fake_job.py"), mode)


@dataclass
class WorkerHouse:
    """Run workers for the fake server, each in the same work directory unless it is told otherwise."""

    fake: FakeWorkerService
    adapters: FakeAdapterService
    address: str
    directory: Path
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    bases: Path | None = None

    def settings(self, mode: str, **changes: object) -> WorkerSettings:
        """Return settings of a worker whose jobs behave so."""
        base = WorkerBase(Path("/bases/tiny"), "tiny", BASE)
        made = WorkerSettings(name="w1", base=base, command=fake_command(mode), timings=FAST)
        return replace(made, **changes)  # type: ignore[arg-type]

    def work(self, mode: str, *steps: Callable[[], bool], stop: Stop | None = None, **changes: object) -> None:
        """Run a worker until each step, one after the other, has come true, and stop it then.

        Semantics: a step may act when it comes true; without steps the worker runs until no job is queued or running.
        """
        settings, stop = self.settings(mode, **changes), stop or Stop()
        all_steps = steps or (self.is_idle,)

        async def run() -> None:
            bases = None if self.bases is None else MadeBases(self.bases)
            with Workplace(self.directory, bases) as workplace:
                worker = Worker(settings, Endpoint(self.address, KEY), workplace, self.metrics, stop)
                running = asyncio.create_task(worker.run())
                for step in all_steps:
                    while not step() and not running.done():
                        await asyncio.sleep(0.002)
                stop.interrupt()
                await running

        asyncio.run(asyncio.wait_for(run(), SECONDS))

    def is_idle(self) -> bool:
        """Tell whether every job has ended."""
        return all(job.state not in ("queued", "running") for job in self.fake.jobs.values())

    def files(self) -> list[str]:
        """List what lies in the directories of jobs."""
        jobs = self.directory / "jobs"
        return sorted(str(path.relative_to(jobs)) for path in jobs.rglob("*"))

    def value(self, name: str, **labels: str) -> float | None:
        """Return a series of the worker's."""
        return self.metrics.registry.get_sample_value(f"motley_worker_{name}", labels)


@contextmanager
def worker_house(directory: Path, lease_seconds: float = 5.0) -> Iterator[WorkerHouse]:
    """Serve jobs and adapters while the block runs."""
    fake = FakeWorkerService(lease_seconds=lease_seconds)
    with serving_workers(fake) as address:
        yield WorkerHouse(fake, fake.adapters, address, directory)


def eventually(is_true: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Wait until something is true, and tell whether it ever was."""
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
