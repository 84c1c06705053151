"""Jobs in any order of calls: the registry has what a plain account of the calls says it has."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from motley_server.errors import FailedPreconditionError, NotFoundError, ResourceExhaustedError, UnauthenticatedError
from motley_server.registry import job_rows, lease_ends, schema
from motley_server.registry.database import Database
from motley_server.registry.job_records import Ending, JobState, NewEvent
from motley_server.registry.records import Quota
from motley_server.registry.tenants import Tenants
from registry_databases import SteppedClock
from training_registry import LEASE, Training, digest_of, progress, stage

OWNERS, MARKS, WORKERS = ("a", "b"), ("one", "two"), ("v", "w")
KEPT_PROGRESS, MAX_LOST = 2, 2
# As often as they stand here.
ACTS = [
    *("create", "create", "lease", "lease", "lease", "report", "report", "end", "come to an end", "come to an end"),
    *("cancel", "delete or put"),
]
ENDS = [JobState.QUEUED, *(state for state in JobState if state is not JobState.RUNNING)]
QUOTA = Quota(training_jobs=3)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

Owner, Mark, Which = (
    st.sampled_from(OWNERS),
    st.sampled_from(MARKS),
    st.integers(0, 4),
)


@dataclass
class Job:
    """What was said of one job."""

    id: str
    owner: str
    mark: str
    kinds: list[str] = field(default_factory=lambda: ["state_change"])
    state: JobState = JobState.QUEUED
    attempts: int = 0
    lost: int = 0
    cancel_requested: bool = False
    as_it_ended: tuple[object, ...] | None = None
    num_seen: int = 0

    def becomes(self, state: JobState) -> None:
        self.state = state
        self.kinds.append("state_change")

    @property
    def kept(self) -> list[tuple[int, str]]:
        """Return which events are still there: of progress, the newest."""
        steps = [number for number, kind in enumerate(self.kinds, 1) if kind == "progress"]
        gone = steps[:-KEPT_PROGRESS]
        return [(number, kind) for number, kind in enumerate(self.kinds, 1) if number not in gone]


@dataclass
class Lease:
    """What was said of one lease, also when it is over."""

    token: str
    job: Job
    expires_at: datetime
    num_reported: int = 0
    is_ended: bool = False


class Queue(RuleBasedStateMachine):
    training: Training  # one for all runs: an open database remembers how it says things
    clock: SteppedClock
    rows: sqlite3.Connection

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []
        self.leases: list[Lease] = []
        self.requests: dict[tuple[str, str, str], Job] = {}
        self.data = {(owner, mark) for owner in OWNERS for mark in MARKS}
        self.limits = ExitStack()
        self.limits.enter_context(patch.object(job_rows, "MAX_PROGRESS_EVENTS", KEPT_PROGRESS))
        self.limits.enter_context(patch.object(lease_ends, "MAX_LOST_LEASES", MAX_LOST))
        with self.training.database.writing() as connection:
            for table in (schema.jobs, schema.training_turns, schema.requests, schema.datasets):
                connection.execute(table.delete())
        for owner, mark in sorted(self.data):
            self.training.put(owner, mark)
        for worker in WORKERS:
            self.training.register(worker)

    def teardown(self) -> None:
        self.limits.close()

    @property
    def time(self) -> datetime:
        return self.clock.time

    def is_living(self, lease: Lease) -> bool:
        return not lease.is_ended and lease.expires_at > self.time

    @property
    def living(self) -> list[Lease]:
        return [lease for lease in self.leases if self.is_living(lease)]

    def open_jobs(self, owner: str) -> list[Job]:
        return [job for job in self.jobs if job.owner == owner and not job.state.is_end]

    def chosen(self, which: int) -> Lease:
        among = self.living if self.living and which else self.leases
        return among[-which % len(among)]

    # Hypothesis would leave out whole rules of a run, and an end that comes takes several: one rule has them all.
    @rule(act=st.sampled_from(ACTS), owner=Owner, mark=Mark, which=Which, few=st.integers(0, 2))
    def act(self, act: str, owner: str, mark: str, which: int, few: int) -> None:
        match act:
            case "create":
                self.create(owner, mark, "again" if few == 2 else "")
            case "lease":
                for worker in (*WORKERS, WORKERS[0])[few:]:
                    self.lease(worker)
            case "report" if self.leases:
                self.clock.time += timedelta(seconds=20 * (which % 2))
                self.tell(self.chosen(which), few, ["progress", "stage", "progress"][: which + 1], None)
            case "end" if self.leases:
                self.tell(self.chosen(which), 0, ["stage"], ENDS[(which + 5 * few) % len(ENDS)])
            case "come to an end" if self.living:
                self.clock.time = min(lease.expires_at for lease in self.living) - few % 2 * timedelta(microseconds=1)
                if which:
                    self.expire()
            case "cancel" if self.jobs:
                self.cancel(which)
            case "delete or put":
                self.delete_or_put_data(owner, mark)

    def create(self, owner: str, mark: str, request_id: str = "") -> None:
        earlier = self.requests.get((owner, mark, request_id))
        spec = {"marks": [mark], "request_id": request_id and f"{request_id}-{mark}"}
        try:
            made = self.training.create(owner, QUOTA, **spec)
        except NotFoundError:
            assert (owner, mark) not in self.data
            assert earlier is None
        except ResourceExhaustedError:
            assert len(self.open_jobs(owner)) == QUOTA.training_jobs
            assert earlier is None
        else:
            if earlier is not None:
                assert made.id == earlier.id
                return
            assert (owner, mark) in self.data
            assert len(self.open_jobs(owner)) < QUOTA.training_jobs
            self.jobs.append(Job(made.id, owner, mark))
            if request_id:
                self.requests[owner, mark, request_id] = self.jobs[-1]
            self.clock.time += timedelta(microseconds=1)

    def lease(self, worker: str) -> None:
        leased = self.training.leases.lease(worker)
        queued = [job for job in self.jobs if job.state is JobState.QUEUED]
        if leased is None:
            assert queued == []
            return
        running = {owner: sum(job.state is JobState.RUNNING for job in self.open_jobs(owner)) for owner in OWNERS}
        job = next(job for job in queued if job.owner == leased.job.owner)  # the oldest
        assert leased.job.id == job.id
        assert running[job.owner] == min(running[other.owner] for other in queued)
        job.becomes(JobState.RUNNING)
        job.attempts += 1
        self.leases.append(Lease(leased.token, job, self.time + LEASE))

    def tell(self, lease: Lease, stale: int, kinds: list[str], ending: JobState | None) -> None:
        stale = min(stale, lease.num_reported)
        events: list[NewEvent] = [progress(0) if kind == "progress" else stage("x") for kind in kinds]
        told = (lease.token.split("_")[1], events, lease.num_reported - stale, ending and Ending(ending))
        try:
            answer = self.training.leases.report(*told)
        except UnauthenticatedError:
            assert not self.is_living(lease)
            return
        assert self.is_living(lease)
        assert answer.cancel_requested == lease.job.cancel_requested
        new = kinds[stale:]
        lease.job.kinds += new
        lease.num_reported += len(new)
        lease.expires_at = self.time + LEASE
        if ending is not None:
            lease.is_ended = True
            is_given_back = ending is JobState.QUEUED
            lease.job.becomes(JobState.CANCELLED if is_given_back and lease.job.cancel_requested else ending)

    def expire(self) -> None:
        over = [lease for lease in self.leases if not lease.is_ended and lease.expires_at <= self.time]
        found = self.training.leases.expire()
        assert sorted(job.id for job in found) == sorted(lease.job.id for lease in over)
        for lease in over:
            lease.is_ended, job = True, lease.job
            job.lost += 1
            if job.cancel_requested:
                job.becomes(JobState.CANCELLED)
            else:
                job.becomes(JobState.FAILED if job.lost == MAX_LOST else JobState.QUEUED)

    def cancel(self, which: int) -> None:
        among = [job for owner in OWNERS for job in self.open_jobs(owner)] if which else self.jobs
        job = (among or self.jobs)[-which % len(among or self.jobs)]
        try:
            self.training.jobs.cancel(job.owner, job.id)
        except FailedPreconditionError:
            assert job.state.is_end
            return
        assert not job.state.is_end
        job.cancel_requested = True
        if job.state is JobState.QUEUED:
            job.becomes(JobState.CANCELLED)

    def delete_or_put_data(self, owner: str, mark: str) -> None:
        needed = any(job.mark == mark for job in self.open_jobs(owner))
        try:
            self.training.datasets.delete(owner, digest_of(mark))
        except FailedPreconditionError:
            assert needed
        except NotFoundError:
            assert (owner, mark) not in self.data
            self.training.put(owner, mark)
            self.data.add((owner, mark))
        else:
            assert not needed
            self.data.remove((owner, mark))

    @invariant()
    def a_token_is_good_exactly_while_its_lease_lives(self) -> None:
        living = self.living
        assert len({lease.job.id for lease in living}) == len(living)
        for lease in {id(lease): lease for lease in (*living, *self.leases[-2:])}.values():
            scope = self.training.leases.authenticate(lease.token)
            assert (scope and scope.job_id) == (lease.job.id if lease in living else None)

    @invariant()
    def jobs_are_what_was_said_of_them_and_stay_so_once_they_have_ended(self) -> None:
        found = {row["id"]: row for row in self.rows.execute("select * from jobs")}
        assert found.keys() == {job.id for job in self.jobs}
        for job in self.jobs:
            row = found[job.id]
            said = (job.state.value, job.attempts, job.cancel_requested, len(job.kinds))
            assert (row["state"], row["attempts"], row["cancel_requested"], row["last_sequence"]) == said
            if job.state.is_end:
                job.as_it_ended = job.as_it_ended or tuple(row)
                assert tuple(row) == job.as_it_ended

    @invariant()
    def events_are_numbered_from_one_on_and_only_old_progress_goes(self) -> None:
        for job in self.jobs:
            if job.num_seen < len(job.kinds):
                events = self.training.jobs.events(job.owner, job.id)
                assert [(event.sequence, event.kind) for event in events] == job.kept
                job.num_seen = len(job.kinds)


class TestQueue(Queue.TestCase):
    settings = settings(
        max_examples=25, stateful_step_count=30, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        Queue.clock = SteppedClock()
        file = f"{cls.folder.name}/registry.sqlite3"
        Queue.training = Training.of(Database.open(f"sqlite:///{file}", clock=Queue.clock))
        Queue.rows = sqlite3.connect(file, isolation_level=None)
        Queue.rows.row_factory = sqlite3.Row
        for owner in OWNERS:
            Tenants(Queue.training.database).create(owner)

    @classmethod
    def tearDownClass(cls) -> None:
        Queue.rows.close()
        Queue.training.database.close()
        cls.folder.cleanup()
