"""Both clients push the same again, or at once, or after it was undone: what a push says is so afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from both_clients import BOTH, Ask, ask_blocking
from fake_adapter_service import FakeAdapterService, serving_adapters
from motley.v1 import adapter_pb2
from motley_client import NotFoundError, UnavailableError, resuming

MIB = 1 << 20
SIZES = {"adapter_config.json": 1, "goat_residual.safetensors": MIB + 5, "adapter_model.safetensors": 3 * MIB + 77}


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
    """Make an adapter's directory of random files."""
    random_bytes = random.Random(7).randbytes
    for name, size in SIZES.items():
        (tmp_path / name).write_bytes(random_bytes(size))
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SIZES}


def push(ask: Ask, address: str, folder: Path, text: str, *aliases: str) -> int:
    """Upload the folder with another configuration, and return the version."""
    (folder / "adapter_config.json").write_text(text)
    version: int = ask(address, "upload_adapter", "legal", folder, aliases=aliases).version
    return version


@pytest.mark.parametrize("aliases", [(), ("prod",)], ids=["default", "default is missing"])
def test_a_push_after_a_rollback_moves_the_alias_again(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path, aliases: tuple[str, ...]
) -> None:
    alias = "".join(aliases) or "default"
    assert [push(ask, address, folder, text, *aliases) for text in ("a", "b")] == [1, 2]
    for _ in range(2):
        assert ask(address, "rollback_alias", "legal", alias).version == 1
        assert (push(ask, address, folder, "b", *aliases), fake.aliases["legal"][alias].version) == (2, 2)
    assert (push(ask, address, folder, "b", *aliases), fake.aliases["legal"][alias].version) == (2, 2)
    assert len(fake.streams) == 5, "each push is one"


@pytest.mark.parametrize("aliases", [(), ("prod",), ("prod", "next")], ids=str)
def test_a_push_brings_back_an_alias_each_time_that_it_was_removed(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path, aliases: tuple[str, ...]
) -> None:
    for _ in range(4):
        assert push(ask, address, folder, "a", *aliases) == 1
        last = (aliases or ("default",))[-1]
        assert fake.aliases["legal"][last].version == 1
        ask(address, "remove_alias", "legal", last)


def test_a_push_brings_back_a_version_that_was_deleted(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path
) -> None:
    assert push(ask, address, folder, "a") == 1
    fake.add("legal", {"adapter_config.json": b"x"})
    assert push(ask, address, folder, "b", "prod") == 3
    ask(address, "remove_alias", "legal", "prod")
    ask(address, "delete_adapter_version", "legal", 3)

    assert push(ask, address, folder, "b", "prod") == fake.aliases["legal"]["prod"].version
    assert fake.files["legal", fake.aliases["legal"]["prod"].version] == content(folder)
    assert fake.versions["legal"][-1].version == fake.aliases["legal"]["prod"].version


def test_a_push_that_was_cut_goes_on_also_where_default_is_missing(
    ask: Ask, fake: FakeAdapterService, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for alias in ("prod", "next"):
        fake.add("legal", {"adapter_config.json": alias.encode()})
        fake.point("legal", alias, len(fake.versions["legal"]))
    fake.cuts = [2 * MIB]
    monkeypatch.setattr(resuming, "MAX_FRUITLESS_ATTEMPTS", 1)
    with pytest.raises(UnavailableError):
        push(ask, address, folder, "a", "prod")
    monkeypatch.undo()
    fake.streams.clear()

    assert push(ask, address, folder, "a", "prod") == 3
    num_streamed = sum(size for stream in fake.streams for _, _, size in stream)
    assert num_streamed == sum(map(len, content(folder).values())) - 2 * MIB


class Rivals(FakeAdapterService):
    """Let the second stream of an upload come as far as its n-th message before the first one finishes."""

    def __init__(self, meeting: int) -> None:
        super().__init__()
        self.begun, self._met, self._ended = Event(), Event(), Event()
        self._left = meeting

    def before(self, stream: int, upload_id: str, message: adapter_pb2.UploadAdapterRequest) -> None:
        if stream == 1:
            self.begun.set()
            assert self._met.wait(10)
        elif self._left:
            self._left -= 1
            if not self._left:
                self._met.set()
                assert self._ended.wait(10)

    def finish(self, header: Any, kept: Any, context: Any) -> adapter_pb2.AdapterVersion:
        made = super().finish(header, kept, context)
        self._ended.set()
        return made


@pytest.mark.parametrize("meeting", [1, 3, 7], ids=["first chunk", "a later chunk", "finish"])
def test_two_pushes_of_the_same_at_once_are_one_version(ask: Ask, folder: Path, meeting: int) -> None:
    fake = Rivals(meeting)
    with serving_adapters(fake) as address, ThreadPoolExecutor(1) as other:
        first = other.submit(ask_blocking, address, "upload_adapter", "legal", folder)
        assert fake.begun.wait(10)
        second = ask(address, "upload_adapter", "legal", folder)

        assert first.result(10) == second
        assert fake.files["legal", 1] == content(folder)
        assert [one.version for one in fake.versions["legal"]] == [fake.aliases["legal"]["default"].version] == [1]
    assert len({request.upload_id for name, request in fake.calls if name == "UploadAdapter"}) == 1
    assert len(fake.streams) == 3
    assert fake.streams[2] == []


class Forgetful(FakeAdapterService):
    """Forget an upload in the middle, so many times."""

    num_times = 1

    def before(self, stream: int, upload_id: str, message: adapter_pb2.UploadAdapterRequest) -> None:
        if self.num_times and message.chunk.offset == MIB:
            self.num_times -= 1
            del self.uploads[upload_id]


@pytest.mark.usefixtures("fake")  # for its short pauses
def test_an_upload_that_was_forgotten_on_the_way_begins_anew(ask: Ask, folder: Path) -> None:
    fake = Forgetful()
    with serving_adapters(fake) as address:
        assert ask(address, "upload_adapter", "legal", folder).version == 1
        assert fake.files["legal", 1] == content(folder)

        fake.num_times = 100
        (folder / "adapter_config.json").write_text("other")
        with pytest.raises((NotFoundError, UnavailableError)):  # the latter where gRPC's asyncio loses an answer
            ask(address, "upload_adapter", "legal", folder)
    assert 100 - fake.num_times == resuming.MAX_FRUITLESS_ATTEMPTS
