"""Leases: a worker's hold on a job, for as long as it is heard of.

`mj_<id>_<secret>` is kept as keys are. A lease is there from when its job began to run until the job is queued again
or ends, and no longer; what its token is good for ends in that moment, or when it is past its end, whichever comes
first. Each report renews it, but not beyond the key that it was made with, nor a job's time. It knows no specs and no
streams. Methods block: they run on the database's threads.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, RowMapping, exists, select, update

from motley_server.errors import InvalidArgumentError, PermissionDeniedError, UnauthenticatedError
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
from motley_server.registry.lease_ends import TIME_LIMIT, end_lease, held, lose_lease, time_held
from motley_server.registry.schema import jobs, keys, leases
from motley_server.registry.turns import has_work, take_turn
from motley_server.registry.workers import note_seen, require_worker

ID_BYTES = 8
SECRET_BYTES = 32
SEEN_EVERY = timedelta(seconds=10)
LATEST = frozenset({"progress", "data", "evaluation", "version", "base"})

_TEXT = re.compile(r"mj_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[0-9a-f]{16}")
_REASON = re.compile(r"[A-Z0-9_]{0,64}")
_NO_SECRET_SHA256 = bytes(32)
_NOTHING: Mapping[str, str] = {}


class Leases:
    """Lease jobs to workers, for `duration` at a time, and to all workers together for `max_held` at most."""

    def __init__(self, database: Database, duration: timedelta, max_held: timedelta | None = None) -> None:
        self._database = database
        self._duration = duration
        self._max_held = max_held

    def lease(self, worker_name: str, key_id: str = "") -> Leased | None:
        """Put the next job that a worker can do into its hands; None if there is none.

        Semantics: who gets a turn, `turns` says. To ask in vain costs a look, not a write, but for one every ten
        seconds, by which the worker is seen. The key, empty for none, must count when the job is lent: whoever waits
        while it is revoked gets none.
        Raises: NotFoundError (reason=WORKER_NOT_REGISTERED); PermissionDeniedError (reason=WORKER_OF_ANOTHER_KEY) for a
        worker that was registered with another key, or without one; UnauthenticatedError (reason=INVALID_KEY).
        """
        with self._database.reading() as connection:
            worker = _require_worker_of(connection, worker_name, key_id)
            if worker.seen_at > self._database.now() - SEEN_EVERY and not has_work(connection, worker):
                return None
        with self._database.writing() as connection:
            now = self._database.now()
            worker = _require_worker_of(connection, worker_name, key_id)
            key_expires_at = _require_key(connection, key_id, now)
            note_seen(connection, worker.name, now)
            job = take_turn(connection, worker)
            return None if job is None else self._begin(connection, now, job, worker, key_expires_at)

    def authenticate(self, token: str) -> LeaseScope | None:
        """Return what a token is good for; None for every text that is good for nothing, whatever is wrong with it.

        Semantics: as with keys, takes the same time for a wrong secret as for an unknown id, and remembers nothing.
        """
        match = _TEXT.fullmatch(token)
        if match is None:
            return None
        id, secret = match.groups()
        with self._database.reading() as connection:
            row = connection.execute(held(id)).mappings().one_or_none()
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
        its cancellation was asked for is cancelled. One that workers have had for too long fails, unless this report
        ends it; then the answer has how it ended. After an ending, the answer's time is that of the end.
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
            overdue = None if ending is not None else self._overdue(row, now)
            if (end := ending or overdue) is not None:
                end_lease(connection, now, row, end)
                return ReportAnswer(now, row["cancel_requested"], overdue)
            expires_at = self._expiry(now, row["key_expires_at"])
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
            rows = connection.execute(held().where(self._is_over()).order_by(leases.c.expires_at, leases.c.id))
            return tuple(lose_lease(connection, now, row) for row in rows.mappings().all())

    def _begin(
        self,
        connection: Connection,
        now: datetime,
        job: JobRecord,
        worker: WorkerRecord,
        key_expires_at: datetime | None,
    ) -> Leased:
        id, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
        expires_at = self._expiry(now, key_expires_at)
        connection.execute(
            leases.insert().values(
                id=id,
                job_id=job.id,
                worker=worker.name,
                key_id=worker.key_id,
                secret_sha256=_hash(secret),
                began_at=now,
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
            row = connection.execute(held(lease_id)).mappings().one_or_none()
        if row is None or row["expires_at"] <= now:
            raise lease_ended()
        return row

    def _expiry(self, now: datetime, key_expires_at: datetime | None) -> datetime:
        """Return until when a lease lasts that is made or renewed now: no longer than its key counts."""
        end = now + self._duration
        return end if key_expires_at is None else min(end, key_expires_at)

    def _overdue(self, lease: RowMapping, now: datetime) -> Ending | None:
        """Return how a job ends that workers have had for longer than any may; None while they have not."""
        if self._max_held is None or time_held(lease, now) <= self._max_held:
            return None
        message = f"workers have had it for more than {self._max_held.total_seconds():g} s, which is all that a job may"
        return Ending(JobState.FAILED, TIME_LIMIT, message)

    def _is_over(self) -> ColumnElement[bool]:
        return leases.c.expires_at <= self._database.now()


def lease_ended() -> UnauthenticatedError:
    """Make the refusal of whatever a lease would do that is over."""
    message = "the lease of this job has ended: stop working on it, and ask for another job"
    return UnauthenticatedError(message, reason="LEASE_ENDED")


def upload_id_of(job_id: str) -> str:
    """Return the id of the upload that publishes a job's adapter: every attempt brings the same one."""
    return job_id


def _require_worker_of(connection: Connection, name: str, key_id: str) -> WorkerRecord:
    worker = require_worker(connection, name)
    if worker.key_id != key_id:
        message = f"worker {name!r} was registered with another key: register it with this one, or choose another name"
        raise PermissionDeniedError(message, reason="WORKER_OF_ANOTHER_KEY", field="worker")
    return worker


def _require_key(connection: Connection, key_id: str, now: datetime) -> datetime | None:
    """Return when a key expires; None for one that does not, and for whoever came without any."""
    if not key_id:
        return None
    row = connection.execute(select(keys.c.expires_at, keys.c.revoked_at).where(keys.c.id == key_id)).one_or_none()
    if row is None or row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
        message = "the key was revoked or has expired while its worker waited for a job"
        raise UnauthenticatedError(message, reason="INVALID_KEY")
    expires_at: datetime | None = row.expires_at
    return expires_at


def _scope_of(lease_id: str, row: RowMapping) -> LeaseScope:
    plain = {name: row[name] for name in ("worker", "job_id", "owner", "created_by", "adapter_name", "spec")}
    datasets, reads = tuple(row["datasets"]), tuple(row["reads"])
    return LeaseScope(lease_id, upload_id=upload_id_of(row["job_id"]), datasets=datasets, reads=reads, **plain)


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
