"""Datasets' bytes: how they come, who may read them, what a stopped process leaves, and when they go."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from breaking_disk import BreakingDisk, Crash
from bundle_uploads import EMPTY, bundles_in, paths_in
from motley_server.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
)
from motley_server.registry.bundle_files import BundleFile
from motley_server.registry.bundles import BundleStore
from motley_server.registry.collection import Collected, Collector
from motley_server.registry.database import Database
from motley_server.registry.dataset_intake import DatasetIntake
from motley_server.registry.dataset_records import FILE_NAME, DatasetFormat, DatasetRecord
from motley_server.registry.dataset_uploads import DatasetUploads
from motley_server.registry.datasets import Datasets
from motley_server.registry.disk import Disk
from motley_server.registry.tenants import Tenants
from sqlalchemy import Connection
from training_registry import refusal

if TYPE_CHECKING:
    from motley_server.errors import MotleyError
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

LINES = b'{"text": "one"}\n{"text": "two"}\n'
DIGEST = f"sha256:{hashlib.sha256(LINES).hexdigest()}"
SIZE = len(LINES)
NOT_FOUND = (NotFoundError, "DATASET_NOT_FOUND", "digest")


@dataclass(frozen=True, slots=True)
class Desk:
    """A store of datasets beside a database."""

    root: Path
    store: BundleStore
    datasets: Datasets
    uploads: DatasetUploads
    intake: DatasetIntake
    collector: Collector

    @classmethod
    def of(cls, root: Path, database: Database, disk: Disk | None = None) -> Desk:
        store = BundleStore(root, disk, names=(FILE_NAME,))
        datasets, uploads = Datasets(database), DatasetUploads(database)
        collector = Collector(store, datasets, uploads, database.now)
        return cls(root, store, datasets, uploads, DatasetIntake(store, datasets, uploads), collector)

    def send(self, owner: str = "local", data: bytes = LINES, chunk: int = 20) -> None:
        for offset in range(self.intake.committed(owner, DIGEST), len(data), chunk):
            self.intake.append(owner, DIGEST, offset, data[offset : offset + chunk])
            self.intake.sync(owner, DIGEST)

    def finish(self, owner: str = "local") -> DatasetRecord:
        return self.intake.finish(owner, DIGEST, "Mine", DatasetFormat.TEXT, 2)

    def upload(self, owner: str = "local") -> DatasetRecord:
        known = self.intake.begin(owner, DIGEST, SIZE, "Mine")
        if known is not None:
            return known
        self.send(owner)
        return self.finish(owner)

    def collect(self, held: frozenset[str] = frozenset()) -> Collected:
        return self.collector.collect(held, frozenset())


@pytest.fixture
def desk(tmp_path: Path, database: Database) -> Iterator[Desk]:
    desk = Desk.of(tmp_path / "datasets", database)
    yield desk
    desk.store.close()


def test_what_was_uploaded_is_a_dataset_and_its_bytes(desk: Desk, clock: SteppedClock) -> None:
    assert desk.intake.begin("local", DIGEST, SIZE, "Mine") is None
    assert desk.intake.committed("local", DIGEST) == 0
    assert desk.intake.append("local", DIGEST, 0, LINES[:20]) == 20
    desk.intake.sync("local", DIGEST)
    assert (desk.intake.begin("local", DIGEST, SIZE), desk.intake.committed("local", DIGEST)) == (None, 20)
    assert refusal(desk.intake.staged_file, "local", DIGEST)[:2] == (FailedPreconditionError, "UPLOAD_INCOMPLETE")
    assert refusal(desk.finish)[:2] == (FailedPreconditionError, "UPLOAD_INCOMPLETE")
    desk.send()
    assert desk.intake.staged_file("local", DIGEST).read_bytes() == LINES
    made = desk.finish()
    assert (made.display_name, made.format, made.size_bytes, made.num_samples) == ("Mine", DatasetFormat.TEXT, SIZE, 2)
    assert desk.intake.begin("local", DIGEST, SIZE) == made == desk.datasets.get("local", DIGEST)
    assert desk.intake.file("local", DIGEST).read_bytes() == LINES
    assert paths_in(desk.root / "staging") == paths_in(desk.root / "trash") == []
    assert bundles_in(desk.root) == {made.bundle} == desk.datasets.live_bundles()
    assert desk.uploads.store_ids() == set()


def test_bytes_that_another_tenant_has_must_come_all_the_same(desk: Desk, tenants: Tenants) -> None:
    tenants.create("other")
    desk.upload("other")
    calls: list[Callable[[str, str], object]] = [
        desk.intake.file, desk.intake.committed, desk.intake.staged_file, desk.intake.sync, desk.intake.delete,
        lambda owner, digest: desk.intake.append(owner, digest, 0, LINES), lambda owner, digest: desk.finish(owner),
    ]  # fmt: skip
    assert [refusal(call, "local", DIGEST) for call in calls] == [NOT_FOUND] * len(calls)
    assert desk.intake.begin("local", DIGEST, SIZE) is None
    assert refusal(desk.finish)[:2] == (FailedPreconditionError, "UPLOAD_INCOMPLETE")
    desk.send()
    desk.finish()
    desk.intake.delete("other", DIGEST)
    desk.collect()
    desk.collect()
    assert desk.intake.file("local", DIGEST).read_bytes() == LINES


def test_wrong_bytes_are_no_dataset(desk: Desk) -> None:
    desk.intake.begin("local", DIGEST, SIZE)
    wrong: list[tuple[Callable[[], object], type[MotleyError], str]] = [
        (partial(desk.intake.append, "local", DIGEST, 1, b"x"), OutOfRangeError, "UPLOAD_OFFSET"),
        (partial(desk.intake.append, "local", DIGEST, 0, LINES + b"x"), OutOfRangeError, "UPLOAD_PAST_END"),
        (partial(desk.intake.begin, "local", DIGEST, SIZE + 1), AlreadyExistsError, "UPLOAD_EXISTS"),
        (partial(desk.intake.begin, "local", "data", SIZE), InvalidArgumentError, "INVALID_DIGEST"),
        (partial(desk.intake.begin, "local", DIGEST, SIZE, "a\n"), InvalidArgumentError, "INVALID_DISPLAY_NAME"),
    ]
    for call, kind, reason in wrong:
        assert refusal(call)[:2] == (kind, reason)
    desk.send(data=LINES.upper())
    for call in (desk.finish, partial(desk.intake.staged_file, "local", DIGEST)):
        assert refusal(call)[:2] == (DataLossError, "CHECKSUM_MISMATCH")
    assert [desk.intake.abort("local", DIGEST) for _ in range(2)] == [True, False]
    assert paths_in(desk.root) == EMPTY
    assert desk.upload().num_samples == 2


def test_a_deleted_datasets_bytes_go_once_nobody_holds_them(desk: Desk) -> None:
    made = desk.upload()
    desk.collect()
    assert desk.collect().removed == frozenset()
    desk.intake.delete("local", DIGEST, request_id="one")
    assert refusal(desk.intake.file, "local", DIGEST) == NOT_FOUND
    for _ in range(2):
        assert desk.collect(frozenset({made.bundle})).removed == frozenset()
    desk.collect()
    assert desk.collect().removed == {made.bundle}
    assert paths_in(desk.root) == EMPTY
    desk.intake.begin("local", DIGEST, SIZE)
    desk.send()
    desk.intake.delete("local", DIGEST, request_id="one")  # a repeat, which is not about this upload
    assert desk.finish() == desk.datasets.get("local", DIGEST)


def test_a_tenants_bytes_are_collected_and_an_upload_that_goes_on_then_brings_nothing(
    desk: Desk, tenants: Tenants
) -> None:
    tenants.create("acme")
    desk.upload("acme")
    tenants.delete("acme")
    tenants.create("acme")
    desk.intake.begin("acme", DIGEST, SIZE)
    desk.send("acme")
    tenants.delete("acme")
    tenants.create("acme")
    assert refusal(desk.finish, "acme") == NOT_FOUND
    for _ in range(3):
        desk.collect()
    assert paths_in(desk.root) == EMPTY


def test_what_nobody_finishes_or_deletes_expires(desk: Desk, clock: SteppedClock) -> None:
    desk.intake.begin("local", DIGEST, SIZE)
    desk.send(data=LINES[:20])
    clock.advance(hours=24)
    desk.collect()
    assert desk.intake.committed("local", DIGEST) == 20
    clock.advance(microseconds=1)
    desk.collect()
    assert refusal(desk.intake.committed, "local", DIGEST) == NOT_FOUND
    assert paths_in(desk.root) == EMPTY


def test_an_upload_that_is_off_the_record_leaves_nothing_for_the_next(desk: Desk) -> None:
    desk.intake.begin("local", DIGEST, SIZE - 1)
    desk.send(data=b"x" * 20)
    desk.uploads.forget("local", DIGEST)  # as expiry does, before its collection has come to the bytes
    assert desk.upload().size_bytes == SIZE


def test_a_server_that_has_not_the_bytes_says_so_and_takes_them(desk: Desk, database: Database, tmp_path: Path) -> None:
    made = desk.upload()
    other = Desk.of(tmp_path / "elsewhere", database)
    refused = refusal(other.intake.file, "local", DIGEST)
    assert refused == (FailedPreconditionError, "DATASET_FILES_MISSING", "digest")
    assert other.upload() == made
    assert other.intake.file("local", DIGEST).read_bytes() == LINES
    other.store.close()


def test_a_store_takes_files_of_its_own_names_alone(tmp_path: Path, desk: Desk) -> None:
    adapters = BundleStore(tmp_path / "adapters")
    for store, name in ((adapters, FILE_NAME), (desk.store, "adapter_config.json")):
        refused = refusal(store.begin, "u", [BundleFile(name, 1, "a" * 64)])
        assert refused == (InvalidArgumentError, "FILE_NOT_ALLOWED", "files[0].name")
    adapters.close()


# --- crashes ---------------------------------------------------------------------------------------------------------


class StoppingDatabase(Database):
    """A database whose commits are points of a disk's."""

    disk: BreakingDisk

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        with super().writing() as connection:
            yield connection
            self.disk.reach("before commit")
        self.disk.reach("after commit")


