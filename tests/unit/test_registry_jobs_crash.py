"""Training through crashes: the connection dies at every statement of a call, and what is found is before it or after.

Every act is tried with its connection dying before its first statement, before its second, and so on, before its
commit, and last with its answer alone lost. Until the act is done, every row must be as it was; the database that is
then opened anew must be whole. Whoever did not hear of the act's end does it again, and that must be one act.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from adapter_registry import content_of
from motley_server.errors import MotleyError
from motley_server.registry.adapters import Adapters
from motley_server.registry.database import Database
from motley_server.registry.job_records import Ending, JobState, Leased
from motley_server.registry.records import Quota
from motley_server.registry.schema import METADATA
from motley_server.registry.tenants import Tenants
from motley_server.registry.uploads import Uploads
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError
from training_registry import Training, digest_of, lease_id_of, progress, rows_in, stage

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]


@dataclass
class Story:
    """What the acts so far have made, by which the next find it."""

    clock: SteppedClock
    leased: list[Leased] = field(default_factory=list)


Act = Callable[[Database, Story], object]


@contextmanager
def dying_at(point: int) -> Iterator[list[str]]:
    """Break the connection before a statement, or a commit, that has a number; collect those that came before it."""
    passed: list[str] = []

    def pass_by(connection: Connection, what: str) -> None:
        if what.startswith(("begin", "select pg_advisory")):
            return
        if len(passed) == point:
            connection.connection.driver_connection.close()
        passed.append(what)

    def before_statement(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        pass_by(connection, statement)

    def before_commit(connection: Connection) -> None:
        pass_by(connection, "commit")

    event.listen(Engine, "before_cursor_execute", before_statement)
    event.listen(Engine, "commit", before_commit)
    try:
        yield passed
    finally:
        event.remove(Engine, "before_cursor_execute", before_statement)
        event.remove(Engine, "commit", before_commit)


# --- the acts --------------------------------------------------------------------------------------------------------


def create(request_id: str) -> Act:
    def act(database: Database, story: Story) -> object:
        return Training.of(database).create("acme", Quota(training_jobs=5), ["data"], request_id)

    return act


def lease(database: Database, story: Story) -> None:
    leased = Training.of(database).leases.lease("w")
    if leased is not None:
        story.leased.append(leased)


def report(database: Database, story: Story) -> object:
    training, lease_id = Training.of(database), lease_id_of(story.leased[-1])
    return training.leases.report(lease_id, [stage("a"), progress(1), progress(2)], 0, latest={"progress": "{}"})


def end(state: JobState) -> Act:
    def act(database: Database, story: Story) -> object:
        lease_id = lease_id_of(story.leased[-1])
        return Training.of(database).leases.report(lease_id, [stage("b")], 0, Ending(state, "", "it is so"))

    return act


def publish(database: Database, story: Story) -> object:
    leases, lease_id = Training.of(database).leases, lease_id_of(story.leased[-1])
    return Adapters(database).publish(
        "acme", "taught", content_of(), ("default",), quota=Quota(), upload_id="up", request_id="up", scope="acme",
        guard=lambda connection: leases.check(connection, lease_id),
    )  # fmt: skip


def cancel(number: int) -> Act:
    def act(database: Database, story: Story) -> object:
        jobs = Training.of(database).jobs
        job = sorted(jobs.list("acme").items, key=lambda job: job.created_at)[number]
        return jobs.cancel("acme", job.id, request_id=f"cancel {number}", scope="acme")

    return act


def wait_and_expire(database: Database, story: Story) -> object:
    training = Training.of(database)
    over = max(leased.expires_at for leased in story.leased)
    story.clock.time = max(story.clock.time, over)
    return training.leases.expire()


def delete(database: Database, story: Story) -> object:
    return Training.of(database).datasets.delete("acme", digest_of("data"), request_id="delete", scope="acme")


# Each in one transaction that writes.
ACTS: dict[str, Act] = {
    "register": lambda database, story: Training.of(database).register(),
    "announce": lambda database, story: Training.of(database).uploads.begin("acme", digest_of("data"), 4),
    "put": lambda database, story: Training.of(database).put("acme"),
    "create": create("one"),
    "create another": create("two"),
    "create a third": create("three"),
    "lease": lease,
    "report": report,
    "begin an upload": lambda database, story: Uploads(database).begin("acme", "up", "taught", 100, Quota()),
    "publish": publish,
    "give back": end(JobState.QUEUED),
    "lease again": lease,
    "lease another": lease,
    "ask to cancel": cancel(1),
    "expire": wait_and_expire,
    "lease once more": lease,
    "end": end(JobState.SUCCEEDED),
    "cancel a queued one": cancel(2),
    "delete": delete,
    "delete a tenant": lambda database, story: Tenants(database).delete("gone", request_id="gone"),
}


# --- looking ---------------------------------------------------------------------------------------------------------


def check_whole(database: Database) -> None:
    """See that what rows say of each other fits."""
    training = Training.of(database)
    jobs = training.jobs.list("acme").items
    running = [job.id for job in jobs if job.state is JobState.RUNNING]
    assert sorted(str(row[1]) for row in rows_in(database, METADATA)["leases"]) == sorted(running)
    for job in jobs:
        events, states = training.events(job), [state for state, _ in training.states(job)]
        assert [number for number, _, _ in events] == list(range(1, job.last_sequence + 1))
        assert states[-1] == job.state.value
        assert states.count("running") == job.attempts
        assert (job.ended_at is not None) == job.state.is_end


def do_dying_ever_later(act: Act, story: Story, database: Database, stride: int) -> int:
    """Do an act with its connection dying ever later, until it lives; return how many points there were."""
    time, before = story.clock.time, rows_in(database, METADATA)
    for point in range(0, 100, stride):
        story.clock.time = time
        with dying_at(point) as passed:
            is_dead = has_failed(act, database, story)
        assert is_dead == bool(passed[point:]), "it fails by itself, or lives on"
        if not is_dead:
            return len(passed)
        assert rows_in(database, METADATA) == before, "it died half done"
    raise AssertionError("it never ends")


def has_failed(act: Act, database: Database, story: Story) -> bool:
    try:
        act(database, story)
    except (MotleyError, SQLAlchemyError):
        return True
    return False


def test_dead_at_every_statement_nothing_is_done_by_half_or_twice(
    backend: str, database_url: str, clock: SteppedClock
) -> None:
    stride = 1 if backend == "sqlite" else 3  # where every death costs the server a process
    opened, story = partial(Database.open, database_url, clock=clock), Story(clock)
    with closing(opened()) as database:
        for tenant in ("acme", "gone"):
            Tenants(database).create(tenant)
        training = Training.of(database)
        training.put("gone")
        training.jobs.cancel("gone", training.create("gone").id)
    points = {}
    for name, act in ACTS.items():
        clock.advance(seconds=1)
        with closing(opened()) as database:
            points[name] = do_dying_ever_later(act, story, database, stride)
        with closing(opened()) as database:
            done = rows_in(database, METADATA)
            check_whole(database)
            if act is not lease:  # whose answer was lost has no token: the lease expires
                has_failed(act, database, story)  # as the ending does, of a lease that has ended
                assert rows_in(database, METADATA) == done, f"{name} is done twice"
    assert min(points.values()) >= 3, points
    assert sum(points.values()) >= 120, points
    with closing(opened()) as database:
        jobs = Training.of(database).jobs.list("acme").items
        assert [job.state.value for job in jobs] == ["cancelled", "cancelled", "succeeded"]
        assert [job.attempts for job in jobs] == [0, 1, 3]
        assert Adapters(database).list("acme").items[0].latest.version == 1
