"""A worker as a process of its own whose jobs make adapters that do not exist, for servers of a base that does not.

`paper_worker.py SERVER DIRECTORY FINGERPRINT LETTER`: what a job makes is bytes of that letter, all the same. The
worker is the real one; a job's process is `JOB`, which has its result at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from motley_client.endpoint import Endpoint
from motley_trainer.worker.metrics import WorkerMetrics
from motley_trainer.worker.settings import WorkerBase, WorkerSettings
from motley_trainer.worker.stopping import Stop
from motley_trainer.worker.supervisor import Worker
from motley_trainer.worker.workplace import Workplace
from worker_house import FAST

JOB = """
import json, pathlib, sys
letter, folder = sys.argv[1], pathlib.Path(sys.argv[2])
adapter = folder / "adapter"
adapter.mkdir()
(adapter / "adapter_config.json").write_text("lora")
(adapter / "adapter_model.safetensors").write_text(letter * 3000)
evaluation = {"num_samples": 1, "loss_before": 2.0, "loss_after": 1.0}
result = {"digest": "sha256:1", "evaluation": evaluation, "passed": True, "reason": "", "message": ""}
(folder / "result.json").write_text(json.dumps(result))
"""


def paper_worker(server: str, workplace: Workplace, fingerprint: str, letter: str, stop: Stop) -> Worker:
    """Return a worker of this base, whose jobs make adapters of this letter."""
    command = (sys.executable, "-I", "-S", "-c", JOB, letter)
    base = WorkerBase(Path("/bases/paper"), "paper", fingerprint)
    settings = WorkerSettings(name=letter, base=base, command=command, timings=FAST)
    return Worker(settings, Endpoint(server), workplace, WorkerMetrics(), stop)


def main(server: str, directory: str, fingerprint: str, letter: str) -> None:
    """Work until it is killed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with Workplace(Path(directory)) as workplace:
        asyncio.run(paper_worker(server, workplace, fingerprint, letter, Stop()).run())


if __name__ == "__main__":
    main(*sys.argv[1:])
