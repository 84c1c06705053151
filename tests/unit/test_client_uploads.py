"""Both clients bring an adapter's files to a server, whatever breaks on the way, and say of what they may not."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from both_clients import BOTH, Ask, ask_asyncio, ask_blocking
from fake_adapter_service import FakeAdapterService, serving_adapters
from fake_relay import relaying
from fake_service import refusal
from motley.v1 import adapter_pb2
from motley_client import (
    AdapterKind,
    AlreadyExistsError,
    Client,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
    UploadPhase,
    UploadProgress,
    resuming,
)

MIB = 1 << 20
SIZES = {"adapter_config.json": 700, "goat_residual.safetensors": MIB + 5, "adapter_model.safetensors": 3 * MIB + 77}
TOTAL = sum(SIZES.values())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeAdapterService:
    monkeypatch.setattr(resuming, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(resuming, "LAST_PAUSE_SECONDS", 0.01)
    return FakeAdapterService()


@pytest.fixture
def address(fake: FakeAdapterService) -> Iterator[str]:
    with serving_adapters(fake) as address:
        yield address


@pytest.fixture(**BOTH)
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make an adapter's directory of random files, and what else lies in such a one."""
    random_bytes = random.Random(7).randbytes
    for name, size in SIZES.items():
        (tmp_path / name).write_bytes(random_bytes(size))
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / "checkpoint").mkdir()
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SIZES}


def num_streamed(fake: FakeAdapterService) -> int:
    return sum(size for stream in fake.streams for _, _, size in stream)


def test_a_directory_becomes_a_version_with_its_files_labels_and_aliases(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path
) -> None:
    made = ask(
        address, "upload_adapter", "legal", folder, aliases=["prod", "new"], labels={"team": "search"},
        kind=AdapterKind.S2FT,
    )  # fmt: skip

    assert (made.name, made.version, made.kind, made.labels) == ("legal", 1, AdapterKind.S2FT, {"team": "search"})
    assert fake.files["legal", 1] == content(folder)
    header = next(request for name, request in fake.calls if name == "UploadAdapter")
    assert (header.adapter_name, list(header.aliases)) == ("legal", ["prod", "new"])
    assert {file.name: (file.size_bytes, file.sha256) for file in header.files} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content(folder).items()
    }
    assert len(fake.streams) == 1


@pytest.mark.parametrize("cuts", [[0], [700], [700 + MIB], [TOTAL - 1], [1, 2, 3, MIB + 1], [MIB] * 4], ids=str)
def test_an_upload_goes_on_where_it_was_cut_and_sends_nothing_twice_that_was_kept(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path, cuts: list[int]
) -> None:
    fake.cuts = list(cuts)
    made = ask(address, "upload_adapter", "legal", folder)

    assert (made.version, fake.files["legal", 1]) == (1, content(folder))
    assert len(fake.streams) == len(cuts) + 1
    assert sum(size for _, _, size in fake.streams[-1]) == TOTAL - sum(cuts)
    assert len({request.upload_id for name, request in fake.calls if name == "UploadAdapter"}) == 1


