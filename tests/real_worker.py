"""A worker as a process of its own, for tests that kill it: `real_worker.py SERVER DIRECTORY MODE`."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from fake_worker_service import BASE
from motley_client.endpoint import Endpoint
from motley_trainer.worker.metrics import WorkerMetrics
from motley_trainer.worker.settings import WorkerBase, WorkerSettings
from motley_trainer.worker.supervisor import run_worker
from motley_trainer.worker.workplace import Workplace
from worker_house import FAST, KEY, fake_command


def main(server: str, directory: str, mode: str) -> None:
    """Work until a signal comes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = WorkerBase(Path("/bases/tiny"), "tiny", BASE)
    settings = WorkerSettings(name="w1", base=base, command=fake_command(mode), timings=FAST)
    with Workplace(Path(directory)) as workplace:
        asyncio.run(run_worker(settings, Endpoint(server, KEY), workplace, WorkerMetrics()))


if __name__ == "__main__":
    main(*sys.argv[1:])
