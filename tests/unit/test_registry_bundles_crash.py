"""Bundles through crashes: stopped at every change it makes, without power after it, and killed while it writes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import bundle_uploads
import pytest
from breaking_disk import BreakingDisk, Crash
from bundle_uploads import EMPTY, Adapter, bundles_in, paths_in, send, upload
from in_memory import MEMORY
from motley_server.registry.bundles import BundleStore
from motley_server.registry.disk import Disk

OLD, NEW, GONE, HALF = Adapter("old"), Adapter("new"), Adapter("gone"), Adapter("half")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Make a folder in memory: the death of a process asks nothing of a disk, and power is taken away by hand."""
    with TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


class Told:
    """What the store has acknowledged before it stopped."""

    def __init__(self) -> None:
        self.bundles: set[str] = set()
        self.synced: dict[str, int] = {}


def upload_new(store: BundleStore, told: Told) -> None:
    store.begin("new", NEW.files)
    for name, data in NEW.contents.items():
        for offset in range(0, len(data), bundle_uploads.CHUNK):
            store.append("new", name, offset, data[offset : offset + bundle_uploads.CHUNK])
            store.sync("new")
            told.synced = dict(store.committed("new"))
    told.bundles.add(store.commit("new"))


def upload_what_is_there(store: BundleStore, told: Told) -> None:
    told.bundles.add(upload(store, "again", OLD))


def abort_an_upload(store: BundleStore, told: Told) -> None:
    store.abort("half")


def collect(store: BundleStore, told: Told) -> None:
    store.collect({OLD.digest}, set())


ACTS: list[Callable[[BundleStore, Told], None]] = [upload_new, upload_what_is_there, abort_an_upload, collect]


def furnish(root: Path) -> None:
    """Make a store with a bundle that is kept, one that is not, and an upload that has come half way."""
    store = BundleStore(root)
    for name, adapter in (("up-old", OLD), ("up-gone", GONE)):
        upload(store, name, adapter)
        store.abort(name)
    store.begin("half", HALF.files)
    store.append("half", "adapter_config.json", 0, b"{")
    store.close()


def run_until(act: Callable[[BundleStore, Told], None], root: Path, disk: BreakingDisk) -> tuple[Told, bool]:
    """Do something with a store of its own process, and say whether it came to its end."""
    told = Told()
    store = None
    try:
        store = BundleStore(root, disk)
        act(store, told)
    except Crash:
        return told, False
    finally:
        if store is not None:
            store.close()
    return told, True


def check_after(root: Path, told: Told) -> None:
    assert {OLD.digest} | told.bundles <= bundles_in(root) <= {OLD.digest, NEW.digest, GONE.digest}
    store = BundleStore(root)
    uploads = set(os.listdir(root / "staging"))
    if told.synced:
        have = store.committed("new")
        assert all(have[name] >= size for name, size in told.synced.items())
    # Who was cut off goes on, and gets there.
    store.begin("new", NEW.files)
    send(store, "new", NEW)
    assert store.commit("new") == NEW.digest
    assert store.directory_of_upload("new") == store.directory(NEW.digest)
    store.close()
    store = BundleStore(root)
    store.collect({OLD.digest}, uploads | {"new"})
    assert {OLD.digest, NEW.digest} <= bundles_in(root) <= {OLD.digest, NEW.digest, GONE.digest}
    store.close()
    store = BundleStore(root)
    store.collect({OLD.digest}, set())
    left = [f"bundles/{path}" for path in paths_in(root / "bundles")]
    assert bundles_in(root) == {OLD.digest}
    assert paths_in(root) == sorted([*EMPTY, *left])
    store.close()


def test_stopped_at_every_change_nothing_acknowledged_is_lost_and_nothing_stays_behind(folder: Path) -> None:
    points = 0
    for act in ACTS:
        number, is_done = 0, False
        while not is_done:
            root = folder / f"{act.__name__}-{number}"
            furnish(root)
            disk = BreakingDisk(stop_at=number)
            told, is_done = run_until(act, root, disk)
            if act is upload_new:
                happened = disk.changes if is_done else disk.changes[:-1]
                assert (NEW.digest in bundles_in(root)) == ("rename files" in happened)
            check_after(root, told)
            number += 1
        points += number - 1
    assert points > 60


@pytest.mark.parametrize("with_names", [True, False])
@pytest.mark.parametrize("act", [upload_new, upload_what_is_there])
def test_without_power_at_any_change_what_was_acknowledged_is_there(
    folder: Path, act: Callable[[BundleStore, Told], None], with_names: bool
) -> None:
    number, is_done = 0, False
    while not is_done:
        root = folder / str(number)
        furnish(root)
        disk = BreakingDisk(stop_at=number)
        told, is_done = run_until(act, root, disk)
        disk.lose_power(root, with_names=with_names)
        check_after(root, told)
        number += 1


