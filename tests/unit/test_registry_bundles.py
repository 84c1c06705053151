"""Bundles: what an upload may announce and send, where it goes on, what it becomes, and what is collected."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
from bundle_uploads import EMPTY, Adapter, bundles_in, paths_in, send, upload
from motley_server.errors import (
    AlreadyExistsError,
    MotleyError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
)
from motley_server.registry.bundle_files import BundleFile, bundle_digest
from motley_server.registry.bundles import BundleStore, BundleStoreError
from motley_server.registry.disk import Disk

ONE, TWO = Adapter("one"), Adapter("two")
WEIGHTS = "adapter_model.safetensors"
DATA = ONE.contents[WEIGHTS]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BundleStore]:
    store = BundleStore(tmp_path)
    yield store
    store.close()


def reopened(store: BundleStore, root: Path) -> BundleStore:
    store.close()
    return BundleStore(root)


def refusal(kind: type[MotleyError], call: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(MotleyError) as caught:
        call()
    assert type(caught.value) is kind
    return caught.value.reason, caught.value.field


def test_the_digest_of_a_bundle_is_that_of_its_lines_whatever_their_order() -> None:
    files = [BundleFile("b", 2, "1" * 64), BundleFile("a", 10, "f" * 64)]
    text = f"{'f' * 64} 10 a\n{'1' * 64} 2 b\n"
    assert bundle_digest(files) == bundle_digest(files[::-1]) == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_an_upload_becomes_a_bundle_of_exactly_its_files(store: BundleStore, tmp_path: Path) -> None:
    assert upload(store, "u", ONE) == ONE.digest
    directory = store.directory(ONE.digest)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == ONE.contents
    assert directory == store.directory_of_upload("u")
    store.abort("u")
    assert paths_in(tmp_path / "staging") == paths_in(tmp_path / "trash") == []
    assert bundles_in(tmp_path) == {ONE.digest}


def test_a_commit_may_be_repeated_also_by_another_process(store: BundleStore, tmp_path: Path) -> None:
    upload(store, "u", ONE)
    assert store.commit("u") == ONE.digest
    again = reopened(store, tmp_path)
    assert again.commit("u") == ONE.digest
    assert dict(again.committed("u")) == {name: len(data) for name, data in ONE.contents.items()}
    assert again.append("u", WEIGHTS, 3, DATA[3:]) == len(DATA)
    again.close()


def test_the_same_bytes_twice_are_one_bundle_and_the_first_stays(store: BundleStore, tmp_path: Path) -> None:
    upload(store, "first", ONE)
    inode = (store.directory(ONE.digest) / WEIGHTS).stat().st_ino
    assert upload(store, "second", ONE) == ONE.digest
    assert (store.directory(ONE.digest) / WEIGHTS).stat().st_ino == inode
    assert paths_in(tmp_path / "staging" / "second") == ["plan.json"]
    assert paths_in(tmp_path / "trash") == []


def test_bytes_count_as_committed_once_they_are_synced(store: BundleStore) -> None:
    store.begin("u", ONE.files)
    assert store.append("u", WEIGHTS, 0, DATA[:4]) == 4
    assert store.committed("u")[WEIGHTS] == 0
    store.sync("u")
    assert store.append("u", WEIGHTS, 4, DATA[4:9]) == 9
    assert store.committed("u")[WEIGHTS] == 4


def test_bytes_that_are_sent_again_are_skipped_and_the_rest_is_written(store: BundleStore) -> None:
    store.begin("u", ONE.files)
    assert store.append("u", WEIGHTS, 0, DATA[:10]) == 10
    assert store.append("u", WEIGHTS, 2, DATA[2:6]) == 10
    assert store.append("u", WEIGHTS, 5, DATA[5:15]) == 15
    assert store.append("u", WEIGHTS, 15, b"") == 15
    send(store, "u", ONE)
    assert store.commit("u") == ONE.digest


def test_a_chunk_that_leaves_a_gap_is_refused_and_told_where_to_go_on(store: BundleStore) -> None:
    store.begin("u", ONE.files)
    store.append("u", WEIGHTS, 0, DATA[:4])
    store.sync("u")
    store.append("u", WEIGHTS, 4, DATA[4:6])
    with pytest.raises(OutOfRangeError, match="go on from 4,") as caught:
        store.append("u", WEIGHTS, 7, DATA[7:])
    assert (caught.value.reason, caught.value.field) == ("UPLOAD_OFFSET", "offset")
    assert store.append("u", WEIGHTS, 4, DATA[4:]) == len(DATA)


def test_an_empty_file_is_a_file(store: BundleStore) -> None:
    empty = replace(ONE, size_bytes=0)
    assert upload(store, "u", empty) == empty.digest
    assert (store.directory(empty.digest) / WEIGHTS).read_bytes() == b""


def test_an_upload_is_begun_again_with_the_same_files_only(store: BundleStore) -> None:
    store.begin("u", ONE.files)
    store.append("u", WEIGHTS, 0, DATA[:4])
    store.begin("u", ONE.files[::-1])
    assert refusal(AlreadyExistsError, lambda: store.begin("u", TWO.files)) == ("UPLOAD_EXISTS", "upload_id")
    assert store.append("u", WEIGHTS, 4, DATA[4:]) == len(DATA)


def test_an_aborted_upload_is_gone_and_its_id_free(store: BundleStore, tmp_path: Path) -> None:
    store.begin("u", ONE.files)
    store.append("u", WEIGHTS, 0, DATA)
    store.abort("u")
    assert paths_in(tmp_path) == EMPTY
    assert refusal(NotFoundError, lambda: store.committed("u")) == ("UPLOAD_NOT_FOUND", "upload_id")
    assert upload(store, "u", TWO) == TWO.digest


def test_an_upload_whose_bundle_is_lost_is_forgotten_and_can_be_sent_again(store: BundleStore) -> None:
    upload(store, "u", ONE)
    shutil.rmtree(store.directory(ONE.digest))
    assert refusal(NotFoundError, lambda: store.commit("u")) == ("UPLOAD_NOT_FOUND", "upload_id")
    assert upload(store, "u", ONE) == ONE.digest


def test_nobody_but_the_owner_can_read_what_was_uploaded(store: BundleStore, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        upload(store, "u", ONE)
    finally:
        os.umask(old)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_collection_takes_orphans_alone_and_tells_their_bytes(store: BundleStore, tmp_path: Path) -> None:
    for name, adapter in (("kept", ONE), ("orphan", TWO)):
        upload(store, name, adapter)
        store.abort(name)
    for name in ("coming", "stale"):
        store.begin(name, ONE.files)
        store.append(name, WEIGHTS, 0, DATA)
    plan_bytes = (tmp_path / "staging" / "stale" / "plan.json").stat().st_size
    again = reopened(store, tmp_path)
    freed = again.collect({ONE.digest}, {"coming"})
    assert freed == sum(map(len, TWO.contents.values())) + len(DATA) + plan_bytes
    assert bundles_in(tmp_path) == {ONE.digest}
    assert os.listdir(tmp_path / "staging") == ["coming"]
    assert paths_in(tmp_path / "trash") == []
    assert again.committed("coming")[WEIGHTS] == len(DATA)
    assert again.collect({ONE.digest}, {"coming"}) == 0
    again.close()


def test_the_bundle_of_a_kept_upload_is_kept_until_it_is_on_record(store: BundleStore, tmp_path: Path) -> None:
    upload(store, "u", ONE)
    again = reopened(store, tmp_path)
    again.collect(set(), {"u"})
    assert again.commit("u") == ONE.digest
    assert bundles_in(tmp_path) == {ONE.digest}
    again.close()


def test_what_came_after_the_sets_were_read_survives_one_collection_and_no_more(
    store: BundleStore, tmp_path: Path
) -> None:
    store.begin("new", TWO.files)
    upload(store, "u", ONE)
    store.abort("u")
    assert store.collect(set(), set()) == 0
    assert bundles_in(tmp_path) == {ONE.digest}
    assert store.append("new", WEIGHTS, 0, b"t") == 1
    assert store.collect(set(), set()) > 0
    assert paths_in(tmp_path) == EMPTY
    assert refusal(NotFoundError, lambda: store.append("new", WEIGHTS, 1, b"w")) == ("UPLOAD_NOT_FOUND", "upload_id")


def test_a_bundle_survives_the_collection_after_its_upload_was_forgotten(store: BundleStore, tmp_path: Path) -> None:
    upload(store, "u", ONE)
    store.collect(set(), {"u"})
    store.abort("u")
    store.collect(set(), {"u"})
    assert bundles_in(tmp_path) == {ONE.digest}
    store.collect(set(), set())
    assert paths_in(tmp_path) == EMPTY


# Tries to open a store, and says how that went.
OPEN = """
import sys
from pathlib import Path
from motley_server.registry.bundles import BundleStore, BundleStoreError
try:
    BundleStore(Path(sys.argv[1]))
