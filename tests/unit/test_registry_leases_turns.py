"""Turns: tenants share workers by their weights, whoever queued first or more, and each in the order of its jobs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from motley_server.registry.database import Database
from motley_server.registry.job_records import JobState, Leased
from motley_server.registry.records import Quota
from motley_server.registry.tenants import Tenants
from training_registry import Training

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]


@pytest.fixture
def training(database: Database) -> Training:
    training = Training.of(database)
    training.register()
    return training


def queue(training: Training, clock: SteppedClock, owner: str, number: int) -> list[str]:
    made = []
    for _ in range(number):
        made.append(training.create(owner).id)
        clock.advance(milliseconds=1)
    return made


def served(training: Training, number: int) -> list[str]:
    """Have one worker do some jobs, one after another, and return whose they were."""
    owners = []
    for _ in range(number):
        leased = training.lease()
        owners.append(leased.job.owner)
        training.end(leased)
    return owners


def test_a_tenants_jobs_are_done_in_the_order_in_which_they_were_made(training: Training, clock: SteppedClock) -> None:
    made = queue(training, clock, "local", 3)
    first = training.lease()
    training.end(first, JobState.QUEUED)
    done = []
    for _ in made:
        leased = training.lease()
        done.append(leased.job.id)
        training.end(leased)
    assert [first.job.id, *done] == [made[0], *made]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_of_two_alike_neither_gets_ahead_by_having_queued_first(
    training: Training, tenants: Tenants, clock: SteppedClock, num_workers: int
) -> None:
    tenants.create("late")
    queue(training, clock, "local", 8)
    queue(training, clock, "late", 8)
    at_work: list[Leased] = []
    started: Counter[str] = Counter()
    for _ in range(14):
        if len(at_work) == num_workers:
            training.end(at_work.pop(0))
        at_work.append(training.lease())
        started[at_work[-1].job.owner] += 1
        assert abs(started["local"] - started["late"]) <= 1


def test_who_comes_late_has_no_credit_and_no_debt(training: Training, tenants: Tenants, clock: SteppedClock) -> None:
    tenants.create("late")
    queue(training, clock, "local", 9)
    assert served(training, 4) == ["local"] * 4
    queue(training, clock, "late", 3)
    assert Counter(served(training, 4)) == {"local": 2, "late": 2}
    assert served(training, 3).count("late") == 1
    queue(training, clock, "late", 2)
    assert sorted(served(training, 2)) == ["late", "local"]


def test_one_workers_turns_go_by_weight(training: Training, tenants: Tenants, clock: SteppedClock) -> None:
    tenants.create("heavy", "", Quota(weight=3.0))
    queue(training, clock, "local", 4)
    queue(training, clock, "heavy", 9)
    owners = served(training, 12)
    for number in range(1, 13):
        assert abs(owners[:number].count("heavy") - 0.75 * number) <= 1
    assert Counter(owners) == {"local": 3, "heavy": 9}


def test_the_tenant_with_the_fewest_running_jobs_for_its_weight_comes_first(
    training: Training, tenants: Tenants, clock: SteppedClock
) -> None:
    tenants.create("heavy", "", Quota(weight=3.0))
    queue(training, clock, "local", 6)
    queue(training, clock, "heavy", 6)
    running = [training.lease() for _ in range(8)]
    assert Counter(leased.job.owner for leased in running) == {"local": 2, "heavy": 6}
    training.end(next(leased for leased in running if leased.job.owner == "local"))
    assert training.lease().job.owner == "local"


def test_running_jobs_count_before_turns(training: Training, tenants: Tenants, clock: SteppedClock) -> None:
    tenants.create("light", "", Quota(weight=0.5))
    queue(training, clock, "light", 2)
    queue(training, clock, "local", 2)
    first, second = training.lease(), training.lease()
    assert [first.job.owner, second.job.owner] == ["light", "local"]
    training.end(first)
    assert training.lease().job.owner == "light"  # though its next turn comes after that of the other


def test_a_tenant_whose_jobs_nobody_can_do_takes_no_turns(
    training: Training, tenants: Tenants, clock: SteppedClock
) -> None:
    tenants.create("odd")
    training.create("odd", method="other")
    queue(training, clock, "local", 3)
    assert served(training, 3) == ["local"] * 3
    assert training.leases.lease("w") is None
