"""Turns: which queued job a worker gets, so that tenants share workers by their weights, whoever has queued more.

First comes the tenant with the fewest running jobs for its weight. Where that is a tie, as always with one worker,
tenants take turns: a turn moves a tenant on by the inverse of its weight, and whoever comes late begins where the
others are, neither with credit for the time before nor behind. Of a tenant, the oldest job comes first. It knows no
transactions but those that others began, on the database's threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, func, select

from motley_server.registry.job_records import JobRecord, JobState, WorkerRecord
from motley_server.registry.job_rows import job_of
from motley_server.registry.schema import jobs, tenants, training_turns


def has_work(connection: Connection, worker: WorkerRecord) -> bool:
    """Tell whether a job is queued that a worker can do."""
    return bool(connection.execute(select(exists().where(_is_for(worker)))).scalar())


def take_turn(connection: Connection, worker: WorkerRecord) -> JobRecord | None:
    """Return the job that a worker gets, and note whose turn that was; None if there is none."""
    query = (
        select(jobs.c.owner, func.min(jobs.c.created_at), tenants.c.quota_weight, training_turns.c.turn)
        .join(tenants, tenants.c.id == jobs.c.owner)
        .outerjoin(training_turns, training_turns.c.owner == jobs.c.owner)
        .where(_is_for(worker))
        .group_by(jobs.c.owner, tenants.c.quota_weight, training_turns.c.turn)
    )
    waiting = connection.execute(query).all()
    if not waiting:
        return None
    running = _running_jobs(connection)
    common: float = connection.execute(select(func.coalesce(func.max(training_turns.c.turn), 0.0))).scalar_one()
    candidates = [
        (running.get(owner, 0) / weight, _next_turn(turn, weight, common), oldest, owner)
        for owner, oldest, weight, turn in waiting
    ]
    _, turn, _, owner = min(candidates)
    connection.execute(delete(training_turns).where(training_turns.c.owner == owner))
    connection.execute(training_turns.insert().values(owner=owner, turn=turn))
    of_owner = select(jobs).where(_is_for(worker), jobs.c.owner == owner)
    return job_of(connection.execute(of_owner.order_by(jobs.c.created_at, jobs.c.id).limit(1)).mappings().one())


def _next_turn(last: float | None, weight: float, common: float) -> float:
    return common if last is None else max(common, last + 1 / weight)


def _running_jobs(connection: Connection) -> dict[str, int]:
    query = select(jobs.c.owner, func.count()).where(jobs.c.state == JobState.RUNNING.value).group_by(jobs.c.owner)
    return {owner: int(count) for owner, count in connection.execute(query).all()}


def _is_for(worker: WorkerRecord) -> ColumnElement[bool]:
    methods: Sequence[str] = worker.methods
    return and_(
        jobs.c.state == JobState.QUEUED.value,
        jobs.c.method.in_(methods),
        jobs.c.base_fingerprint == worker.base_fingerprint,
    )