except BundleStoreError as error:
    print(error.reason, error.message)
else:
    print("opened")
"""


def test_one_process_at_a_time_has_a_store(store: BundleStore, tmp_path: Path) -> None:
    def try_elsewhere() -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", OPEN, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    assert try_elsewhere() == f"DATA_DIR_IN_USE {tmp_path} is in use: another server has it open"
    with pytest.raises(BundleStoreError, match="is in use"):
        BundleStore(tmp_path)
    assert upload(store, "u", ONE) == ONE.digest
    store.close()
    assert try_elsewhere() == "opened"  # and its end lets go of it
    BundleStore(tmp_path).close()


class SlowDisk(Disk):
    """A disk whose syncs of files wait to be let through, once they are to be slow."""

    def __init__(self) -> None:
        self.is_slow = False
        self.arrived, self.may_go = Event(), Event()

    def fsync(self, file: int) -> None:
        if self.is_slow:
            self.is_slow = False
            self.arrived.set()
            assert self.may_go.wait(10)
        super().fsync(file)


def test_who_waited_for_an_upload_meets_the_one_that_has_its_id_by_then(tmp_path: Path) -> None:
    disk = SlowDisk()
    store = BundleStore(tmp_path, disk)
    store.begin("u", ONE.files)
    store.append("u", WEIGHTS, 0, DATA[:4])
    refusals: list[MotleyError] = []

    def append() -> None:
        try:
            store.append("u", WEIGHTS, 4, DATA[4:])
        except MotleyError as error:
            refusals.append(error)

    disk.is_slow = True
    threads = [Thread(target=lambda: store.sync("u")), Thread(target=append)]
    threads[0].start()
    assert disk.arrived.wait(10)
    threads[1].start()
    threads[1].join(0.05)
    store.collect(set(), set())
    store.collect(set(), set())
    store.begin("u", ONE.files)
    disk.may_go.set()
    for thread in threads:
        thread.join()
    assert [error.reason for error in refusals] == ["UPLOAD_OFFSET"]
    assert upload(store, "u", ONE) == ONE.digest
    store.close()


def test_what_an_earlier_process_left_of_one_upload_keeps_no_other_waiting(tmp_path: Path) -> None:
    with closing(BundleStore(tmp_path)) as earlier:
        for upload_id in ("large", "other"):
            earlier.begin(upload_id, ONE.files)
            earlier.append(upload_id, WEIGHTS, 0, DATA[:4])
    disk = SlowDisk()
    store = BundleStore(tmp_path, disk)
    disk.is_slow = True
    committed: list[int] = []
    taking_up = Thread(target=lambda: committed.append(store.committed("large")[WEIGHTS]))
    taking_up.start()
    assert disk.arrived.wait(10)
    store.begin("large", ONE.files)
    assert upload(store, "other", ONE) == ONE.digest
    assert upload(store, "new", TWO) == TWO.digest
    store.abort("other")
    store.collect({ONE.digest}, {"large"})
    assert taking_up.is_alive()
    disk.may_go.set()
    taking_up.join()
    assert committed == [4]
    assert upload(store, "large", ONE) == ONE.digest
    store.close()


class SmallDisk(Disk):
    """A disk that takes three bytes at a time, and so many in all."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes

    def write(self, file: int, data: memoryview, offset: int) -> int:
        if not self.room_bytes:
            raise OSError(28, "No space left on device")
        count = super().write(file, data[: min(3, self.room_bytes)], offset)
        self.room_bytes -= count
        return count


