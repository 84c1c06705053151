"""Leases: a worker's hold on a job, for as long as it is heard of.

`mj_<id>_<secret>` is kept as keys are. A lease is there from when its job began to run until the job is queued again
or ends, and no longer; what its token is good for ends in that moment, or when it is past its end, whichever comes
first. Each report renews it. It knows no specs and no streams. Methods block: they run on the database's threads.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, delete, exists, select, update

from motley_server.errors import InvalidArgumentError, UnauthenticatedError
from motley_server.registry.database import Database
from motley_server.registry.job_records import (
    Ending,
    JobRecord,
    JobState,
    Leased,
    LeaseScope,
    NewEvent,
    ReportAnswer,
    WorkerRecord,
)
from motley_server.registry.job_rows import STATE_CHANGE, append_events, change_state
from motley_server.registry.schema import jobs, leases
from motley_server.registry.turns import has_work, take_turn
from motley_server.registry.workers import note_seen, require_worker

ID_BYTES = 8
SECRET_BYTES = 32
MAX_LOST_LEASES = 5
SEEN_EVERY = timedelta(seconds=10)
LATEST = frozenset({"progress", "data", "evaluation", "version"})
LEASE_EXPIRED, TOO_MANY_ATTEMPTS = "LEASE_EXPIRED", "TOO_MANY_ATTEMPTS"

_TEXT = re.compile(r"mj_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[0-9a-f]{16}")
_REASON = re.compile(r"[A-Z0-9_]{0,64}")
_NO_SECRET_SHA256 = bytes(32)
_NOTHING: Mapping[str, str] = {}


class Leases:
    """Lease jobs to workers, for `duration` at a time."""

    def __init__(self, database: Database, duration: timedelta) -> None:
        self._database = database
        self._duration = duration

    def lease(self, worker_name: str) -> Leased | None:
        """Put the next job that a worker can do into its hands; None if there is none.

        Semantics: who gets a turn, `turns` says. To ask in vain costs a look, not a write, but for one every ten
        seconds, by which the worker is seen.
        Raises: NotFoundError (reason=WORKER_NOT_REGISTERED).
        """
        with self._database.reading() as connection:
            worker = require_worker(connection, worker_name)
            if worker.seen_at > self._database.now() - SEEN_EVERY and not has_work(connection, worker):
                return None
        with self._database.writing() as connection:
            now = self._database.now()
            worker = require_worker(connection, worker_name)
            note_seen(connection, worker.name, now)
            job = take_turn(connection, worker)
            return None if job is None else self._begin(connection, now, job, worker)

    def authenticate(self, token: str) -> LeaseScope | None:
        """Return what a token is good for; None for every text that is good for nothing, whatever is wrong with it.

        Semantics: as with keys, takes the same time for a wrong secret as for an unknown id, and remembers nothing.
        """
        match = _TEXT.fullmatch(token)
        if match is None:
            return None
        id, secret = match.groups()
        with self._database.reading() as connection:
            row = connection.execute(_held(id)).mappings().one_or_none()
        kept = _NO_SECRET_SHA256 if row is None else row["secret_sha256"]
        is_proven = hmac.compare_digest(kept, _hash(secret))
        if row is None or not is_proven or row["expires_at"] <= self._database.now():
            return None
        return _scope_of(id, row)

    def check(self, connection: Connection, lease_id: str) -> None:
        """Refuse what a lease that is over would do, inside the transaction that would do it.

        Raises: UnauthenticatedError (reason=LEASE_ENDED).
        """
        self._require(connection, lease_id, self._database.now())

    def report(
        self,
        lease_id: str,
        events: Sequence[NewEvent] = (),
        num_reported: int = 0,
        ending: Ending | None = None,
        latest: Mapping[str, str] = _NOTHING,
    ) -> ReportAnswer:
        """Take what a worker tells, and renew its lease, or end it.

        Semantics: `num_reported` is how many events the lease had reported before these; those that were taken already
        are not taken again, and `latest` only with events that are new, or without any. A job that is given back after
        its cancellation was asked for is cancelled. After an ending, the answer's time is that of the end.
        Raises: UnauthenticatedError (reason=LEASE_ENDED); InvalidArgumentError (reason=OUT_OF_RANGE or INVALID_ENDING).
        """
        _check_report(events, num_reported, ending, latest)
        with self._database.writing() as connection:
            now = self._database.now()
            row = self._require(connection, lease_id, now)
            taken: int = row["num_reported"]
            if num_reported > taken:
                message = f"the lease has reported {taken} events, not {num_reported}: go on from there"
                raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="num_reported")
            new = events[taken - num_reported :]
            append_events(connection, row["job_id"], now, new)
            if latest and (new or not events):
                connection.execute(update(jobs).where(jobs.c.id == row["job_id"]).values(dict(latest)))
            note_seen(connection, row["worker"], now)
            if ending is not None:
                _end(connection, now, row, ending)
                return ReportAnswer(now, row["cancel_requested"])
            expires_at = now + self._duration
            renewed = {"expires_at": expires_at, "num_reported": taken + len(new)}
            connection.execute(update(leases).where(leases.c.id == lease_id).values(renewed))
            return ReportAnswer(expires_at, row["cancel_requested"])

    def expire(self) -> tuple[JobRecord, ...]:
        """End the leases that are past their end, and return their jobs as they are now.

        Semantics: a job is queued again; cancelled, if that was asked for; failed, if it was lost five times.
        """
        with self._database.reading() as connection:
            if not connection.execute(select(exists().where(self._is_over()))).scalar():
                return ()
        with self._database.writing() as connection:
            now = self._database.now()
            rows = connection.execute(_held().where(self._is_over()).order_by(leases.c.expires_at, leases.c.id))
            return tuple(_lose(connection, now, row) for row in rows.mappings().all())

    def _begin(self, connection: Connection, now: datetime, job: JobRecord, worker: WorkerRecord) -> Leased:
        id, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
        expires_at = now + self._duration
        connection.execute(
            leases.insert().values(
                id=id,
                job_id=job.id,
                worker=worker.name,
                secret_sha256=_hash(secret),
                expires_at=expires_at,
                num_reported=0,
            )
        )
        columns = {"worker": worker.name, "attempts": job.attempts + 1, "started_at": job.started_at or now}
        running = change_state(connection, job.id, now, Ending(JobState.RUNNING), columns)
        return Leased(running, f"mj_{id}_{secret}", expires_at, upload_id_of(job.id))

    def _require(self, connection: Connection, lease_id: str, now: datetime) -> RowMapping:
        row = None
        if _ID.fullmatch(lease_id):
            row = connection.execute(_held(lease_id)).mappings().one_or_none()
        if row is None or row["expires_at"] <= now:
            message = "the lease of this job has ended: stop working on it, and ask for another job"
            raise UnauthenticatedError(message, reason="LEASE_ENDED")
        return row

    def _is_over(self) -> ColumnElement[bool]:
        return leases.c.expires_at <= self._database.now()


def upload_id_of(job_id: str) -> str:
    """Return the id of the upload that publishes a job's adapter: every attempt brings the same one."""
    return job_id


