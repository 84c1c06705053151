"""Publishing by a lease: an upload becomes a version while its lease lasts, and never after, whenever it began."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from adapter_registry import NO_LIMITS, at_once, content_of
from bundle_uploads import Adapter
from motley_server.errors import MotleyError, UnauthenticatedError
from motley_server.registry.database import Database
from motley_server.registry.job_records import JobState, Leased
from motley_server.registry.records import AdapterVersion
from motley_server.registry.uploads import store_id
from registry_house import House, found_in
from training_registry import Training, lease_id_of, refusal

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

ONE = Adapter("one")
ENDED = (UnauthenticatedError, "LEASE_ENDED", None)


@pytest.fixture
def training(database: Database) -> Training:
    training = Training.of(database)
    training.register()
    training.create()
    return training


@pytest.fixture
def house(tmp_path: Path, database: Database, clock: SteppedClock) -> Iterator[House]:
    house = House.of(tmp_path, database, clock)
    yield house
    house.store.close()


def publish(house: House, training: Training, leased: Leased) -> AdapterVersion:
    lease_id = lease_id_of(leased)
    return house.publication.publish(
        "local", leased.upload_id, "taught", found_in(ONE), ("default",), quota=NO_LIMITS, scope="local",
        request_id=leased.upload_id, guard=lambda connection: training.leases.check(connection, lease_id),
    )  # fmt: skip


def send(house: House, leased: Leased) -> None:
    house.begin("local", leased.upload_id, "taught", ONE)
    house.send("local", leased.upload_id, ONE)


@pytest.mark.parametrize("way", ["expired", "expired and collected", "ended", "taken by another"])
def test_no_upload_becomes_a_version_after_its_lease_though_it_began_before(
    house: House, training: Training, clock: SteppedClock, way: str
) -> None:
    leased = training.lease()
    send(house, leased)
    if way == "ended":
        training.end(leased, JobState.QUEUED)
    else:
        clock.advance(seconds=60)
    if way in ("expired and collected", "taken by another"):
        training.leases.expire()
    again = training.lease() if way == "taken by another" else None
    assert refusal(publish, house, training, leased) == ENDED
    assert house.adapters.newest("local", "taught") is None
    assert house.uploads.store_ids() == {store_id("local", leased.upload_id)}
    if again is not None:  # the same upload, as it was left
        assert publish(house, training, again).version == 1


def test_an_upload_becomes_a_version_while_its_lease_lasts_and_once_for_all_attempts(
    house: House, training: Training, clock: SteppedClock
) -> None:
    first = training.lease()
    clock.advance(seconds=59)
    training.leases.report(lease_id_of(first))
    clock.advance(seconds=59)
    send(house, first)
    version = publish(house, training, first)
    clock.advance(seconds=60)
    training.leases.expire()
    second = training.lease()
    assert house.upload("local", second.upload_id, "taught", ONE) == version
    assert house.adapters.list_versions("local", "local", "taught").items[0].version == 1


def test_a_publication_and_an_end_at_once_come_one_after_the_other(house: House, training: Training) -> None:
    for round in range(1, 5):
        leased = training.lease()
        check: Callable[..., None] = training.leases.check
        published, _ = at_once(
            partial(
                house.adapters.publish, "local", "taught", content_of(f"{round}"), quota=NO_LIMITS,
                guard=partial(check, lease_id=lease_id_of(leased)),
            ),
            partial(training.end, leased, JobState.QUEUED),
        )  # fmt: skip
        if isinstance(published, MotleyError):
            assert published.reason == "LEASE_ENDED"
        else:
            newest = house.adapters.newest("local", "taught")
            assert newest is not None
            assert newest.digest == published.digest
