"""Training jobs: what tenants have asked for, in which order, how far it has come, and how it ended.

A job is queued, is leased by a worker, perhaps more than once, and ends; an ended job never changes. Everything that
happens to it is an event with the next number. It knows no specs and no leases. Methods block: they run on the
database's threads.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta

from sqlalchemy import and_, delete, func, or_, select, update

from motley_server.errors import FailedPreconditionError, InvalidArgumentError, OutOfRangeError
from motley_server.registry import pages
from motley_server.registry.database import Database
from motley_server.registry.dataset_records import dataset_not_found
from motley_server.registry.datasets import find_dataset
from motley_server.registry.holdings import check_room, check_room_for_job
from motley_server.registry.idempotency import Request
from motley_server.registry.job_records import Ending, JobEvent, JobRecord, JobState, NewJob
from motley_server.registry.job_rows import change_state, event_of, job_answer, job_answered, job_of, require_job
from motley_server.registry.ownership import check_adapter_name
from motley_server.registry.records import Page, Quota
from motley_server.registry.schema import from_microseconds, job_events, jobs, to_microseconds
from motley_server.registry.tenants import has_tenant, tenant_not_found

ID_BYTES = 8
MAX_EVENTS = 1000
MAX_FORGOTTEN = 100  # in one transaction, for each may have thousands of events


class Jobs:
    """Keep jobs. `create` and `cancel` take a request id, whose repeat has the same answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, new: NewJob, quota: Quota, adapter_bytes: int = 0, *, request_id: str = "", scope: str = ""
    ) -> JobRecord:
        """Queue a job, whose adapter, if it publishes one, will have at least so many bytes.

        Semantics: two requests are the same if owner and spec are: what the server made of the spec may differ by then.
        Raises: InvalidArgumentError (reason=INVALID_ADAPTER_NAME or INVALID_REQUEST_ID); NotFoundError
        (reason=TENANT_NOT_FOUND, or DATASET_NOT_FOUND with the field `datasets[i]`); ResourceExhaustedError
        (reason=QUOTA_TRAINING_JOBS, or as `check_room`: what could not be published as things stand is not trained);
        AlreadyExistsError (reason=REQUEST_ID_REUSED).
        """
        if new.adapter_name is not None:
            check_adapter_name(new.adapter_name)
        request = Request.of("jobs.create", scope, request_id, owner=new.owner, spec=new.spec)
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return job_answered(answer)
            if not has_tenant(connection, new.owner):
                raise tenant_not_found(new.owner, "owner")
            for number, digest in enumerate(new.datasets):
                if find_dataset(connection, new.owner, digest) is None:
                    raise dataset_not_found(f"datasets[{number}]")
            check_room_for_job(connection, new.owner, quota)
            if new.adapter_name is not None:
                check_room(connection, new.owner, new.adapter_name, adapter_bytes, quota)
            job_id = f"job-{secrets.token_hex(ID_BYTES)}"
            blank = {
                "reason": "",
                "message": "",
                "worker": "",
                "attempts": 0,
                "num_lost_leases": 0,
                "held_seconds": 0.0,
            }
            blank |= {"state": JobState.QUEUED.value, "cancel_requested": False, "last_sequence": 0}
            connection.execute(jobs.insert().values(asdict(new) | blank | {"id": job_id, "created_at": now}))
            job = change_state(connection, job_id, now, Ending(JobState.QUEUED))
            request.keep_answer(connection, now, job_answer(job))
            return job

    def get(self, owner: str, id: str) -> JobRecord:
        """Return a tenant's job.

        Raises: NotFoundError (reason=JOB_NOT_FOUND).
        """
        with self._database.reading() as connection:
            return require_job(connection, owner, id)

    def list(
        self, owner: str, state: JobState | None = None, page_size: int = 0, page_token: str = ""
    ) -> Page[JobRecord]:
        """Return a tenant's next jobs, in one state or in all, the newest first.

        Raises: InvalidArgumentError (reason=BAD_PAGE_TOKEN or OUT_OF_RANGE).
        """
        size = pages.page_size(page_size)
        listing = f"jobs of {owner} in {'any state' if state is None else state.value}"
        position = pages.decode_position(self._database.page_secret, listing, page_token)
        query = select(jobs).where(jobs.c.owner == owner)
        query = query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(size + 1)
        if state is not None:
            query = query.where(jobs.c.state == state.value)
        if position is not None:
            created_at, id = from_microseconds(int(position[0])), position[1]
            same_moment = and_(jobs.c.created_at == created_at, jobs.c.id < id)
            query = query.where(or_(jobs.c.created_at < created_at, same_moment))
        with self._database.reading() as connection:
            found = tuple(job_of(row) for row in connection.execute(query).mappings())
        if len(found) <= size:
            return Page(found, "")
        last = found[size - 1]
        after: pages.Position = [to_microseconds(last.created_at), last.id]
        return Page(found[:size], pages.encode_position(self._database.page_secret, listing, after))

    def cancel(self, owner: str, id: str, *, request_id: str = "", scope: str = "") -> JobRecord:
        """End a queued job at once; ask the worker of a running one to end it, once however often it is said.

        Raises: NotFoundError (reason=JOB_NOT_FOUND); FailedPreconditionError (reason=JOB_ENDED); InvalidArgumentError
        (reason=INVALID_REQUEST_ID); AlreadyExistsError (reason=REQUEST_ID_REUSED).
        """
        request = Request.of("jobs.cancel", scope, request_id, owner=owner, id=id)
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return job_answered(answer)
            job = require_job(connection, owner, id)
            if job.state.is_end:
                message = f"{id} has ended: it {_HOW_IT_ENDED[job.state]}"
                raise FailedPreconditionError(message, reason="JOB_ENDED", field="id")
            asked = {"cancel_requested": True}
            if job.state is JobState.QUEUED:
                job = change_state(connection, id, now, Ending(JobState.CANCELLED), asked)
            else:
                connection.execute(update(jobs).where(jobs.c.id == id).values(asked))
                job = require_job(connection, owner, id)
            request.keep_answer(connection, now, job_answer(job))
            return job

    def events(self, owner: str, id: str, after: int = 0, limit: int = 100) -> tuple[JobEvent, ...]:
        """Return a job's next events after a number, in their order.

        Semantics: numbers grow, with holes where old progress was forgotten. At most 1000.
        Raises: NotFoundError (reason=JOB_NOT_FOUND); InvalidArgumentError (reason=OUT_OF_RANGE); OutOfRangeError
        (reason=NO_SUCH_EVENT) after a number that no event has yet.
        """
        if after < 0:
            message = f"{after} is less than nothing"
            raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="after_sequence")
        with self._database.reading() as connection:
            job = require_job(connection, owner, id)
            if after > job.last_sequence:
                message = f"{id} has no event {after} yet: its last is {job.last_sequence}"
                raise OutOfRangeError(message, reason="NO_SUCH_EVENT", field="after_sequence")
            query = select(job_events).where(job_events.c.job_id == id, job_events.c.sequence > after)
            query = query.order_by(job_events.c.sequence).limit(min(limit, MAX_EVENTS))
            return tuple(event_of(row) for row in connection.execute(query).mappings())

    def forget_ended(self, kept: timedelta) -> int:
        """Forget jobs that ended longer ago than they are kept, with their events, and return how many: some at a time.

        Semantics: what they have published stays, and says in its labels and its manifest where it is from.
        """
        before = self._database.now() - kept
        stale = select(jobs.c.id).where(jobs.c.ended_at < before).order_by(jobs.c.ended_at).limit(MAX_FORGOTTEN)
        with self._database.reading() as connection:
            found = list(connection.execute(stale).scalars())
        if not found:
            return 0
        with self._database.writing() as connection:
            return connection.execute(delete(jobs).where(jobs.c.id.in_(found))).rowcount

    def counts(self) -> Mapping[JobState, int]:
        """Return how many jobs of all tenants are in each state."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        with self._database.reading() as connection:
            found = {state: int(count) for state, count in connection.execute(query).all()}
        return {state: found.get(state.value, 0) for state in JobState}


_HOW_IT_ENDED = {
    JobState.SUCCEEDED: "succeeded",
    JobState.REJECTED: "did not pass its gate",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "was cancelled",
}
