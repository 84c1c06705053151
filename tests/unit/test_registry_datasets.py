"""Datasets on record: whose they are, what their names may be, how many there may be, and what keeps them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
from motley_server.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from motley_server.registry import holdings
from motley_server.registry.bundle_files import BundleFile, bundle_digest
from motley_server.registry.database import Database
from motley_server.registry.dataset_records import DatasetFormat
from motley_server.registry.dataset_uploads import DatasetUploads
from motley_server.registry.datasets import Datasets
from motley_server.registry.job_records import JobState
from motley_server.registry.tenants import Tenants
from motley_server.registry.uploads import UPLOAD_LIFETIME, store_id
from training_registry import Training, digest_of, refusal

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

DATA = digest_of("data")
NOT_FOUND = (NotFoundError, "DATASET_NOT_FOUND", "digest")
NO_DIGESTS = [
    "",
    "data",
    DATA[7:],
    DATA.upper(),
    f"{DATA}0",
    DATA[:-1],
    f"sha256:{'g' * 64}",
    f"{DATA}\n",
    "\x00",
    "\udc80",
]


@pytest.fixture
def training(database: Database) -> Training:
    return Training.of(database)


def test_what_was_put_is_what_is_read_and_stays_as_it_is(training: Training, clock: SteppedClock) -> None:
    made = training.datasets.put("local", DATA, "Mine", DatasetFormat.CHAT, 2**40, 2**33)
    assert training.datasets.get("local", DATA) == training.datasets.find("local", DATA) == made
    assert (made.format, made.size_bytes, made.num_samples, made.created_at) == (
        DatasetFormat.CHAT,
        2**40,
        2**33,
        clock(),
    )
    clock.advance(seconds=1)
    assert training.datasets.put("local", DATA, "Other", DatasetFormat.TEXT, 1, 1) == made
    assert (
        training.datasets.live_bundles()
        == {bundle_digest([BundleFile("data.jsonl", 2**40, DATA[7:])])}
        == {made.bundle}
    )


def test_a_tenants_dataset_is_nobody_elses(training: Training, tenants: Tenants) -> None:
    tenants.create("other")
    training.put("local")
    for call, owner, digest in (
        (training.datasets.get, "other", DATA),
        (training.datasets.delete, "other", DATA),
        (training.datasets.get, "local", digest_of("none")),
        (training.uploads.touch, "other", DATA),
        (training.uploads.get, "local", DATA),
    ):
        assert refusal(call, owner, digest) == NOT_FOUND
    assert training.put("other").owner == "other"
    training.datasets.delete("local", DATA)
    assert training.datasets.list("local").items == ()
    assert training.datasets.list("other").items == (training.datasets.get("other", DATA),)


def test_what_is_no_digest_names_nothing(training: Training) -> None:
    invalid = (InvalidArgumentError, "INVALID_DIGEST", "digest")
    for digest in NO_DIGESTS:
        assert refusal(training.datasets.put, "local", digest, "", DatasetFormat.TEXT, 1, 1) == invalid
        assert refusal(training.uploads.begin, "local", digest, 1) == invalid
        assert refusal(training.datasets.get, "local", digest) == NOT_FOUND
        assert refusal(training.datasets.delete, "local", digest) == NOT_FOUND
        assert training.uploads.forget("local", digest) is False


def test_nobody_and_what_cannot_be_shown_have_no_datasets(training: Training) -> None:
    for owner in ("nobody", "public", "a\x00"):
        for call, args in ((training.put, ()), (training.uploads.begin, (DATA, 1))):
            assert refusal(call, owner, *args) == (NotFoundError, "TENANT_NOT_FOUND", "owner")
    for name in ("a\x00", "a\n", "a" * 201):
        refused = refusal(training.datasets.put, "local", DATA, name, DatasetFormat.TEXT, 1, 1)
        assert refused == (InvalidArgumentError, "INVALID_DISPLAY_NAME", "display_name")
    assert training.datasets.list("local").items == ()


def test_pages_hold_every_dataset_once_the_newest_first(
    training: Training, tenants: Tenants, clock: SteppedClock
) -> None:
    tenants.create("other")
    made = []
    for number in range(5):
        made.append(training.put("local", f"{number}"))
        training.put("other", f"{number}")
        clock.advance(seconds=number % 3 // 2)  # three are made in the same instant
    listed, token = [], ""
    for _ in range(3):
        page = training.datasets.list("local", 2, token)
        listed.extend(page.items)
        token = page.next_page_token
    assert listed == sorted(made, key=lambda record: (record.created_at, record.digest), reverse=True)
    assert token == ""
    token = training.datasets.list("local", 2).next_page_token
    bad = (InvalidArgumentError, "BAD_PAGE_TOKEN", "page_token")
    assert refusal(training.datasets.list, "other", 2, token) == bad
    assert refusal(training.jobs.list, "local", None, 2, token) == bad


def test_a_dataset_stays_while_a_job_that_has_not_ended_needs_it(training: Training, tenants: Tenants) -> None:
    tenants.create("other")
    for owner, mark in (("local", "data"), ("local", "gate"), ("local", "spare"), ("other", "data")):
        training.put(owner, mark)
    queued = training.create("local", marks=["data", "gate"])
    training.register()
    leased = training.lease()
    for state in ("running", "queued"):
        for mark in ("data", "gate"):
            refused = refusal(training.datasets.delete, "local", digest_of(mark), request_id="one")
            assert refused == (FailedPreconditionError, "DATASET_IN_USE", "digest"), state
        if state == "running":
            training.end(leased, JobState.QUEUED)
    training.datasets.delete("local", digest_of("spare"))
    training.datasets.delete("other", DATA)
    training.jobs.cancel("local", queued.id)
    training.datasets.delete("local", DATA, request_id="one")
    training.datasets.delete("local", digest_of("gate"))
    assert training.datasets.live_bundles() == set()
    assert training.jobs.get("local", queued.id).datasets == (DATA, digest_of("gate"))


def test_a_repeated_deletion_is_one(training: Training) -> None:
    training.put()
    assert training.datasets.delete("local", DATA, request_id="one", scope="local") is True
    again = training.put()
    assert training.datasets.delete("local", DATA, request_id="one", scope="local") is False
    assert training.datasets.get("local", DATA) == again
    refused = refusal(training.datasets.delete, "local", digest_of("x"), request_id="one", scope="local")
    assert refused == (AlreadyExistsError, "REQUEST_ID_REUSED", "request_id")


def test_there_is_an_end_to_datasets_and_to_uploads(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "MAX_DATASETS", 2)
    for mark in ("a", "b"):
        training.put("local", mark)
    many = (ResourceExhaustedError, "TOO_MANY_DATASETS", "digest")
    assert refusal(training.put, "local", "c") == refusal(training.uploads.begin, "local", digest_of("c"), 1) == many
    assert training.put("local", "a").digest == digest_of("a")
    assert training.uploads.begin("local", digest_of("a"), 1) is True  # its bytes are elsewhere: it takes no room
    training.datasets.delete("local", digest_of("b"))
    for number in range(15):
        assert training.uploads.begin("local", digest_of(f"{number}"), 1) is True
    refused = refusal(training.uploads.begin, "local", digest_of("c"), 1)
    assert refused == (ResourceExhaustedError, "TOO_MANY_UPLOADS", "digest")
    assert training.uploads.begin("local", digest_of("0"), 1) is False
    assert training.uploads.forget("local", digest_of("0")) is True
    assert training.uploads.begin("local", digest_of("c"), 1) is True


def test_there_is_an_end_to_the_bytes_of_a_tenants_datasets_and_uploads_together(database: Database) -> None:
    training = replace(Training.of(database), datasets=Datasets(database, 10), uploads=DatasetUploads(database, 10))
    full = (ResourceExhaustedError, "TOO_MANY_DATASET_BYTES", "size_bytes")
    training.put("local", "four")
    assert refusal(training.uploads.begin, "local", digest_of("a"), 7) == full
    assert training.uploads.begin("local", digest_of("a"), 6) is True
    assert training.uploads.begin("local", digest_of("a"), 6) is False
    assert refusal(training.uploads.begin, "local", digest_of("b"), 1) == refusal(training.put, "local", "b") == full
    assert training.uploads.begin("local", digest_of("four"), 4) is True  # its bytes are elsewhere: it takes no room
    training.uploads.forget("local", digest_of("a"))
    assert training.uploads.begin("local", digest_of("b"), 6) is True
    Tenants(database).create("other")
    assert training.uploads.begin("other", digest_of("b"), 10) is True


# --- uploads on record -----------------------------------------------------------------------------------------------


def test_an_upload_is_on_record_until_it_is_a_dataset(training: Training, clock: SteppedClock) -> None:
    put = partial(training.datasets.put, "local", DATA, "", DatasetFormat.TEXT, 9, 1, needs_upload=True)
    assert refusal(put) == NOT_FOUND
    assert training.uploads.begin("local", DATA, 9) is True
    clock.advance(hours=1)
    assert training.uploads.begin("local", DATA, 9) is False
    found = training.uploads.get("local", DATA)
    assert (found.size_bytes, found.touched_at, found.expires_at) == (9, clock(), clock() + UPLOAD_LIFETIME)
    assert found.created_at == clock() - timedelta(hours=1)
    assert training.uploads.store_ids() == {store_id("local", DATA)}
    assert refusal(training.uploads.begin, "local", DATA, 8) == (AlreadyExistsError, "UPLOAD_EXISTS", "digest")
    made = put()
    assert training.uploads.store_ids() == set()
    assert put() == made


def test_a_size_is_in_range(training: Training) -> None:
    for size_bytes in (-1, 2**40 + 1):
        refused = refusal(training.uploads.begin, "local", DATA, size_bytes)
        assert refused == (InvalidArgumentError, "OUT_OF_RANGE", "size_bytes")


def test_what_nobody_touched_is_forgotten_but_for_what_somebody_streams(
    training: Training, clock: SteppedClock
) -> None:
    for mark in ("left", "touched", "streamed"):
        training.uploads.begin("local", digest_of(mark), 1)
    clock.advance(hours=24)
    training.uploads.touch("local", digest_of("touched"))
    streamed = store_id("local", digest_of("streamed"))
    assert training.uploads.forget_untouched(clock(), {streamed}) == 1
    assert training.uploads.store_ids() == {streamed, store_id("local", digest_of("touched"))}


def test_deleting_forgets_an_upload_that_is_not_finished(training: Training) -> None:
    training.uploads.begin("local", DATA, 9)
    training.datasets.delete("local", DATA)
    assert training.uploads.store_ids() == set()
    assert refusal(training.uploads.touch, "local", DATA) == NOT_FOUND


def test_a_tenants_datasets_and_uploads_go_with_it(training: Training, tenants: Tenants) -> None:
    tenants.create("acme")
    training.put("acme")
    training.uploads.begin("acme", digest_of("more"), 9)
    tenants.delete("acme")
    assert training.datasets.live_bundles() == training.uploads.store_ids() == set()
    tenants.create("acme")
    assert training.datasets.list("acme").items == ()
