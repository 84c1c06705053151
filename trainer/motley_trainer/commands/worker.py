"""The trainer's command `motley worker`: trains adapters, and bases, for a server's tenants.

Owns its flags. Imports gRPC when it is used, and torch not at all: jobs run in processes of their own. Runs on the main
thread. Typed errors pass through to the `motley` command, which turns them into one line and an exit code.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from motley_client.cli_options import Server, asks_server, naming_ca_file
from motley_client.settings import endpoint


class Device(StrEnum):
    """Where jobs are trained."""

    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """What jobs compute in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


BasesOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Make bases by LoQT too, and keep them here for good; unless given, none."),
]


@asks_server
def worker(
    server: Server,
    base: Annotated[str, typer.Option(metavar="DIR|tiny", help="Train on this base: the one that the server serves.")],
    work_dir: Annotated[Path, typer.Option(metavar="DIR", help="Keep jobs here; one worker has it alone.")],
    bases: BasesOption = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Be called so; unless given, by host and work directory.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Show /metrics here; unless given, nowhere.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Train here.")] = Device.CPU,
    dtype: Annotated[Dtype, typer.Option(help="Compute in this type; auto is the server's.")] = Dtype.AUTO,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Fail a job that takes more memory than this, such as 24GiB.")
    ] = None,
    nice: Annotated[int, typer.Option(metavar="N", min=0, max=19, help="Give jobs this low a priority.")] = 10,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads of a job; unless given 1 on a CPU, torch's on a GPU."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End after one job.")] = False,
) -> None:
    """Train adapters for a server's tenants: lease jobs, train each in a process of its own, publish what passes.

    The key is one of role worker. SIGTERM keeps a checkpoint of the running job and gives it back to the server.
    """
    from motley_client.channel import credentials_of

    from motley_trainer.sizes import parse_size
    from motley_trainer.worker.identity import default_name, identify_base
    from motley_trainer.worker.made_bases import MadeBases
    from motley_trainer.worker.metrics import HttpEndpoint, WorkerMetrics
    from motley_trainer.worker.settings import WorkerSettings
    from motley_trainer.worker.supervisor import run_worker
    from motley_trainer.worker.workplace import Workplace

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    where = endpoint(server.settings, os.environ)
    limit = None if memory_limit is None else parse_size(memory_limit, field="memory_limit")
    with naming_ca_file():
        credentials_of(where)
    with Workplace(work_dir, None if bases is None else MadeBases(bases)) as workplace:
        settings = WorkerSettings(
            name=name or default_name(workplace.directory),
            base=identify_base(base, workplace.fingerprints),
            device=device.value,
            dtype=dtype.value,
            memory_limit_bytes=limit,
            nice=nice,
            threads=1 if threads is None and device is Device.CPU else threads,
            takes_one=once,
        )
        shown = WorkerMetrics()
        page = None if metrics is None else HttpEndpoint(shown.registry, metrics)
        try:
            asyncio.run(run_worker(settings, where, workplace, shown))
        finally:
            if page is not None:
                page.stop()