def test_a_full_disk_is_told_and_the_upload_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = SmallDisk(1000)
    store = BundleStore(tmp_path, disk)
    store.begin("u", ONE.files)
    disk.room_bytes = 8
    assert refusal(ResourceExhaustedError, lambda: store.append("u", WEIGHTS, 0, DATA)) == ("STORAGE_FULL", None)
    store.sync("u")
    assert store.committed("u")[WEIGHTS] == 8
    disk.room_bytes = 0
    assert refusal(ResourceExhaustedError, lambda: store.begin("v", TWO.files)) == ("STORAGE_FULL", None)
    disk.room_bytes = 1000
    send(store, "u", ONE)
    assert store.commit("u") == ONE.digest
    assert upload(store, "v", TWO) == TWO.digest
    store.close()


def test_an_append_holds_no_more_than_its_chunk(store: BundleStore) -> None:
    chunk = 1 << 16
    big = Adapter("big", 64 * chunk)
    data, files = big.contents[WEIGHTS], big.files
    store.begin("u", files)
    store.append("u", WEIGHTS, 0, data[:chunk])
    tracemalloc.start()
    try:
        for offset in range(chunk, len(data), chunk):
            store.append("u", WEIGHTS, offset - chunk, memoryview(data)[offset - chunk : offset + chunk])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * chunk
    send(store, "u", big, chunk)
    assert store.commit("u") == big.digest


def test_uploads_side_by_side_and_collections_among_them_do_not_disturb_each_other(
    store: BundleStore, tmp_path: Path
) -> None:
    adapters = {f"u{number}": Adapter(f"a{number % 3}", 2000) for number in range(8)}
    failed: list[BaseException] = []

    def work(upload_id: str) -> None:
        try:
            assert upload(store, upload_id, adapters[upload_id], chunk=100) == adapters[upload_id].digest
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=work, args=(upload_id,)) for upload_id in adapters]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.collect(set(), set(adapters))
        threads[-1].join(0.005)
    for thread in threads:
        thread.join()
    assert failed == []
    assert bundles_in(tmp_path) == store.bundles() == {adapter.digest for adapter in adapters.values()}
