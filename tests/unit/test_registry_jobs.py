"""Jobs on record: what is kept of one, its events in their order, how it is cancelled, and how many there may be."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
from adapter_registry import at_once
from motley_server.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    MotleyError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
)
from motley_server.registry import job_rows
from motley_server.registry import jobs as jobs_module
from motley_server.registry.database import Database
from motley_server.registry.job_records import JobState, NewEvent
from motley_server.registry.records import Quota
from motley_server.registry.schema import job_events
from motley_server.registry.tenants import Tenants
from sqlalchemy import select
from training_registry import Training, digest_of, lease_id_of, progress, refusal, stage

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

NOT_FOUND = (NotFoundError, "JOB_NOT_FOUND", "id")
NO_IDS = ["", "job-", f"job-{'0' * 16}", f"job-{'0' * 15}", f"job-{'g' * 16}", "0" * 16, "\x00", "\udc80", "a" * 10_000]
BOTH = Quota(training_jobs=2)


@pytest.fixture
def training(database: Database) -> Training:
    return Training.of(database)


# --- creation --------------------------------------------------------------------------------------------------------


def test_a_job_is_queued_as_it_was_asked_for(training: Training, clock: SteppedClock) -> None:
    training.put("local", "data")
    training.put("local", "gate")
    spec = json.dumps({"seed": 7, "name": "\N{SNOWMAN} \x00"})
    made = training.create(marks=["gate", "data"], spec=spec, method="s2ft")
    assert made.id.startswith("job-")
    assert made == training.jobs.get("local", made.id) == training.jobs.list("local").items[0]
    assert (made.owner, made.method, made.adapter_name, made.spec) == ("local", "s2ft", "taught", spec)
    assert (made.datasets, made.reads) == ((digest_of("gate"), digest_of("data")), ("public/other",))
    assert (made.state, made.created_at, made.started_at, made.ended_at) == (JobState.QUEUED, clock(), None, None)
    assert (made.attempts, made.worker, made.cancel_requested, made.reason, made.message) == (0, "", False, "", "")
    assert (made.progress, made.data, made.evaluation, made.version, made.last_sequence) == (None, None, None, None, 1)
    assert training.events(made) == [(1, "state_change", {"state": "JOB_STATE_QUEUED"})]


def test_a_repeat_is_the_same_job_whatever_the_server_makes_of_it_by_then(
    training: Training, clock: SteppedClock
) -> None:
    made = training.create(request_id="one", quota=Quota(training_jobs=1))
    training.register()
    training.lease()
    clock.advance(hours=1)
    again = training.create(
        request_id="one", quota=Quota(training_jobs=1), created_by="new key", base_fingerprint="other"
    )
    assert again == made
    refused = refusal(training.create, request_id="one", spec='{"seed": "8"}')
    assert refused == (AlreadyExistsError, "REQUEST_ID_REUSED", "request_id")
    assert training.create().id != training.create().id
    assert len(training.jobs.list("local").items) == 3


def test_what_a_job_needs_must_be_its_owners(training: Training, tenants: Tenants) -> None:
    tenants.create("other")
    training.put("other", "data")
    training.put("local", "mine")
    refused = refusal(training.create, marks=["mine", "data"])
    assert refused == (NotFoundError, "DATASET_NOT_FOUND", "datasets[1]")
    for owner in ("nobody", "public", "a\x00"):
        assert refusal(training.create, owner) == (NotFoundError, "TENANT_NOT_FOUND", "owner")
    refused = refusal(training.create, adapter_name="No Name")
    assert refused == (InvalidArgumentError, "INVALID_ADAPTER_NAME", "adapter_name")
    assert training.jobs.list("local").items == ()


def test_jobs_that_have_not_ended_count_for_their_tenants_quota_alone(training: Training, tenants: Tenants) -> None:
    tenants.create("other")
    full = (ResourceExhaustedError, "QUOTA_TRAINING_JOBS", "quota.training_jobs")
    training.register()
    queued, running = (training.create("local", BOTH) for _ in range(2))
    leased = training.lease()
    assert refusal(training.create, "local", BOTH, request_id="one") == full
    training.create("other", BOTH)
    training.end(leased, JobState.FAILED)
    training.create("local", BOTH, request_id="one")
    assert refusal(training.create, "local", BOTH) == full
    training.jobs.cancel("local", running.id if leased.job.id == queued.id else queued.id)
    training.create("local", BOTH)
    assert refusal(training.create, "local", Quota(training_jobs=0)) == full
    training.create("local")


def test_an_adapter_that_could_not_be_published_is_not_trained(training: Training) -> None:
    no_names = (ResourceExhaustedError, "QUOTA_ADAPTERS", "quota.adapters")
    assert refusal(training.create, "local", Quota(adapters=0)) == no_names
    assert training.jobs.list("local").items == ()
    training.create("local", Quota(adapters=1, adapter_bytes=0))


def test_of_creations_at_once_as_many_succeed_as_the_quota_has_room_for(training: Training) -> None:
    results = at_once(*[partial(training.create, "local", BOTH)] * 4)
    assert sorted(isinstance(result, MotleyError) for result in results) == [False, False, True, True]
    same = at_once(*[partial(training.create, request_id="one")] * 4)
    assert len({job.id for job in same}) == 1
    assert len(training.jobs.list("local").items) == 3


# --- looking ---------------------------------------------------------------------------------------------------------


def test_a_tenants_job_is_nobody_elses(training: Training, tenants: Tenants) -> None:
    tenants.create("other")
    made = training.create()
    for owner, id in [("other", made.id), *(("local", id) for id in NO_IDS)]:
        assert refusal(training.jobs.get, owner, id) == NOT_FOUND
        assert refusal(training.jobs.cancel, owner, id) == NOT_FOUND
        assert refusal(training.jobs.events, owner, id) == NOT_FOUND
    assert training.jobs.list("other").items == ()
    assert training.jobs.get("local", made.id) == made


def test_pages_hold_every_job_once_the_newest_first(training: Training, tenants: Tenants, clock: SteppedClock) -> None:
    tenants.create("other")
    made = []
    for number in range(5):
        made.append(training.create())
        training.create("other")
        clock.advance(seconds=number % 3 // 2)  # three are made in the same instant
    newest_first = sorted(made, key=lambda job: (job.created_at, job.id), reverse=True)
    listed, token = [], ""
    for _ in range(3):
        page = training.jobs.list("local", None, 2, token)
        listed.extend(page.items)
        token = page.next_page_token
        training.create("other")
    assert (listed, token) == (newest_first, "")
    ended = training.jobs.cancel("local", made[1].id)
    queued = tuple(job for job in newest_first if job.id != ended.id)
    assert training.jobs.list("local", JobState.CANCELLED).items == (ended,)
    assert training.jobs.list("local", JobState.QUEUED, 4).items == queued
    assert training.jobs.list("local", JobState.RUNNING).items == ()
    token = training.jobs.list("local", JobState.QUEUED, 1).next_page_token
    for owner, state in (("local", None), ("other", JobState.QUEUED)):
        refused = refusal(training.jobs.list, owner, state, 1, token)
        assert refused == (InvalidArgumentError, "BAD_PAGE_TOKEN", "page_token")


def test_counts_are_of_all_tenants_and_name_every_state(training: Training, tenants: Tenants) -> None:
    tenants.create("other")
    assert training.jobs.counts() == dict.fromkeys(JobState, 0)
    training.register()
    for owner in ("local", "other", "other", "local"):
        training.create(owner)
    for state in (JobState.REJECTED, JobState.SUCCEEDED):
        training.end(training.lease(), state)
    training.lease()
    counts = training.jobs.counts()
    assert [counts[state] for state in JobState] == [1, 1, 1, 1, 0, 0]


# --- events ----------------------------------------------------------------------------------------------------------


def test_events_are_numbered_in_their_order_and_read_from_any_of_them(training: Training, clock: SteppedClock) -> None:
    job = training.create()
    training.register()
    leased = training.lease()
    clock.advance(seconds=1)
    training.leases.report(lease_id_of(leased), [stage("reading"), progress(1)])
    clock.advance(seconds=1)
    training.leases.report(lease_id_of(leased), [progress(2)], 2)
    found = training.jobs.events("local", job.id)
    assert [event.sequence for event in found] == [1, 2, 3, 4, 5]
    assert [event.kind for event in found] == ["state_change", "state_change", "stage", "progress", "progress"]
    assert [(clock() - event.time).seconds for event in found] == [2, 2, 1, 1, 0]
    assert found[2].body == stage("reading").body
    for after in range(6):
        assert training.jobs.events("local", job.id, after) == found[after:]
    assert training.jobs.events("local", job.id, 1, 2) == found[1:3]
    assert training.jobs.get("local", job.id).last_sequence == 5
    assert refusal(training.jobs.events, "local", job.id, 6) == (OutOfRangeError, "NO_SUCH_EVENT", "after_sequence")
    assert refusal(training.jobs.events, "local", job.id, -1) == (
        InvalidArgumentError,
        "OUT_OF_RANGE",
        "after_sequence",
    )


def test_old_progress_is_forgotten_and_nothing_else(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_rows.MAX_PROGRESS_EVENTS == 1000
    monkeypatch.setattr(job_rows, "MAX_PROGRESS_EVENTS", 3)
    one, other = training.create(), training.create()
    training.register()
    by_job = {leased.job.id: leased for leased in (training.lease(), training.lease())}
    for job in (one, other):
        told = [
            stage("a"),
            progress(1),
            progress(2),
            NewEvent("checkpoint_step", '{"checkpoint_step": "2"}'),
            progress(3),
        ]
        training.leases.report(lease_id_of(by_job[job.id]), told)
    assert [number for number, _, _ in training.events(one)] == [1, 2, 3, 4, 5, 6, 7]
    training.leases.report(lease_id_of(by_job[one.id]), [progress(4), progress(5), stage("b")], 5)
    left = training.events(one)
    assert [number for number, _, _ in left] == [1, 2, 3, 6, 7, 8, 9, 10]
    assert [content["step"] for _, kind, content in left if kind == "progress"] == ["3", "4", "5"]
    assert len(training.events(other)) == 7
    assert training.jobs.get("local", one.id).last_sequence == 10


def test_old_routing_is_forgotten_apart_from_progress(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_rows.MAX_ROUTING_EVENTS == 100
    monkeypatch.setattr(job_rows, "MAX_ROUTING_EVENTS", 2)
    job = training.create()
    training.register()
    lease = lease_id_of(training.lease())
    routing = [NewEvent("routing", json.dumps({"routing": {"modules": {str(number): {}}}})) for number in range(4)]
    training.leases.report(lease, [progress(1), *routing[:3], stage("a")])
    training.leases.report(lease, [progress(2), routing[3]], 5)
    left = [(number, kind) for number, kind, _ in training.events(job)]
    assert left == [
        *((1, "state_change"), (2, "state_change"), (3, "progress")),
        *((6, "routing"), (7, "stage"), (8, "progress"), (9, "routing")),
    ]


def test_old_merges_are_forgotten_and_what_was_made_stays_with_its_job(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_rows.MAX_MERGES_EVENTS == 1000
    monkeypatch.setattr(job_rows, "MAX_MERGES_EVENTS", 2)
    job = training.create(method="loqt", adapter_name=None)
    training.register(methods=["loqt"])
    leased = training.lease()
    scope = training.leases.authenticate(leased.token)
    assert scope is not None
    assert scope.adapter_name is None
    merges = [NewEvent("merges", json.dumps({"merges": {"merges": [{"step": str(step)}]}})) for step in range(3)]
    made = NewEvent("base", json.dumps({"base": {"directory": "/a"}}))
    training.leases.report(lease_id_of(leased), [*merges, made, made], latest={"base": made.body})
    assert [number for number, _, _ in training.events(job)] == [1, 2, 4, 5, 6, 7]
    training.end(leased)
    ended = training.jobs.get("local", job.id)
    assert (ended.state, ended.adapter_name, ended.base) == (JobState.SUCCEEDED, None, made.body)


def test_a_job_that_publishes_nothing_needs_no_room_for_adapters(training: Training) -> None:
    full = Quota(adapters=0, adapter_bytes=0)
    assert refusal(training.create, quota=full)[1] == "QUOTA_ADAPTERS"
    made = training.create(quota=full, adapter_name=None, request_id="mine")
    assert training.create(quota=full, adapter_name=None, request_id="mine") == made


def test_jobs_that_ended_long_ago_are_forgotten_with_their_events(
    training: Training, clock: SteppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "MAX_FORGOTTEN", 1)
    training.register()
    old = [training.create(), training.create()]
    for job in old:
        training.jobs.cancel("local", job.id)
    open_job, kept = training.create(), timedelta(days=9)
    clock.advance(days=9)
    recent = training.create()
    training.jobs.cancel("local", recent.id)
    assert training.jobs.forget_ended(kept) == 0
    clock.advance(microseconds=1)
    assert [training.jobs.forget_ended(kept) for _ in range(3)] == [1, 1, 0]
    assert {job.id for job in training.jobs.list("local").items} == {open_job.id, recent.id}
    with training.database.reading() as connection:
        assert set(connection.execute(select(job_events.c.job_id)).scalars()) == {open_job.id, recent.id}


# --- cancellation ----------------------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_at_once(training: Training, clock: SteppedClock) -> None:
    job = training.create()
    clock.advance(seconds=1)
    ended = training.jobs.cancel("local", job.id, request_id="one")
    assert (ended.state, ended.ended_at, ended.started_at) == (JobState.CANCELLED, clock(), None)
    assert training.states(job) == [("queued", ""), ("cancelled", "")]
    clock.advance(seconds=1)
    assert training.jobs.cancel("local", job.id, request_id="one") == ended == training.jobs.get("local", job.id)
    assert refusal(training.jobs.cancel, "local", job.id) == (FailedPreconditionError, "JOB_ENDED", "id")
    training.register()
    assert training.leases.lease("w") is None


def test_a_running_job_is_asked_to_end_and_its_worker_ends_it(training: Training) -> None:
    job = training.create()
    training.register()
    leased = training.lease()
    assert training.leases.report(lease_id_of(leased)).cancel_requested is False
    asked = training.jobs.cancel("local", job.id)
    assert asked == replace(leased.job, cancel_requested=True) == training.jobs.cancel("local", job.id)
    assert training.leases.report(lease_id_of(leased)).cancel_requested is True
    training.end(leased, JobState.CANCELLED)
    assert training.states(job) == [("queued", ""), ("running", ""), ("cancelled", "")]
    assert refusal(training.jobs.cancel, "local", job.id) == (FailedPreconditionError, "JOB_ENDED", "id")


@pytest.mark.parametrize("gives_back", [True, False])
def test_a_job_that_comes_back_after_it_was_to_end_is_cancelled(
    training: Training, clock: SteppedClock, gives_back: bool
) -> None:
    job = training.create()
    training.register()
    leased = training.lease()
    training.jobs.cancel("local", job.id)
    if gives_back:
        training.end(leased, JobState.QUEUED)
    else:
        clock.advance(minutes=1)
        training.leases.expire()
    assert training.states(job)[-1] == ("cancelled", "")
    assert training.jobs.get("local", job.id).state is JobState.CANCELLED


# --- a tenant's end --------------------------------------------------------------------------------------------------


def test_a_tenant_goes_once_its_jobs_have_ended_and_they_go_with_it(training: Training, tenants: Tenants) -> None:
    tenants.create("acme")
    training.put("acme")
    kept = training.create("local")
    job = training.create("acme", marks=["data"], request_id="one")
    training.register()
    by_owner = {leased.job.owner: leased for leased in (training.lease(), training.lease())}
    has_jobs = (FailedPreconditionError, "TENANT_HAS_JOBS", "id")
    assert refusal(tenants.delete, "acme") == has_jobs
    training.end(by_owner["acme"], JobState.QUEUED)
    assert refusal(tenants.delete, "acme") == has_jobs
    training.jobs.cancel("acme", job.id)
    tenants.delete("acme")
    tenants.create("acme")
    assert training.jobs.list("acme").items == training.datasets.list("acme").items == ()
    assert refusal(training.jobs.events, "acme", job.id) == NOT_FOUND
    assert training.create("acme", request_id="one").id != job.id
    assert training.jobs.get("local", kept.id).state is JobState.RUNNING
