"""What is kept of training jobs, their events, workers and leases, as plain values without SQL and without the wire.

`spec`, `progress`, `data`, `evaluation`, `version`, `base` and the bodies of events are JSON texts that the registry
keeps and does not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum


class JobState(Enum):
    """Where a job is. The last four are ends, which no job leaves."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Tell whether it is over."""
        return self.value not in OPEN_STATES


OPEN_STATES = (JobState.QUEUED.value, JobState.RUNNING.value)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that is about to be queued: whose, by which key, and what a worker needs to be chosen for it.

    Semantics: `adapter_name` is what it publishes, None if that is nothing; `datasets` are digests of the owner's,
    `reads` the adapters that its worker may download.
    """

    owner: str
    created_by: str
    method: str
    adapter_name: str | None
    datasets: tuple[str, ...]
    reads: tuple[str, ...]
    base_fingerprint: str
    spec: str


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is. Most fields are NewJob's; what there is none of yet is None.

    Semantics: `started_at` is the time of the first lease, `attempts` how many there were, `worker` who had the last.
    """

    id: str
    owner: str
    created_by: str
    method: str
    adapter_name: str | None
    datasets: tuple[str, ...]
    reads: tuple[str, ...]
    base_fingerprint: str
    spec: str
    state: JobState
    reason: str
    message: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    attempts: int
    worker: str
    cancel_requested: bool
    progress: str | None
    data: str | None
    evaluation: str | None
    version: str | None
    base: str | None
    last_sequence: int


@dataclass(frozen=True, slots=True)
class NewEvent:
    """Something that happened to a job; `kind` is the name of its field on the wire."""

    kind: str
    body: str


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event with its number, from 1 on, and the time at which the registry heard of it."""

    sequence: int
    time: datetime
    kind: str
    body: str


@dataclass(frozen=True, slots=True)
class NewWorker:
    """What a worker says of itself, and by which key."""

    name: str
    key_id: str
    methods: tuple[str, ...]
    base_fingerprint: str
    device: str
    version: str


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker, when it was last heard of, and whether it has a job."""

    name: str
    key_id: str
    methods: tuple[str, ...]
    base_fingerprint: str
    device: str
    version: str
    seen_at: datetime
    is_busy: bool


@dataclass(frozen=True, slots=True)
class Leased:
    """A job in a worker's hands; the token is shown this once. `upload_id` is the same at every attempt."""

    job: JobRecord
    token: str
    expires_at: datetime
    upload_id: str


@dataclass(frozen=True, slots=True)
class LeaseScope:
    """What the token of a lease is good for."""

    lease_id: str
    worker: str
    job_id: str
    owner: str
    created_by: str
    adapter_name: str | None
    upload_id: str
    datasets: tuple[str, ...]
    reads: tuple[str, ...]
    spec: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a lease ends: in one of a job's ends, or with the job queued again. A reason is a stable word, or empty."""

    state: JobState
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """Until when a lease lasts, and whether its job is to end at the next step.

    Semantics: `overdue` is how the report has ended the job, whose time was over.
    """

    expires_at: datetime
    cancel_requested: bool
    overdue: Ending | None = None
