"""How leases end: by their worker, unheard of, past their job's time, or with the key that they were made with.

A lease's row goes in the transaction in which its job ends or is queued again, so that neither is ever without the
other. It knows no tokens, and no transactions but those that others began, on the database's threads.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, delete, select

from motley_server.registry.job_records import Ending, JobRecord, JobState
from motley_server.registry.job_rows import change_state
from motley_server.registry.schema import jobs, keys, leases

MAX_LOST_LEASES = 5
LEASE_EXPIRED, TOO_MANY_ATTEMPTS = "LEASE_EXPIRED", "TOO_MANY_ATTEMPTS"
KEY_REVOKED, TIME_LIMIT = "KEY_REVOKED", "TIME_LIMIT"

_OF_JOB: Final = (
    *(jobs.c.owner, jobs.c.created_by, jobs.c.adapter_name, jobs.c.datasets, jobs.c.reads, jobs.c.spec),
    *(jobs.c.cancel_requested, jobs.c.num_lost_leases, jobs.c.held_seconds),
)


def held(lease_id: str | None = None) -> Select[Any]:
    """Select leases, each with its job and when its key expires: one, or all."""
    query = select(leases, *_OF_JOB, keys.c.expires_at.label("key_expires_at"))
    query = query.join_from(leases, jobs, jobs.c.id == leases.c.job_id)
    query = query.outerjoin(keys, keys.c.id == leases.c.key_id)
    return query if lease_id is None else query.where(leases.c.id == lease_id)


def time_held(lease: RowMapping, now: datetime) -> timedelta:
    """Return how long workers have had the job of a lease, over all of its leases."""
    began_at: datetime = lease["began_at"]
    return timedelta(seconds=lease["held_seconds"]) + (now - began_at)


def end_lease(connection: Connection, now: datetime, lease: RowMapping, ending: Ending, lost: int = 0) -> JobRecord:
    """End a lease, and its job or this attempt at it; what is given back after its cancellation was asked for ends."""
    if ending.state is JobState.QUEUED and lease["cancel_requested"]:
        ending = Ending(JobState.CANCELLED)
    connection.execute(delete(leases).where(leases.c.id == lease["id"]))
    columns = {
        "num_lost_leases": lease["num_lost_leases"] + lost,
        "held_seconds": time_held(lease, now).total_seconds(),
    }
    return change_state(connection, lease["job_id"], now, ending, columns)


def lose_lease(connection: Connection, now: datetime, lease: RowMapping) -> JobRecord:
    """End a lease whose worker was not heard of: the job is queued again, or has failed if that was too often."""
    if lease["num_lost_leases"] + 1 >= MAX_LOST_LEASES and not lease["cancel_requested"]:
        message = f"{MAX_LOST_LEASES} times a worker began it and was not heard of again"
        return end_lease(connection, now, lease, Ending(JobState.FAILED, TOO_MANY_ATTEMPTS, message), lost=1)
    message = f"worker {lease['worker']} was not heard of in time"
    return end_lease(connection, now, lease, Ending(JobState.QUEUED, LEASE_EXPIRED, message), lost=1)


def end_leases_of_keys(connection: Connection, now: datetime, which: ColumnElement[bool]) -> None:
    """End the leases that were made with some keys, by a condition on their columns; it counts as nobody's loss."""
    for lease in connection.execute(held().where(which).order_by(leases.c.id)).mappings().all():
        message = f"the key of worker {lease['worker']} counts no more"
        end_lease(connection, now, lease, Ending(JobState.QUEUED, KEY_REVOKED, message))
