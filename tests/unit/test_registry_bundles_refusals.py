"""Bundles: names, ids, links, sizes and bytes that are refused, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bundle_uploads import EMPTY, Adapter, bundles_in, paths_in, send, upload
from motley_server.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    MotleyError,
    NotFoundError,
    OutOfRangeError,
)
from motley_server.registry.bundle_files import MAX_FILE_BYTES, BundleFile
from motley_server.registry.bundles import BundleStore

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


def test_what_cannot_be_part_of_the_file_is_refused_and_not_written(store: BundleStore) -> None:
    store.begin("u", ONE.files)
    store.append("u", WEIGHTS, 0, DATA[:4])
    cases: dict[tuple[str, int, bytes], tuple[type[MotleyError], str, str]] = {
        (WEIGHTS, 4, DATA): (OutOfRangeError, "UPLOAD_PAST_END", "offset"),
        (WEIGHTS, 2, b"!!!!"): (DataLossError, "UPLOAD_BYTES_DIFFER", WEIGHTS),
        (WEIGHTS, -1, b"o"): (InvalidArgumentError, "OUT_OF_RANGE", "offset"),
        ("motley_manifest.json", 0, b"{}"): (InvalidArgumentError, "FILE_NOT_IN_UPLOAD", "name"),
        ("../plan.json", 0, b"{}"): (InvalidArgumentError, "FILE_NOT_IN_UPLOAD", "name"),
    }
    for (name, offset, data), (kind, reason, field) in cases.items():
        assert refusal(kind, lambda n=name, o=offset, d=data: store.append("u", n, o, d)) == (reason, field)
    assert (store.directory_of_upload("u") / WEIGHTS).read_bytes() == DATA[:4]


@pytest.mark.parametrize("restarts", [False, True])
def test_an_upload_of_other_bytes_than_announced_is_no_bundle(tmp_path: Path, restarts: bool) -> None:
    store = BundleStore(tmp_path)
    wrong = [replace(file, sha256="0" * 64) if file.name == WEIGHTS else file for file in ONE.files]
    store.begin("u", wrong)
    send(store, "u", ONE)
    if restarts:
        store = reopened(store, tmp_path)
    for check in (store.verify, store.commit):
        assert refusal(DataLossError, lambda c=check: c("u")) == ("CHECKSUM_MISMATCH", WEIGHTS)
    assert bundles_in(tmp_path) == set()
    store.close()


def test_bytes_that_changed_on_disk_between_processes_are_found(store: BundleStore, tmp_path: Path) -> None:
    store.begin("u", ONE.files)
    send(store, "u", ONE)
    (store.directory_of_upload("u") / WEIGHTS).write_bytes(b"x" * len(DATA))
    again = reopened(store, tmp_path)
    assert refusal(DataLossError, lambda: again.commit("u")) == ("CHECKSUM_MISMATCH", WEIGHTS)
    again.close()


def test_a_file_longer_than_announced_is_found_even_if_its_checksum_is_right(
    store: BundleStore, tmp_path: Path
) -> None:
    short = [replace(file, size_bytes=file.size_bytes - 1) for file in ONE.files if file.name == WEIGHTS]
    store.begin("u", short)
    (store.directory_of_upload("u") / WEIGHTS).write_bytes(DATA)
    again = reopened(store, tmp_path)
    assert refusal(DataLossError, lambda: again.verify("u")) == ("CHECKSUM_MISMATCH", WEIGHTS)
    again.close()


def test_an_upload_that_is_not_complete_is_no_bundle(store: BundleStore) -> None:
    store.begin("u", ONE.files)
    send(store, "u", replace(ONE, size_bytes=19))
    assert refusal(FailedPreconditionError, lambda: store.commit("u")) == ("UPLOAD_INCOMPLETE", WEIGHTS)
    send(store, "u", ONE)
    assert store.commit("u") == ONE.digest


FILE = ONE.files[0]
ANNOUNCED: dict[str, tuple[list[BundleFile], str, str]] = {
    "nothing": ([], "EMPTY_UPLOAD", "files"),
    "a file twice": ([FILE, FILE], "DUPLICATE_FILE", "files[1].name"),
    "a negative size": ([replace(FILE, size_bytes=-1)], "OUT_OF_RANGE", "files[0].size_bytes"),
    "a huge size": ([replace(FILE, size_bytes=MAX_FILE_BYTES + 1)], "OUT_OF_RANGE", "files[0].size_bytes"),
    "a checksum in capitals": ([replace(FILE, sha256="A" * 64)], "INVALID_CHECKSUM", "files[0].sha256"),
    "a checksum and a line": ([replace(FILE, sha256="a" * 64 + "\n")], "INVALID_CHECKSUM", "files[0].sha256"),
} | {
    f"the name {name!r:.30}": ([FILE, BundleFile(name, 1, "a" * 64)], "FILE_NOT_ALLOWED", "files[1].name")
    for name in (
        "", ".", "..", "/etc/passwd", "../adapter_config.json", "x/adapter_config.json", "adapter_config.json/",
        "adapter_config.json\0", "adapter_config.json\n", "ADAPTER_CONFIG.JSON", "plan.json", "adapter_model.bin",
        "a" * 100_000, "adapter_config.json ", "\u202ejson", "\ud800",
    )
}  # fmt: skip


@pytest.mark.parametrize(("files", "reason", "field"), ANNOUNCED.values(), ids=map(ascii, ANNOUNCED))
def test_what_no_adapter_consists_of_is_refused_and_leaves_nothing(
    store: BundleStore, tmp_path: Path, files: list[BundleFile], reason: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        store.begin("u", files)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert len(caught.value.message) < 1000
    assert paths_in(tmp_path) == EMPTY


@pytest.mark.parametrize("upload_id", ["", ".", "..", "../bundles", "a/b", "/tmp", "a\0", "a\n", "-a", "a" * 65, "ä"])
def test_an_upload_id_that_is_a_path_is_refused_everywhere(store: BundleStore, tmp_path: Path, upload_id: str) -> None:
    upload(store, "u", ONE)
    store.abort("u")
    before = paths_in(tmp_path)
    assert refusal(InvalidArgumentError, lambda: store.begin(upload_id, ONE.files)) == (
        "INVALID_UPLOAD_ID", "upload_id",
    )  # fmt: skip
    calls: list[Callable[[str], object]] = [
        store.sync, store.verify, store.commit, store.committed, store.directory_of_upload,
        lambda name: store.append(name, WEIGHTS, 0, DATA),
    ]  # fmt: skip
    for call in calls:
        assert refusal(NotFoundError, lambda c=call: c(upload_id)) == ("UPLOAD_NOT_FOUND", "upload_id")
    store.abort(upload_id)
    assert paths_in(tmp_path) == before


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:..", "sha256:../bundles", "a" * 64, "sha256:" + "a" * 64])
def test_a_digest_that_is_no_bundle_is_not_found(store: BundleStore, digest: str) -> None:
    assert refusal(NotFoundError, lambda: store.directory(digest)) == ("BUNDLE_NOT_FOUND", "digest")


def test_a_link_in_the_place_of_a_file_or_a_folder_is_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = outside / WEIGHTS
    secret.write_bytes(b"mine")
    root = tmp_path / "root"
    store = BundleStore(root)
    store.begin("u", ONE.files)
    file = store.directory_of_upload("u") / WEIGHTS
    file.unlink()
    file.symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        store.append("u", WEIGHTS, 0, DATA)
    (root / "staging" / "linked").symlink_to(outside)
    (root / "bundles" / ("a" * 64)).symlink_to(outside)
    assert refusal(NotFoundError, lambda: store.directory("sha256:" + "a" * 64))[0] == "BUNDLE_NOT_FOUND"
    store.close()
    store = BundleStore(root)
    store.collect(set(), set())
    assert paths_in(root) == EMPTY
    assert secret.read_bytes() == b"mine"
    store.close()


def test_a_link_in_the_place_of_a_folder_of_the_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "staging").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        BundleStore(tmp_path / "root")
