"""Both clients bring an adapter's files back, whole and checked, and write nowhere else."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from both_clients import BOTH, Ask
from fake_adapter_service import FakeAdapterService, serving_adapters
from fake_relay import relaying
from fake_service import refusal
from motley.v1 import adapter_pb2
from motley_client import DataLossError, InternalError, NotFoundError, UnavailableError, resuming

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "motley_manifest.json": b"",
    "adapter_model.safetensors": random.Random(3).randbytes(300_000),
}
TOTAL = sum(map(len, FILES.values()))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeAdapterService:
    monkeypatch.setattr(resuming, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(resuming, "LAST_PAUSE_SECONDS", 0.01)
    fake = FakeAdapterService()
    fake.add("legal", {"adapter_config.json": b"older"})
    fake.add("legal", FILES)
    fake.aliases["legal"] = {"default": adapter_pb2.Alias(name="default", version=2)}
    return fake


@pytest.fixture
def address(fake: FakeAdapterService) -> Iterator[str]:
    with serving_adapters(fake) as address:
        yield address


@pytest.fixture(**BOTH)
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


def found_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_a_version_comes_back_byte_for_byte_and_nothing_else(ask: Ask, address: str, tmp_path: Path) -> None:
    version = ask(address, "download_adapter", "legal", tmp_path / "new" / "folder")

    assert (version.name, version.version) == ("legal", 2)
    assert found_in(tmp_path / "new" / "folder") == FILES


@pytest.mark.parametrize("cuts", [[0], [8], [5000], [TOTAL - 1], [100_000, 0, 50_000]], ids=str)
def test_a_download_goes_on_where_it_was_cut(
    ask: Ask, fake: FakeAdapterService, address: str, tmp_path: Path, cuts: list[int | None]
) -> None:
    fake.cuts = list(cuts)
    assert ask(address, "download_adapter", "legal", tmp_path).version == 2

    assert found_in(tmp_path) == FILES
    asked = [sum(request.offsets.values()) for name, request in fake.calls if name == "DownloadAdapter"]
    assert len(asked) == len(cuts) + 1
    assert asked == sorted(asked)
    assert asked[-1] > sum(cut or 0 for cut in cuts) - 1000 * len(cuts)


def test_a_download_goes_on_over_connections_that_drop(ask: Ask, address: str, tmp_path: Path) -> None:
    with relaying(address, [150_000, 100_000]) as relay:
        assert ask(relay.address, "download_adapter", "legal", tmp_path).version == 2

    assert relay.num_dropped == 2
    assert found_in(tmp_path) == FILES


def test_a_download_goes_on_with_its_version_where_the_alias_has_moved(
    ask: Ask, fake: FakeAdapterService, address: str, tmp_path: Path
) -> None:
    fake.cuts = [100_000]
    original = fake.resolve

    def resolve_and_move(reference: str, context: object) -> adapter_pb2.AdapterVersion:
        found = original(reference, context)
        fake.aliases["legal"]["default"].version = 1
        return found

    fake.resolve = resolve_and_move  # type: ignore[method-assign]
    assert ask(address, "download_adapter", "legal", tmp_path).version == 2

    assert [request.name for _, request in fake.calls] == ["legal", "legal@2"]
    assert found_in(tmp_path) == FILES


def test_a_wrong_checksum_leaves_nothing(ask: Ask, fake: FakeAdapterService, address: str, tmp_path: Path) -> None:
    fake.files["legal", 2] = {"adapter_config.json": b"right"}
    fake.damages = True
    with pytest.raises(DataLossError) as caught:
        ask(address, "download_adapter", "legal", tmp_path)

    assert (caught.value.reason, caught.value.field) == ("CHECKSUM_MISMATCH", "adapter_config.json")
    assert found_in(tmp_path) == {}
    assert len(fake.calls) == 1


@pytest.mark.parametrize("stranger", ["../evil", "/tmp/evil", "evil.sh", "adapter_config.json.partial", "a/b"])
def test_a_server_cannot_write_elsewhere(
    ask: Ask, fake: FakeAdapterService, address: str, tmp_path: Path, stranger: str
) -> None:
    fake.stranger = stranger
    with pytest.raises(InternalError) as caught:
        ask(address, "download_adapter", "legal", tmp_path / "here")

    assert caught.value.reason == "BAD_DOWNLOAD"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["adapter_config.json", "goat_residual.safetensors"])
def test_an_adapter_that_lies_there_stays_unless_it_is_to_be_overwritten(
    ask: Ask, fake: FakeAdapterService, address: str, tmp_path: Path, name: str
) -> None:
    before = {name: b"mine", "notes.txt": b"keep"}
    for file, data in before.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(FileExistsError, match=name):
        ask(address, "download_adapter", "legal", tmp_path)
    assert (found_in(tmp_path), fake.calls) == (before, [])

    ask(address, "download_adapter", "legal", tmp_path, overwrite=True)
    assert found_in(tmp_path) == {**FILES, "notes.txt": b"keep"}


def test_a_symbolic_link_beside_the_files_is_not_followed(ask: Ask, address: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_config.json.partial").symlink_to(tmp_path / "mine")
    ask(address, "download_adapter", "legal", tmp_path / "folder")

    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert found_in(tmp_path / "folder") == FILES


def test_a_refusal_is_raised_at_once_and_leaves_nothing(
    ask: Ask, fake: FakeAdapterService, address: str, tmp_path: Path
) -> None:
    fake.refusals.append(refusal(grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", "name"))
    with pytest.raises(NotFoundError):
        ask(address, "download_adapter", "legal", tmp_path)

    assert (len(fake.calls), found_in(tmp_path)) == (1, {})


def test_a_download_without_progress_is_given_up_and_leaves_nothing(
    ask: Ask, fake: FakeAdapterService, address: str, tmp_path: Path
) -> None:
    fake.cuts = [5000, *[0] * 20]
    with pytest.raises(UnavailableError):
        ask(address, "download_adapter", "legal", tmp_path)

    assert len(fake.calls) == resuming.MAX_FRUITLESS_ATTEMPTS
    assert found_in(tmp_path) == {}


@pytest.mark.parametrize("offset", [1, -1])
def test_bytes_that_do_not_follow_are_refused(
    ask: Ask, fake: FakeAdapterService, address: str, tmp_path: Path, offset: int
) -> None:
    def answer(
        request: adapter_pb2.DownloadAdapterRequest, context: object
    ) -> Iterator[adapter_pb2.DownloadAdapterResponse]:
        yield adapter_pb2.DownloadAdapterResponse(version=fake.versions["legal"][1])
        sha256 = hashlib.sha256(b"12345").hexdigest()
        file = adapter_pb2.UploadFile(name="adapter_config.json", size_bytes=5, sha256=sha256)
        yield adapter_pb2.DownloadAdapterResponse(file=file)
        chunk = adapter_pb2.UploadChunk(file="adapter_config.json", offset=offset, data=b"12345")
        yield adapter_pb2.DownloadAdapterResponse(chunk=chunk)

    fake.download = answer  # type: ignore[method-assign]
    with pytest.raises(InternalError) as caught:
        ask(address, "download_adapter", "legal", tmp_path)
    assert (caught.value.reason, found_in(tmp_path)) == ("BAD_DOWNLOAD", {})
