"""Jobs between the database's rows, our records, and answers kept as JSON; and the two changes that every job's life
is made of: events are added to it, and its state becomes another.

A state never changes without an event that says so. It knows no leases, and no transactions but those that others
began, on the database's threads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, select, update

from motley_server.errors import NotFoundError
from motley_server.registry.idempotency import Answer
from motley_server.registry.job_records import Ending, JobEvent, JobRecord, JobState, NewEvent
from motley_server.registry.schema import from_microseconds, job_events, jobs, to_microseconds

MAX_PROGRESS_EVENTS = 1000
MAX_ROUTING_EVENTS = 100  # of which one has a number for every expert of every Linear
MAX_MERGES_EVENTS = 1000  # of which one has what was merged from one checkpoint to the next
MAX_MESSAGE_CHARACTERS = 4000
PROGRESS, ROUTING, MERGES = "progress", "routing", "merges"
STATE_CHANGE = "state_change"

_ID = re.compile(r"job-[0-9a-f]{16}")
_TIMES = ("created_at", "started_at", "ended_at")
_FIELDS = tuple(field.name for field in fields(JobRecord))


def find_job(connection: Connection, job_id: str) -> JobRecord | None:
    """Return a job, whosever it is."""
    if not _ID.fullmatch(job_id):
        return None
    row = connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one_or_none()
    return None if row is None else job_of(row)


def require_job(connection: Connection, owner: str, job_id: str) -> JobRecord:
    """Return a tenant's job.

    Raises: NotFoundError (reason=JOB_NOT_FOUND).
    """
    found = find_job(connection, job_id)
    if found is None or found.owner != owner:
        raise NotFoundError(f"you have no training job {job_id[:40]!r}", reason="JOB_NOT_FOUND", field="id")
    return found


def job_of(columns: RowMapping | Mapping[str, Any]) -> JobRecord:
    """Return the job of a row."""
    values = {name: columns[name] for name in _FIELDS}
    values |= {"state": JobState(values["state"])}
    return JobRecord(**values | {name: tuple(values[name]) for name in ("datasets", "reads")})


def event_of(columns: RowMapping) -> JobEvent:
    """Return the event of a row."""
    return JobEvent(columns["sequence"], columns["time"], columns["kind"], columns["body"])


def job_answer(job: JobRecord) -> Answer:
    """Return a job in values that JSON has."""
    times = {name: getattr(job, name) for name in _TIMES}
    moments = {name: None if time is None else to_microseconds(time) for name, time in times.items()}
    return asdict(job) | {"state": job.state.value} | moments


def job_answered(answer: Answer) -> JobRecord:
    """Return the job that `job_answer` was made from."""
    values: dict[str, Any] = dict(answer)
    for name in _TIMES:
        values[name] = None if values[name] is None else from_microseconds(values[name])
    return job_of(values)


def append_events(connection: Connection, job_id: str, now: datetime, events: Sequence[NewEvent]) -> None:
    """Give events the next numbers of a job, and forget its oldest of a kind that there is too much of."""
    if not events:
        return
    is_job = jobs.c.id == job_id
    last: int = connection.execute(select(jobs.c.last_sequence).where(is_job)).scalar_one()
    rows = [
        {"job_id": job_id, "sequence": sequence, "time": now, "kind": event.kind, "body": event.body}
        for sequence, event in enumerate(events, last + 1)
    ]
    connection.execute(job_events.insert(), rows)
    connection.execute(update(jobs).where(is_job).values(last_sequence=last + len(rows)))
    for kind, most in ((PROGRESS, MAX_PROGRESS_EVENTS), (ROUTING, MAX_ROUTING_EVENTS), (MERGES, MAX_MERGES_EVENTS)):
        if any(event.kind == kind for event in events):
            _thin_out(connection, job_id, kind, most)


def change_state(
    connection: Connection, job_id: str, now: datetime, change: Ending, columns: Mapping[str, Any] | None = None
) -> JobRecord:
    """Have a job in another state, with further columns that change with it; return it as it is then."""
    message = _printable_in_sql(change.message)[:MAX_MESSAGE_CHARACTERS]
    values: dict[str, Any] = {"state": change.state.value, "reason": change.reason, "message": message}
    if change.state.is_end:
        values["ended_at"] = now
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(values | dict(columns or {})))
    append_events(connection, job_id, now, [_state_change(change.state, change.reason, message)])
    return job_of(connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one())


def _state_change(state: JobState, reason: str, message: str) -> NewEvent:
    """Return the one event that the registry itself writes, as the wire spells it in JSON."""
    said = {"state": f"JOB_STATE_{state.name}", "reason": reason, "message": message}
    return NewEvent(STATE_CHANGE, json.dumps({STATE_CHANGE: {name: text for name, text in said.items() if text}}))


def _thin_out(connection: Connection, job_id: str, kind: str, most: int) -> None:
    """Keep the newest events of a kind."""
    columns = job_events.c
    is_meant = (columns.job_id == job_id) & (columns.kind == kind)
    newest = select(columns.sequence).where(is_meant).order_by(columns.sequence.desc())
    first_kept = connection.execute(newest.offset(most - 1).limit(1)).scalar()
    if first_kept is not None:
        connection.execute(delete(job_events).where(is_meant, columns.sequence < first_kept))


def _printable_in_sql(text: str) -> str:
    # What a dying process said last may be anything, and PostgreSQL takes neither of these.
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return whole.replace("\0", "\N{REPLACEMENT CHARACTER}")