def _held(lease_id: str | None = None) -> Select[Any]:
    """Select leases with their jobs: one, or all."""
    of_job = (jobs.c.owner, jobs.c.created_by, jobs.c.adapter_name, jobs.c.datasets, jobs.c.reads, jobs.c.spec)
    query = select(leases, *of_job, jobs.c.cancel_requested, jobs.c.num_lost_leases)
    query = query.join_from(leases, jobs, jobs.c.id == leases.c.job_id)
    return query if lease_id is None else query.where(leases.c.id == lease_id)


def _scope_of(lease_id: str, row: RowMapping) -> LeaseScope:
    plain = {name: row[name] for name in ("worker", "job_id", "owner", "created_by", "adapter_name", "spec")}
    datasets, reads = tuple(row["datasets"]), tuple(row["reads"])
    return LeaseScope(lease_id, upload_id=upload_id_of(row["job_id"]), datasets=datasets, reads=reads, **plain)


def _end(connection: Connection, now: datetime, lease: RowMapping, ending: Ending, lost: int = 0) -> JobRecord:
    """End a lease, and its job or this attempt at it."""
    if ending.state is JobState.QUEUED and lease["cancel_requested"]:
        ending = Ending(JobState.CANCELLED)
    connection.execute(delete(leases).where(leases.c.id == lease["id"]))
    columns = {"num_lost_leases": lease["num_lost_leases"] + lost}
    return change_state(connection, lease["job_id"], now, ending, columns)


def _lose(connection: Connection, now: datetime, lease: RowMapping) -> JobRecord:
    if lease["num_lost_leases"] + 1 >= MAX_LOST_LEASES and not lease["cancel_requested"]:
        message = f"{MAX_LOST_LEASES} times a worker began it and was not heard of again"
        return _end(connection, now, lease, Ending(JobState.FAILED, TOO_MANY_ATTEMPTS, message), lost=1)
    message = f"worker {lease['worker']} was not heard of in time"
    return _end(connection, now, lease, Ending(JobState.QUEUED, LEASE_EXPIRED, message), lost=1)


def _check_report(
    events: Sequence[NewEvent], num_reported: int, ending: Ending | None, latest: Mapping[str, str]
) -> None:
    if any(event.kind == STATE_CHANGE for event in events) or not latest.keys() <= LATEST:
        raise ValueError(f"states are the registry's to change, and only {sorted(LATEST)} are kept beside the events")
    if num_reported < 0:
        message = f"{num_reported} is less than nothing"
        raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="num_reported")
    if ending is not None and ending.state is JobState.RUNNING:
        message = "a lease ends with its job ended, or queued again"
        raise InvalidArgumentError(message, reason="INVALID_ENDING", field="ending.state")
    if ending is not None and not _REASON.fullmatch(ending.reason):
        message = "a reason is at most 64 of A-Z, 0-9 and `_`"
        raise InvalidArgumentError(message, reason="INVALID_ENDING", field="ending.reason")


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
