"""Leases: who gets a job, what its token is good for and how long, what is reported, and how a lease ends."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
from adapter_registry import at_once, statements
from motley_server.errors import InvalidArgumentError, NotFoundError, UnauthenticatedError
from motley_server.registry.database import Database
from motley_server.registry.job_records import Ending, JobState, NewEvent, NewWorker
from motley_server.registry.lease_ends import MAX_LOST_LEASES
from motley_server.registry.schema import METADATA, leases
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from training_registry import BASE, LEASE, Training, digest_of, lease_id_of, progress, refusal, stage

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

FORM = re.compile(r"mj_(?P<id>[0-9a-f]{16})_(?P<secret>[A-Za-z0-9_-]{43})")
ENDED = (UnauthenticatedError, "LEASE_ENDED", None)
ENDS = [state for state in JobState if state.is_end]


@pytest.fixture
def training(database: Database) -> Training:
    training = Training.of(database)
    training.register()
    return training


def holds(training: Training, lease_id: str) -> None:
    """Look at a lease as a publication does."""
    with training.database.writing() as connection:
        training.leases.check(connection, lease_id)


# --- workers ---------------------------------------------------------------------------------------------------------


def test_a_worker_is_what_it_said_last(training: Training, clock: SteppedClock) -> None:
    clock.advance(seconds=30)
    training.workers.register(NewWorker("w", "other key", ("lora",), "base", "cuda", "2.0"))
    training.register("Another.one_-9")
    another, w = training.workers.list(timedelta(minutes=1))
    assert (another.name, w.name) == ("Another.one_-9", "w")
    assert (w.key_id, w.methods, w.base_fingerprint, w.device, w.version) == (
        "other key",
        ("lora",),
        "base",
        "cuda",
        "2.0",
    )
    assert (w.seen_at, w.is_busy) == (clock(), False)


def test_a_worker_is_seen_when_it_asks_and_when_it_reports(training: Training, clock: SteppedClock) -> None:
    minute = timedelta(minutes=1)
    clock.advance(seconds=59, microseconds=999_999)
    assert len(training.workers.list(minute)) == 1
    clock.advance(microseconds=1)
    assert training.workers.list(minute) == ()
    assert training.leases.lease("w") is None
    assert [worker.seen_at for worker in training.workers.list(minute)] == [clock()]
    training.create()
    leased = training.lease()
    clock.advance(seconds=30)
    training.leases.report(lease_id_of(leased))
    assert [(worker.seen_at, worker.is_busy) for worker in training.workers.list(minute)] == [(clock(), True)]
    training.end(leased)
    assert [worker.is_busy for worker in training.workers.list(minute)] == [False]


def test_who_asks_in_vain_writes_every_ten_seconds_at_most(training: Training, clock: SteppedClock) -> None:
    training.create(method="other")
    clock.advance(seconds=9)
    with statements() as sent:
        assert training.leases.lease("w") is None
    assert not any(statement.startswith(("begin immediate", "UPDATE", "INSERT", "DELETE")) for statement in sent)
    clock.advance(seconds=1)
    with statements() as sent:
        assert training.leases.lease("w") is None
    assert any(statement.startswith("UPDATE workers") for statement in sent)


def test_who_is_not_registered_gets_no_job_nor_who_was_not_heard_of_for_a_day(
    training: Training, clock: SteppedClock
) -> None:
    training.create()
    missing = (NotFoundError, "WORKER_NOT_REGISTERED", "worker")
    for name in ("W", "", "w\x00", "\udc80", "w" * 100_000):
        assert refusal(training.leases.lease, name) == missing
    clock.advance(days=1)
    training.register("v")
    assert refusal(training.leases.lease, "w") == missing
    assert training.leases.lease("v") is not None


def test_a_worker_says_no_more_than_can_be_shown(training: Training) -> None:
    good = {"name": "w", "device": "cpu", "version": "1"}
    cases = [("name", name) for name in ("", "w" * 65, "a b", "a/b", "ä", "w\n", "w\x00")]
    cases += [(field, text) for field in ("device", "version") for text in ("a\x00", "a\n", "\udc80", "a" * 201)]
    for field, text in cases:
        said = NewWorker(key_id="key", methods=("lora",), base_fingerprint=BASE, **good | {field: text})
        assert refusal(training.workers.register, said) == (InvalidArgumentError, "INVALID_WORKER", field)


# --- leasing ---------------------------------------------------------------------------------------------------------


def test_a_lease_is_a_job_that_runs_and_a_token_for_it(training: Training, clock: SteppedClock) -> None:
    training.put()
    job = training.create(marks=["data"], spec='{"seed": "1"}')
    clock.advance(seconds=5)
    leased = training.lease()
    form = FORM.fullmatch(leased.token)
    assert form is not None
    assert leased.job == training.jobs.get("local", job.id)
    assert (leased.job.state, leased.job.started_at, leased.job.attempts) == (JobState.RUNNING, clock(), 1)
    assert (leased.job.worker, leased.expires_at, leased.upload_id) == ("w", clock() + LEASE, job.id)
    scope = training.leases.authenticate(leased.token)
    assert scope is not None
    assert (scope.lease_id, scope.worker, scope.job_id, scope.owner) == (form["id"], "w", job.id, "local")
    assert (scope.created_by, scope.adapter_name, scope.upload_id) == ("key", "taught", leased.upload_id)
    assert (scope.datasets, scope.reads, scope.spec) == ((digest_of("data"),), ("public/other",), '{"seed": "1"}')
    assert training.states(job) == [("queued", ""), ("running", "")]
    assert training.leases.lease("w") is None


def test_a_worker_gets_only_what_it_can_do_for_its_base(training: Training) -> None:
    training.create(method="goat")
    training.create(base_fingerprint="sha256:other")
    assert training.leases.lease("w") is None
    training.register("w", ["goat", "lora"], BASE)
    assert training.lease().job.method == "goat"
    assert training.leases.lease("w") is None
    training.register("w", ["lora"], "sha256:other")
    assert training.lease().job.base_fingerprint == "sha256:other"
    training.register("w", [])
    training.create()
    assert training.leases.lease("w") is None


def test_workers_that_ask_at_once_get_different_jobs(training: Training) -> None:
    for name in ("v", "x", "y"):
        training.register(name)
    made = {training.create().id for _ in range(3)}
    leased = [result for result in at_once(*(partial(training.leases.lease, name) for name in "vwxy")) if result]
    assert {lease.job.id for lease in leased} == made
    assert len(leased) == 3


def test_the_database_itself_has_no_room_for_a_second_lease_of_a_job(training: Training) -> None:
    training.create()
    training.lease()
    with training.database.reading() as connection:
        row = dict(connection.execute(select(leases)).mappings().one())
    with training.database.writing() as connection, pytest.raises(IntegrityError):
        connection.execute(leases.insert().values(row | {"id": "0" * 16}))


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_of_a_tokens_secret_nothing_but_its_hash_is_kept(training: Training, database: Database) -> None:
    training.create()
    secret = FORM.fullmatch(training.lease().token)["secret"]
    with database.reading() as connection:
        kept = [str(row) for table in METADATA.tables.values() for row in connection.execute(select(table))]
    assert any("job-" in row for row in kept)
    assert not any(secret in row for row in kept)


def test_a_changed_token_is_good_for_nothing(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    training.create()
    training.create()
    token, other = training.lease().token, training.lease().token
    start = len("mj_") + 17
    changed = [token[:place] + ("x" if token[place] != "x" else "y") + token[place + 1 :] for place in (start, 40, 62)]
    swapped = [token[:start] + other[start:], f"mj_{'0' * 16}_{token[start:]}"]
    spoilt = ["", "mj_", token[:-1], f"{token}A", f"{token}\n", f" {token}", f"mk{token[2:]}", token.upper()]
    spoilt += [f"{token[:-1]}\x00", f"{token[:-1]}\udc80", "_" * 1_000_000, "mj_' or 1=1 --_" + token[20:]]
    assert [training.leases.authenticate(wrong) for wrong in changed + swapped + spoilt] == [None] * 17
    assert training.leases.authenticate(token) is not None
    compared: list[int] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(a)) or compare(a, b))
    for shown in (token, changed[0], swapped[1]):
        training.leases.authenticate(shown)
    assert compared == [32, 32, 32]


def test_a_token_is_good_until_its_lease_is_over_to_the_microsecond(training: Training, clock: SteppedClock) -> None:
    training.create()
    leased = training.lease()
    lease_id = lease_id_of(leased)
    clock.advance(seconds=30)
    assert training.leases.report(lease_id).expires_at == clock() + LEASE
    clock.time += LEASE - timedelta(microseconds=1)
    assert training.leases.authenticate(leased.token) is not None
    holds(training, lease_id)
    assert training.leases.expire() == ()
    clock.advance(microseconds=1)
    assert training.leases.authenticate(leased.token) is None
    assert refusal(holds, training, lease_id) == refusal(training.leases.report, lease_id) == ENDED
    assert training.leases.lease("w") is None  # not before somebody ends it
    assert [job.id for job in training.leases.expire()] == [leased.job.id]
    again = training.lease()
    assert training.leases.authenticate(leased.token) is None
    assert training.leases.authenticate(again.token) is not None
    assert refusal(training.leases.report, lease_id) == ENDED
    assert (again.job.attempts, again.upload_id, again.job.started_at) == (2, leased.upload_id, leased.job.started_at)


def test_a_token_is_good_for_nothing_once_its_worker_has_ended_the_lease(training: Training) -> None:
    for state in (*ENDS, JobState.QUEUED):
        training.create()
        leased = training.lease()
        training.end(leased, state)
        assert training.leases.authenticate(leased.token) is None, state
        assert refusal(holds, training, lease_id_of(leased)) == ENDED, state
        assert refusal(training.leases.report, lease_id_of(leased), [stage("late")]) == ENDED, state


def test_what_is_no_leases_id_holds_nothing(training: Training) -> None:
    for lease_id in ("", "0" * 16, "x", "\x00", "\udc80"):
        assert refusal(training.leases.report, lease_id) == refusal(holds, training, lease_id) == ENDED


# --- reports ---------------------------------------------------------------------------------------------------------


def test_what_was_reported_before_is_not_taken_twice(training: Training) -> None:
    job = training.create()
    lease_id = lease_id_of(training.lease())
    report = partial(training.leases.report, lease_id)
    report([stage("a"), stage("b")])
    report([stage("a"), stage("b")], 0, latest={"data": "stale"})  # whose answer was lost
    report([stage("b"), stage("c")], 1)
    report([stage("d")], 3)
    assert [content for _, kind, content in training.events(job) if kind == "stage"] == ["a", "b", "c", "d"]
    assert training.jobs.get("local", job.id).data is None
    assert refusal(report, [stage("f")], 5) == (InvalidArgumentError, "OUT_OF_RANGE", "num_reported")
    assert refusal(report, [stage("f")], -1) == (InvalidArgumentError, "OUT_OF_RANGE", "num_reported")
    assert training.jobs.get("local", job.id).last_sequence == 6


def test_each_lease_counts_its_own_reports(training: Training) -> None:
    job = training.create()
    first = training.lease()
    training.leases.report(lease_id_of(first), [stage("a"), stage("b")])
    training.end(first, JobState.QUEUED)
    training.leases.report(lease_id_of(training.lease()), [stage("c")], 0)
    kinds = [kind for _, kind, _ in training.events(job)]
    assert kinds == ["state_change", "state_change", "stage", "stage", "state_change", "state_change", "stage"]


def test_the_latest_of_each_is_kept_beside_the_events(training: Training) -> None:
    job = training.create()
    report = partial(training.leases.report, lease_id_of(training.lease()))
    report([progress(1)], 0, latest={"progress": "p1", "data": "d"})
    report([progress(2)], 1, latest={"progress": "p2", "evaluation": "e"})
    report([], 2, latest={"version": "v"})
    found = training.jobs.get("local", job.id)
    assert (found.progress, found.data, found.evaluation, found.version) == ("p2", "d", "e", "v")
    with pytest.raises(ValueError, match="only"):
        report([], 2, latest={"state": "succeeded"})
    with pytest.raises(ValueError, match="states"):
        report([NewEvent("state_change", "{}")], 2)


def test_an_ending_comes_after_the_last_events_and_is_the_end(training: Training, clock: SteppedClock) -> None:
    for state in ENDS:
        job = training.create()
        leased = training.lease()
        clock.advance(seconds=5)
        ending = Ending(state, "DISK_FULL", "no \x00 room \udc80" + "x" * 5000)
        answer = training.leases.report(lease_id_of(leased), [stage("last")], 0, ending, {"version": "v"})
        assert (answer.expires_at, answer.cancel_requested) == (clock(), False)
        ended = training.jobs.get("local", job.id)
        assert (ended.state, ended.reason, ended.ended_at, ended.version) == (state, "DISK_FULL", clock(), "v")
        assert ended.message.startswith("no \N{REPLACEMENT CHARACTER} room ?x")
        assert len(ended.message) == 4000
        *_, (_, kind, content), (last, _, change) = training.events(job)
        assert (kind, content, last) == ("stage", "last", ended.last_sequence)
        assert change == {"state": f"JOB_STATE_{state.name}", "reason": "DISK_FULL", "message": ended.message}
        clock.advance(days=1)
        training.register()
        assert training.leases.expire() == ()
        assert training.leases.lease("w") is None
        assert training.jobs.get("local", job.id) == ended


def test_a_lease_ends_with_a_state_that_a_job_can_be_left_in(training: Training) -> None:
    job = training.create()
    leased = training.lease()
    for ending, field in (
        (Ending(JobState.RUNNING), "ending.state"),
        (Ending(JobState.FAILED, "not a word"), "ending.reason"),
        (Ending(JobState.FAILED, "A" * 65), "ending.reason"),
    ):
        refused = refusal(training.leases.report, lease_id_of(leased), [stage("a")], 0, ending)
        assert refused == (InvalidArgumentError, "INVALID_ENDING", field)
    assert training.jobs.get("local", job.id) == leased.job


# --- expiry ----------------------------------------------------------------------------------------------------------


def test_a_job_whose_worker_is_gone_goes_on_with_another(training: Training, clock: SteppedClock) -> None:
    training.register("v")
    lost, held = training.create(), training.create()
    by_job = {leased.job.id: leased for leased in (training.lease(), training.lease())}
    clock.advance(seconds=59)
    training.leases.report(lease_id_of(by_job[held.id]))
    clock.advance(seconds=1)
    assert training.leases.expire() == (training.jobs.get("local", lost.id),)
    assert training.states(lost)[-1] == ("queued", "LEASE_EXPIRED")
    assert training.jobs.get("local", held.id).state is JobState.RUNNING
    again = training.lease("v")
    assert (again.job.id, again.job.worker, again.job.attempts) == (lost.id, "v", 2)
    assert (again.job.reason, again.job.message) == ("", "")


def test_a_job_that_five_workers_were_lost_with_has_failed(training: Training, clock: SteppedClock) -> None:
    job = training.create()
    for attempt in range(1, MAX_LOST_LEASES + 1):
        training.end(training.lease(), JobState.QUEUED)  # given back, which is nobody's loss
        assert training.lease().job.attempts == 2 * attempt
        clock.advance(seconds=60)
        (found,) = training.leases.expire()
        assert (found.state is JobState.FAILED) == (attempt == 5)
    assert (found.reason, found.attempts, found.ended_at) == ("TOO_MANY_ATTEMPTS", 10, clock())
    assert training.states(job)[-1] == ("failed", "TOO_MANY_ATTEMPTS")
    assert training.leases.lease("w") is None


def test_an_expiry_and_a_report_at_once_leave_one_of_them(training: Training, clock: SteppedClock) -> None:
    job = training.create()
    calls: list[Callable[[], object]] = [training.leases.expire] * 2
    for round in range(4):
        leased = training.lease()
        clock.advance(seconds=60)
        at_once(*calls, partial(training.leases.report, lease_id_of(leased), [stage(f"{round}")]))
        assert len(training.states(job)) == 3 + 2 * round
    assert [kind for _, kind, _ in training.events(job)] == ["state_change"] * 9