def test_stopped_at_every_change_a_dataset_is_there_whole_or_not_at_all(tmp_path: Path, clock: SteppedClock) -> None:
    template = tmp_path / "template.sqlite3"
    Database.open(f"sqlite:///{template}", clock=clock).close()
    seen = []
    for point in range(100):
        root = tmp_path / f"{point}"
        root.mkdir()
        shutil.copy(template, root / "registry.sqlite3")
        done = do_up_to(point, root, clock)
        seen.append((len(done), check_what_is_left(root, clock)))
        if done == ["uploaded", "deleted"]:
            break
        shutil.rmtree(root)
    # Not yet; committed, but not said; said; deleted, but not said; said to be deleted.
    assert list(dict.fromkeys(seen)) == [(0, False), (0, True), (1, True), (1, False), (2, False)]
    assert len(seen) >= 25


def do_up_to(point: int, root: Path, clock: SteppedClock) -> list[str]:
    """Upload and delete until the process stops, and return what was acknowledged."""
    database = StoppingDatabase.open(f"sqlite:///{root / 'registry.sqlite3'}", clock=clock)
    assert isinstance(database, StoppingDatabase)
    database.disk = BreakingDisk()
    desk = Desk.of(root / "datasets", database, database.disk)
    database.disk.changes.clear()  # the points begin here
    database.disk.stop_at = point
    done = []
    with suppress(Crash):
        for name, act in (("uploaded", desk.upload), ("deleted", partial(desk.intake.delete, "local", DIGEST))):
            act()
            done.append(name)
    desk.store.close()
    database.close()
    return done


def check_what_is_left(root: Path, clock: SteppedClock) -> bool:
    """See that it is whole and can be done again, and return whether the dataset was there."""
    database = Database.open(f"sqlite:///{root / 'registry.sqlite3'}", clock=clock)
    desk = Desk.of(root / "datasets", database)
    was_there = desk.datasets.find("local", DIGEST) is not None
    if was_there:
        assert desk.intake.file("local", DIGEST).read_bytes() == LINES
    desk.upload()
    assert desk.intake.file("local", DIGEST).read_bytes() == LINES
    assert desk.uploads.store_ids() == set()
    for _ in range(2):
        desk.collect()
    assert paths_in(desk.root / "staging") == paths_in(desk.root / "trash") == []
    assert bundles_in(desk.root) == desk.datasets.live_bundles()
    desk.store.close()
    database.close()
    return was_there
