"""Training for a test of the registry: datasets, jobs, workers and leases of a database, and calls of few words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from motley_server.errors import MotleyError
from motley_server.registry.database import Database
from motley_server.registry.dataset_records import DatasetFormat, DatasetRecord
from motley_server.registry.dataset_uploads import DatasetUploads
from motley_server.registry.datasets import Datasets
from motley_server.registry.job_records import Ending, JobRecord, JobState, Leased, NewEvent, NewJob, NewWorker
from motley_server.registry.jobs import Jobs
from motley_server.registry.leases import Leases
from motley_server.registry.records import Quota
from motley_server.registry.workers import Workers
from sqlalchemy import MetaData, select

LEASE = timedelta(seconds=60)
BASE = f"sha256:{'b' * 64}"
NO_LIMITS = Quota()
TABLES = (
    *("tenants", "datasets", "dataset_uploads", "jobs", "job_events", "workers", "leases", "training_turns", "keys"),
    *("requests", "adapters", "adapter_versions", "uploads"),
)  # fmt: skip


def digest_of(mark: str) -> str:
    """Return the name of a dataset that has nothing but a mark in it."""
    return f"sha256:{hashlib.sha256(mark.encode()).hexdigest()}"


def progress(step: int) -> NewEvent:
    return NewEvent("progress", json.dumps({"progress": {"step": str(step)}}))


def stage(text: str) -> NewEvent:
    return NewEvent("stage", json.dumps({"stage": text}))


def refusal(call: Callable[..., object], *args: object, **kwargs: object) -> tuple[type[MotleyError], str, str | None]:
    """Return how a call is refused."""
    with pytest.raises(MotleyError) as caught:
        call(*args, **kwargs)
    return type(caught.value), caught.value.reason, caught.value.field


def rows_in(database: Database, metadata: MetaData) -> dict[str, list[tuple[object, ...]]]:
    """Return every row that training, or a publication, could change."""
    with database.reading() as connection:
        tables = {name: metadata.tables[name] for name in TABLES}
        found = {name: connection.execute(select(table)).all() for name, table in tables.items()}
    return {name: sorted((tuple(row) for row in rows), key=repr) for name, rows in found.items()}


@dataclass(frozen=True, slots=True)
class Training:
    """All of it, over one database."""

    database: Database
    datasets: Datasets
    uploads: DatasetUploads
    jobs: Jobs
    workers: Workers
    leases: Leases

    @classmethod
    def of(cls, database: Database) -> Training:
        of = (Datasets, DatasetUploads, Jobs, Workers)
        datasets, uploads, jobs, workers = (kind(database) for kind in of)
        return cls(database, datasets, uploads, jobs, workers, Leases(database, LEASE))

    def put(self, owner: str = "local", mark: str = "data") -> DatasetRecord:
        return self.datasets.put(owner, digest_of(mark), mark, DatasetFormat.TEXT, len(mark), 1)

    def create(
        self,
        owner: str = "local",
        quota: Quota = NO_LIMITS,
        marks: Sequence[str] = (),
        request_id: str = "",
        **other: str | None,
    ) -> JobRecord:
        """Queue a job, which differs from others in what is said here alone."""
        said: dict[str, Any] = {"method": "lora", "adapter_name": "taught", "base_fingerprint": BASE}
        said |= {"spec": "{}", "created_by": "key"}
        digests = tuple(digest_of(mark) for mark in marks)
        new = NewJob(owner=owner, datasets=digests, reads=("public/other",), **said | other)
        return self.jobs.create(new, quota, request_id=request_id, scope=owner)

    def register(
        self, name: str = "w", methods: Sequence[str] = ("lora", "s2ft"), base: str = BASE, key_id: str = ""
    ) -> None:
        self.workers.register(NewWorker(name, key_id, tuple(methods), base, "cpu", "1.0"))

    def lease(self, name: str = "w", key_id: str = "") -> Leased:
        """Have a worker take the next job, which must be there."""
        leased = self.leases.lease(name, key_id)
        assert leased is not None
        return leased

    def end(self, leased: Leased, state: JobState = JobState.SUCCEEDED, reason: str = "", message: str = "") -> None:
        self.leases.report(lease_id_of(leased), ending=Ending(state, reason, message))

    def events(self, job: JobRecord) -> list[tuple[int, str, object]]:
        """Return a job's events, each with its number, kind and content."""
        events = self.jobs.events(job.owner, job.id, 0, 1000)
        return [(event.sequence, event.kind, json.loads(event.body)[event.kind]) for event in events]

    def states(self, job: JobRecord) -> list[tuple[str, str]]:
        """Return the states that a job was in, each with its reason."""
        said = [content for _, kind, content in self.events(job) if kind == "state_change"]
        return [(content["state"].removeprefix("JOB_STATE_").lower(), content.get("reason", "")) for content in said]


def lease_id_of(leased: Leased) -> str:
    return leased.token.split("_")[1]