def test_an_upload_goes_on_over_connections_that_drop(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path
) -> None:
    with relaying(address, [2 * MIB, 1000, MIB // 2]) as relay:
        made = ask(relay.address, "upload_adapter", "legal", folder)

    assert relay.num_dropped == 3
    assert (made.version, fake.files["legal", 1]) == (1, content(folder))


def test_a_server_that_lost_bytes_gets_them_again(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path
) -> None:
    fake.cuts, fake.forgets_bytes = [2 * MIB, 2 * MIB], MIB // 2
    assert ask(address, "upload_adapter", "legal", folder).version == 1

    assert fake.files["legal", 1] == content(folder)
    assert len(fake.streams) == 3


def test_what_a_client_that_ended_left_is_not_sent_again(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.cuts = [2 * MIB]
    monkeypatch.setattr(resuming, "MAX_FRUITLESS_ATTEMPTS", 1)
    with pytest.raises(UnavailableError):
        ask(address, "upload_adapter", "legal", folder, labels={"a": "1", "b": "2"})
    assert fake.finished == {}
    monkeypatch.undo()

    fake.streams.clear()
    assert ask(address, "upload_adapter", "legal", folder, labels={"b": "2", "a": "1"}).version == 1
    assert num_streamed(fake) == TOTAL - 2 * MIB
    assert len({request.upload_id for name, request in fake.calls if name == "UploadAdapter"}) == 1


def test_an_upload_that_was_finished_before_is_answered_with_its_version(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path
) -> None:
    first = ask(address, "upload_adapter", "legal", folder, upload_id="mine")
    told: list[UploadProgress] = []
    again = ask(address, "upload_adapter", "legal", folder, upload_id="mine", progress=told.append)

    assert again == first
    assert len(fake.versions["legal"]) == 1
    assert told[-1] == UploadProgress(UploadPhase.SENDING, TOTAL, TOTAL)


def test_going_back_to_older_content_is_a_new_upload_that_moves_the_alias(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path
) -> None:
    config = folder / "adapter_config.json"
    for text in ("old", "new", "old"):
        config.write_text(text)
        made = ask(address, "upload_adapter", "legal", folder)

    assert made.version == fake.aliases["legal"]["default"].version == 3
    assert fake.files["legal", 3]["adapter_config.json"] == b"old"


@pytest.mark.parametrize("change", [{"aliases": ["prod"]}, {"labels": {"a": "b"}}, {"kind": AdapterKind.LORA}], ids=str)
def test_an_upload_that_says_something_else_has_another_id(
    fake: FakeAdapterService, address: str, folder: Path, change: dict[str, Any]
) -> None:
    for words in ({}, change):
        fake.versions.clear()
        ask_blocking(address, "upload_adapter", "legal", folder, **words)

    first, second = (request.upload_id for name, request in fake.calls if name == "UploadAdapter")
    assert first != second
    assert len(first) == 40


def test_progress_only_grows_and_tells_hashing_from_sending(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path
) -> None:
    fake.cuts, fake.forgets_bytes = [3 * MIB, 2 * MIB], MIB
    told: list[UploadProgress] = []
    ask(address, "upload_adapter", "legal", folder, progress=told.append)

    assert {one.total_bytes for one in told} == {TOTAL}
    phases = [[one.done_bytes for one in told if one.phase is phase] for phase in UploadPhase]
    assert [one.phase for one in told] == [phase for phase, done in zip(UploadPhase, phases, strict=True) for _ in done]
    for done in phases:
        assert done[-1] == TOTAL
        assert len(done) > 4
        assert all(earlier < later for earlier, later in pairwise(done))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
        (grpc.StatusCode.DATA_LOSS, DataLossError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPreconditionError),
        (grpc.StatusCode.ALREADY_EXISTS, AlreadyExistsError),
        (grpc.StatusCode.INTERNAL, InternalError),
    ],
)
def test_an_answer_that_refuses_is_raised_at_once(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path, code: grpc.StatusCode, kind: type[Exception]
) -> None:
    def refuse(kept: object, chunk: object, context: Any) -> None:
        fake.abort(context, refusal(code, "NO", "files"))

    fake.append = refuse  # type: ignore[assignment, method-assign]
    with pytest.raises(kind) as caught:
        ask(address, "upload_adapter", "legal", folder)

    assert (getattr(caught.value, "reason", None), getattr(caught.value, "field", None)) == ("NO", "files")
    # Where gRPC's asyncio loses an answer that came while it wrote, the client has to ask again.
    assert len(fake.streams) == 1 or (ask is ask_asyncio and len(fake.streams) < resuming.MAX_FRUITLESS_ATTEMPTS)


def test_an_upload_without_progress_is_given_up(ask: Ask, fake: FakeAdapterService, address: str, folder: Path) -> None:
    fake.cuts = [MIB, *[0] * 20]
    with pytest.raises(UnavailableError):
        ask(address, "upload_adapter", "legal", folder)

    assert len(fake.streams) == 1 + resuming.MAX_FRUITLESS_ATTEMPTS


def test_the_timeout_is_for_the_whole(ask: Ask, fake: FakeAdapterService, address: str, folder: Path) -> None:
    fake.cuts = [1] * 10_000
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        ask(address, "upload_adapter", "legal", folder, timeout=0.3)

    assert fake.finished == {}


def test_a_file_that_changes_on_the_way_is_no_version(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path
) -> None:
    model = folder / "adapter_model.safetensors"

    def flip(progress: UploadProgress) -> None:
        if progress.phase is UploadPhase.SENDING:
            model.write_bytes(bytes(SIZES[model.name]))

    with pytest.raises(DataLossError) as caught:
        ask(address, "upload_adapter", "legal", folder, progress=flip)
    assert caught.value.reason == "CHECKSUM_MISMATCH"


def test_a_file_that_becomes_shorter_on_the_way_is_named(ask: Ask, address: str, folder: Path) -> None:
    model = folder / "adapter_model.safetensors"

    def cut(progress: UploadProgress) -> None:
        if progress.phase is UploadPhase.SENDING:
            model.write_bytes(b"")

    with pytest.raises(DataLossError, match=r"adapter_model\.safetensors") as caught:
        ask(address, "upload_adapter", "legal", folder, progress=cut)
    assert caught.value.reason == "FILE_CHANGED"


def test_what_progress_raises_ends_the_upload(ask: Ask, fake: FakeAdapterService, address: str, folder: Path) -> None:
    def refuse(progress: UploadProgress) -> None:
        if progress.phase is UploadPhase.SENDING and progress.done_bytes:
            raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        ask(address, "upload_adapter", "legal", folder, progress=refuse)
    assert fake.finished == {}


def make_symbolic_link(folder: Path) -> None:
    (folder / "elsewhere").write_bytes(b"x")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(folder / "elsewhere")


def make_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def make_folder(folder: Path) -> None:
    (folder / "motley_manifest.json").mkdir()


def make_nothing(folder: Path) -> None:
    for name in SIZES:
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "reason", "hint"),
    [
        (make_symbolic_link, "NOT_A_FILE", "symbolic link"),
        (make_pickle, "PICKLED_TENSORS", "safe_serialization"),
        (make_folder, "NOT_A_FILE", "motley_manifest"),
        (make_nothing, "NO_ADAPTER_FILES", "adapter_config"),
    ],
)
def test_a_directory_that_is_no_adapter_is_refused_before_anything_is_sent(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path, spoil: Any, reason: str, hint: str
) -> None:
    spoil(folder)
    with pytest.raises(InvalidArgumentError, match=hint) as caught:
        ask(address, "upload_adapter", "legal", folder)

    assert (caught.value.reason, caught.value.field, fake.calls) == (reason, "directory", [])


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"name": "\ud800"}, "adapter_name"),
        ({"aliases": "prod"}, "aliases"),
        ({"labels": {"a": 5}}, "labels"),
        ({"kind": "lora "}, "kind"),
        ({"upload_id": "\ud800"}, "upload_id"),
    ],
)
def test_words_that_cannot_be_sent_are_named(
    fake: FakeAdapterService, address: str, folder: Path, words: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ask_blocking(address, "upload_adapter", **({"name": "legal", "directory": folder} | words))

    assert (caught.value.reason, caught.value.field, fake.calls) == ("INVALID_VALUE", field, [])


def test_a_large_file_is_never_in_memory_whole(tmp_path: Path) -> None:
    size = 64 * MIB
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.truncate(size)

    class Sink(FakeAdapterService):
        def append(self, kept: dict[str, bytearray], chunk: adapter_pb2.UploadChunk, context: Any) -> None:
            assert len(chunk.data) <= MIB

        def finish(self, header: Any, kept: Any, context: Any) -> adapter_pb2.AdapterVersion:
            return adapter_pb2.AdapterVersion(name="legal", version=1)

    with serving_adapters(Sink()) as address, Client(address) as client:
        tracemalloc.start()
        try:
            client.upload_adapter("legal", tmp_path, upload_id="mine")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 24 * MIB