def test_a_commit_that_was_stopped_before_its_name_was_safe_makes_it_safe_when_repeated(folder: Path) -> None:
    furnish(folder)
    disk = BreakingDisk()
    run_until(upload_new, folder, disk)
    renamed = disk.changes.index("rename files")
    other = folder / "other"
    furnish(other)
    run_until(upload_new, other, BreakingDisk(stop_at=renamed + 1))
    assert NEW.digest in bundles_in(other)
    repeated = BreakingDisk()
    told, _ = run_until(lambda store, told: told.bundles.add(store.commit("new")), other, repeated)
    assert told.bundles == {NEW.digest}
    assert "fsync bundles" in repeated.changes


def test_files_are_synced_before_a_bundle_has_its_name_and_both_folders_after_it(folder: Path) -> None:
    disk = BreakingDisk()
    run_until(upload_new, folder, disk)
    before = disk.changes[: disk.changes.index("rename files")]
    written = max(number for number, change in enumerate(before) if change == "write")
    assert "fsync adapter_model.safetensors" in before[written:]
    assert before[-1] == "fsync files"
    assert disk.changes[len(before) + 1 :] == ["fsync bundles", "fsync new"]


def test_bytes_that_an_earlier_process_left_are_synced_before_they_count(folder: Path) -> None:
    furnish(folder)
    disk = BreakingDisk()
    store = BundleStore(folder, disk)
    assert dict(store.committed("half")) == {"adapter_config.json": 1, "adapter_model.safetensors": 0}
    assert "fsync adapter_config.json" in disk.changes
    store.close()


class FailingFsync(Disk):
    """A disk that fails to bring one file out, and forgets that it did."""

    def __init__(self) -> None:
        self.fails = False

    def fsync(self, file: int) -> None:
        if self.fails:
            self.fails = False
            raise OSError(5, "Input/output error")
        super().fsync(file)


def test_what_a_failed_sync_may_have_dropped_does_not_count_and_is_sent_again(folder: Path) -> None:
    disk = FailingFsync()
    store = BundleStore(folder, disk)
    store.begin("new", NEW.files)
    name, data = "adapter_model.safetensors", NEW.contents["adapter_model.safetensors"]
    store.append("new", name, 0, data[:5])
    store.sync("new")
    store.append("new", name, 5, data[5:15])
    disk.fails = True
    with pytest.raises(OSError, match="Input/output"):
        store.sync("new")
    assert store.committed("new")[name] == 5
    assert (store.directory_of_upload("new") / name).read_bytes() == data[:5]
    send(store, "new", NEW)
    assert store.commit("new") == NEW.digest
    store.close()


def test_what_a_failed_sync_may_have_dropped_of_an_earlier_process_does_not_count(folder: Path) -> None:
    furnish(folder)
    disk = FailingFsync()
    store = BundleStore(folder, disk)
    disk.fails = True
    with pytest.raises(OSError, match="Input/output"):
        store.committed("half")
    assert set(store.committed("half").values()) == {0}
    send(store, "half", HALF)
    assert store.commit("half") == HALF.digest
    store.close()


@pytest.mark.parametrize("seed", range(5))
def test_killed_while_it_writes_every_acknowledged_bundle_is_whole(folder: Path, seed: int) -> None:
    root = folder / f"root{seed}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, bundle_uploads.__file__, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        time.sleep(random.Random(seed).uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines()
    assert process.returncode == -signal.SIGKILL
    said = [line.split() for line in lines if line.endswith("\n") or line]
    acknowledged = {words[1] for words in said if words[0] == "has"}
    removed = {words[1] for words in said if words[0] == "removes"}
    begun = {words[1]: words[2] for words in said if words[0] == "begins" and len(words) == 3}
    assert acknowledged
    assert acknowledged - removed <= bundles_in(root) <= set(begun.values())
    last = list(begun)[-1]
    adapter = Adapter(f"{root.name}-{last.removeprefix('up-')}-", 300_000)
    store = BundleStore(root)
    assert upload(store, last, adapter, chunk=65_536) == adapter.digest
    store.close()
    store = BundleStore(root)
    store.collect(acknowledged - removed, set())
    assert bundles_in(root) == acknowledged - removed
    assert list((root / "staging").iterdir()) == list((root / "trash").iterdir()) == []
    store.close()
