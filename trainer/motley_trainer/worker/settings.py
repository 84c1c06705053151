"""What one worker is told once: who it is, what it trains on, how its jobs run, and how long it waits for what.

Owns no reading of flags and no state. Pure.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from motley_trainer.spec.settings import TrainingMethod

METHODS = tuple(str(method) for method in TrainingMethod)
METHODS_OF_ADAPTERS = tuple(method for method in METHODS if method != TrainingMethod.LOQT)
MAX_RESTARTS = 3  # of a child that died, within one lease


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a worker waits for what.

    Semantics: `poll` is how long a call for a job waits at the server, `idle` the least time from one that brought none
    to the next; `flush` the longest that an event waits to be reported, `heartbeat` the longest from report to report,
    a third of the lease where that is shorter; the pauses are those after a call that met no server; `grace` is what a
    child has to end in; `watch` lies between two looks at its memory; `goodbye` is for a last report when the worker
    shall end; `keep` is how long the directory of a job stays that nobody has touched; `first_fault` and `last_fault`
    are the shortest and the longest pause in which no job is asked for after a fault of the worker's.
    """

    poll_seconds: float = 30.0
    idle_seconds: float = 1.0
    flush_seconds: float = 1.0
    heartbeat_seconds: float = 5.0
    first_pause_seconds: float = 0.2
    last_pause_seconds: float = 5.0
    grace_seconds: float = 30.0
    watch_seconds: float = 0.5
    goodbye_seconds: float = 5.0
    keep_seconds: float = 7 * 24 * 3600.0
    first_fault_seconds: float = 2.0
    last_fault_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class WorkerBase:
    """The base that a worker trains on; `fingerprint` is what its adapters name."""

    directory: Path
    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One worker.

    Semantics: `command` starts a job when its directory is put behind it. `dtype` auto is as the server holds its base.
    A `memory_limit_bytes` of None does not limit; `threads` of None leaves them to torch. With `takes_one` the worker
    ends after one job.
    """

    name: str
    base: WorkerBase
    device: str = "cpu"
    dtype: str = "auto"
    memory_limit_bytes: int | None = None
    nice: int = 10
    threads: int | None = 1
    takes_one: bool = False
    command: tuple[str, ...] = (sys.executable, "-m", "motley_trainer.job")
    timings: Timings = field(default_factory=Timings)
