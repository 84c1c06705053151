"""Leases and the keys that they were made with: whose worker may lease, and what ends when a key does."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
from motley_server.asked import Role
from motley_server.errors import PermissionDeniedError, UnauthenticatedError
from motley_server.registry.database import Database
from motley_server.registry.job_records import Ending, JobState
from motley_server.registry.keys import Keys
from motley_server.registry.leases import Leases
from motley_server.registry.tenants import Tenants
from training_registry import LEASE, Training, lease_id_of, refusal, stage

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

ENDED = (UnauthenticatedError, "LEASE_ENDED", None)
NO_KEY = (UnauthenticatedError, "INVALID_KEY", None)


@pytest.fixture
def training(database: Database) -> Training:
    return Training.of(database)


@pytest.fixture
def key_id(database: Database, training: Training) -> str:
    """Make a worker's key, and register worker `w` with it."""
    key, _ = Keys(database).create("local", Role.WORKER)
    training.register(key_id=key.id)
    return key.id


def test_a_worker_is_lent_jobs_by_the_key_alone_that_it_was_registered_with(
    database: Database, training: Training, key_id: str
) -> None:
    another = Keys(database).create("local", Role.WORKER)[0].id
    job = training.create()
    for stranger in (another, "", "0" * 16):
        of_another = (PermissionDeniedError, "WORKER_OF_ANOTHER_KEY", "worker")
        assert refusal(training.leases.lease, "w", stranger) == of_another
    assert training.lease("w", key_id).job.id == job.id
    training.register("v")
    assert refusal(training.leases.lease, "v", key_id)[1] == "WORKER_OF_ANOTHER_KEY"


def test_with_a_key_end_the_leases_that_were_made_with_it_and_no_others(
    database: Database, training: Training, key_id: str
) -> None:
    training.register("v")
    training.create()
    training.create()
    leased, kept = training.lease("w", key_id), training.lease("v")
    job = leased.job
    training.register(key_id="")  # under the same name, with another key since
    Keys(database).revoke(key_id)
    assert training.leases.authenticate(leased.token) is None
    assert refusal(training.leases.report, lease_id_of(leased), [stage("late")]) == ENDED
    with database.writing() as connection:
        assert refusal(training.leases.check, connection, lease_id_of(leased)) == ENDED
    assert training.states(job)[-1] == ("queued", "KEY_REVOKED")
    assert training.leases.authenticate(kept.token) is not None
    again = training.lease()
    assert (again.job.id, again.job.attempts, again.upload_id) == (job.id, 2, leased.upload_id)
    assert training.jobs.get("local", kept.job.id).state is JobState.RUNNING
    Keys(database).revoke(key_id)
    assert training.leases.authenticate(again.token) is not None


def test_a_cancelled_job_whose_workers_key_is_revoked_is_over(
    database: Database, training: Training, key_id: str
) -> None:
    job = training.create()
    training.lease("w", key_id)
    training.jobs.cancel("local", job.id)
    Keys(database).revoke(key_id)
    assert training.jobs.get("local", job.id).state is JobState.CANCELLED


def test_a_revoked_key_is_no_jobs_loss(database: Database, training: Training, clock: SteppedClock) -> None:
    training.create()
    for _ in range(6):
        next_id = Keys(database).create("local", Role.WORKER)[0].id
        training.register(key_id=next_id)
        assert training.lease("w", next_id).job.state is JobState.RUNNING
        Keys(database).revoke(next_id)
    training.register()
    training.lease()
    clock.advance(seconds=60)
    assert [job.state for job in training.leases.expire()] == [JobState.QUEUED]


def test_a_tenants_leases_end_with_it(database: Database, training: Training) -> None:
    Tenants(database).create("crew")
    key, _ = Keys(database).create("crew", Role.WORKER)
    training.register(key_id=key.id)
    job = training.create()
    leased = training.lease("w", key.id)
    Tenants(database).delete("crew")
    assert training.leases.authenticate(leased.token) is None
    assert training.jobs.get("local", job.id).state is JobState.QUEUED


def test_whoever_waits_while_the_key_is_revoked_is_lent_nothing(
    database: Database, training: Training, key_id: str
) -> None:
    Keys(database).revoke(key_id)
    job = training.create()
    assert refusal(training.leases.lease, "w", key_id) == NO_KEY
    assert training.jobs.get("local", job.id).state is JobState.QUEUED


def test_no_lease_outlasts_its_key(database: Database, training: Training, clock: SteppedClock) -> None:
    expiry = clock() + LEASE + timedelta(seconds=20)
    key, _ = Keys(database).create("local", Role.WORKER, expiry)
    training.register(key_id=key.id)
    job = training.create()
    leased = training.lease("w", key.id)
    assert leased.expires_at == clock() + LEASE
    clock.advance(seconds=30)
    assert training.leases.report(lease_id_of(leased)).expires_at == expiry
    training.end(leased, JobState.QUEUED)
    assert training.lease("w", key.id).expires_at == expiry
    clock.time = expiry
    assert [one.id for one in training.leases.expire()] == [job.id]
    assert refusal(training.leases.lease, "w", key.id) == NO_KEY


def test_a_job_fails_that_workers_have_had_for_too_long(
    database: Database, training: Training, clock: SteppedClock
) -> None:
    training.register()
    job = training.create()
    leases = Leases(database, LEASE, timedelta(seconds=100))
    held = partial(leases.lease, "w")
    first = held()
    assert first is not None
    clock.advance(seconds=50)
    training.end(first, JobState.QUEUED)
    clock.advance(seconds=1000)  # in the queue, which is nobody's time
    second = held()
    assert second is not None
    clock.advance(seconds=50)
    assert leases.report(lease_id_of(second)).overdue is None
    clock.advance(microseconds=1)
    answer = leases.report(lease_id_of(second), [stage("late")])
    assert (answer.overdue and answer.overdue.reason, answer.expires_at) == ("TIME_LIMIT", clock())
    ended = training.jobs.get("local", job.id)
    assert (ended.state, ended.reason, ended.ended_at) == (JobState.FAILED, "TIME_LIMIT", clock())
    assert leases.authenticate(second.token) is None
    assert [content for _, kind, content in training.events(job) if kind == "stage"] == ["late"]


def test_an_end_that_is_reported_counts_however_late(
    database: Database, training: Training, clock: SteppedClock
) -> None:
    training.register()
    leases = Leases(database, LEASE, timedelta(seconds=1))
    job = training.create()
    leased = leases.lease("w")
    assert leased is not None
    clock.advance(seconds=30)
    leases.report(lease_id_of(leased), ending=Ending(JobState.SUCCEEDED))
    assert training.jobs.get("local", job.id).state is JobState.SUCCEEDED
