"""Both clients bring a dataset to a server, whatever breaks on the way, and say of what they may not."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from both_clients import BOTH, Ask, ask_asyncio, ask_blocking
from fake_relay import relaying
from fake_service import refusal
from fake_training_service import FakeTrainingService, digest_of, serving_training
from motley.v1 import training_pb2
from motley_client import (
    Client,
    DataLossError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
    UploadPhase,
    UploadProgress,
    resuming,
)

MIB = 1 << 20
TOTAL = 2 * MIB + 77
CONTENT = random.Random(7).randbytes(TOTAL)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTrainingService:
    monkeypatch.setattr(resuming, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(resuming, "LAST_PAUSE_SECONDS", 0.01)
    return FakeTrainingService()


@pytest.fixture
def address(fake: FakeTrainingService) -> Iterator[str]:
    with serving_training(fake) as address:
        yield address


@pytest.fixture(**BOTH)
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Make a file of a dataset."""
    path = tmp_path / "tickets.jsonl"
    path.write_bytes(CONTENT)
    return path


def headers(fake: FakeTrainingService) -> list[training_pb2.DatasetHeader]:
    return [request for name, request in fake.calls if name == "UploadDataset"]


def test_a_file_becomes_a_dataset_by_its_digest_under_its_name(
    ask: Ask, fake: FakeTrainingService, address: str, path: Path
) -> None:
    made = ask(address, "upload_dataset", path, key="mk_a_b")

    assert (made.digest, made.display_name, made.size_bytes) == (digest_of(CONTENT), "tickets.jsonl", TOTAL)
    assert fake.files[made.digest] == CONTENT
    assert headers(fake) == [
        training_pb2.DatasetHeader(digest=made.digest, size_bytes=TOTAL, display_name="tickets.jsonl")
    ]
    assert set(fake.credentials) == {"Bearer mk_a_b"}


@pytest.mark.parametrize(("given", "shown"), [("mine", "mine"), ("", "")])
def test_a_display_name_that_is_given_stands_for_the_files(
    ask: Ask, address: str, path: Path, given: str, shown: str
) -> None:
    assert ask(address, "upload_dataset", str(path), given).display_name == shown


def test_samples_and_lines_become_one_line_each(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    samples = [{"prompt": "é", "completion": "\n"}, '{"text": "a"}', '{"text": "b"}\n']
    made = ask(address, "upload_dataset", samples, "typed")

    assert made.display_name == "typed"
    lines = fake.files[made.digest].decode().split("\n")
    assert lines[0] == '{"prompt": "é", "completion": "\\n"}'
    assert [json.loads(line) for line in lines[1:3]] == [{"text": "a"}, {"text": "b"}]
    assert lines[3:] == [""]
    opened = io.StringIO('{"text": "a"}\n{"text": "b"}')
    assert fake.files[ask(address, "upload_dataset", opened).digest] == b'{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize("cuts", [[0], [MIB], [TOTAL - 1], [1, 2, 3, MIB + 1]], ids=str)
def test_an_upload_goes_on_where_it_was_cut_and_sends_nothing_twice_that_was_kept(
    ask: Ask, fake: FakeTrainingService, address: str, path: Path, cuts: list[int]
) -> None:
    fake.cuts = list(cuts)
    made = ask(address, "upload_dataset", path)

    assert fake.files[made.digest] == CONTENT
    assert len(fake.streams) == len(cuts) + 1
    assert sum(size for _, size in fake.streams[-1]) == TOTAL - sum(cuts)


def test_lines_that_were_cut_go_on_too(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    fake.cuts = [MIB + 5]
    made = ask(address, "upload_dataset", ["x" * (TOTAL - 1)])

    assert fake.files[made.digest] == b"x" * (TOTAL - 1) + b"\n"
    assert sum(size for _, size in fake.streams[-1]) == TOTAL - MIB - 5


def test_an_upload_goes_on_over_connections_that_drop(
    ask: Ask, fake: FakeTrainingService, address: str, path: Path
) -> None:
    with relaying(address, [MIB, 1000]) as relay:
        made = ask(relay.address, "upload_dataset", path)

    assert relay.num_dropped == 2
    assert fake.files[made.digest] == CONTENT


@pytest.mark.usefixtures("fake")  # for its short pauses
@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "deleted"])
def test_an_upload_that_ended_elsewhere_is_looked_up_or_begun_anew(ask: Ask, path: Path, is_finished: bool) -> None:
    class Rival(FakeTrainingService):
        def append(self, kept: bytearray, chunk: training_pb2.DatasetChunk, context: Any) -> None:
            if len(self.streams) == 1 and chunk.offset:
                self.uploads.clear()
                if is_finished:
                    self.add_dataset(CONTENT)
                self.abort(context, refusal(grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND", "header.digest"))
            super().append(kept, chunk, context)

    fake = Rival()
    with serving_training(fake) as address:
        assert ask(address, "upload_dataset", path).digest == digest_of(CONTENT)
    assert fake.files == {digest_of(CONTENT): CONTENT}
    assert sum(size for _, size in fake.streams[1]) == (0 if is_finished else TOTAL)


def test_a_server_that_lost_bytes_gets_them_again(
    ask: Ask, fake: FakeTrainingService, address: str, path: Path
) -> None:
    fake.cuts, fake.forgets_bytes = [MIB, MIB], MIB // 2
    made = ask(address, "upload_dataset", path)

    assert fake.files[made.digest] == CONTENT
    assert len(fake.streams) == 3


def test_what_a_client_that_ended_left_is_not_sent_again(
    ask: Ask, fake: FakeTrainingService, address: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.cuts = [MIB]
    monkeypatch.setattr(resuming, "MAX_FRUITLESS_ATTEMPTS", 1)
    with pytest.raises(UnavailableError):
        ask(address, "upload_dataset", path)
    assert fake.datasets == {}
    monkeypatch.undo()

    fake.streams.clear()
    ask(address, "upload_dataset", path)
    assert sum(size for stream in fake.streams for _, size in stream) == TOTAL - MIB


def test_what_is_there_already_is_not_sent(ask: Ask, fake: FakeTrainingService, address: str, path: Path) -> None:
    first = ask(address, "upload_dataset", path)
    told: list[UploadProgress] = []

    assert ask(address, "upload_dataset", path, progress=told.append) == first
    assert fake.streams[1:] == [[]]
    assert told[-1] == UploadProgress(UploadPhase.SENDING, TOTAL, TOTAL)


def test_progress_only_grows_and_tells_hashing_from_sending(
    ask: Ask, fake: FakeTrainingService, address: str, path: Path
) -> None:
    fake.cuts, fake.forgets_bytes = [2 * MIB, MIB], MIB
    told: list[UploadProgress] = []
    ask(address, "upload_dataset", path, progress=told.append)

    assert {one.total_bytes for one in told} == {TOTAL}
    phases = [[one.done_bytes for one in told if one.phase is phase] for phase in UploadPhase]
    assert [one.phase for one in told] == [phase for phase, done in zip(UploadPhase, phases, strict=True) for _ in done]
    for done in phases:
        assert done[-1] == TOTAL
        assert len(done) > 2
        assert all(earlier < later for earlier, later in pairwise(done))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError),
        (grpc.StatusCode.INTERNAL, InternalError),
    ],
)
def test_an_answer_that_refuses_is_raised_at_once(
    ask: Ask, fake: FakeTrainingService, address: str, path: Path, code: grpc.StatusCode, kind: type[Exception]
) -> None:
    def refuse(kept: object, chunk: object, context: Any) -> None:
        fake.abort(context, refusal(code, "NO", "line 7"))

    fake.append = refuse  # type: ignore[assignment, method-assign]
    with pytest.raises(kind) as caught:
        ask(address, "upload_dataset", path)

    assert (getattr(caught.value, "reason", None), getattr(caught.value, "field", None)) == ("NO", "line 7")
    # Where gRPC's asyncio loses an answer that came while it wrote, the client has to ask again.
    assert len(fake.streams) == 1 or (ask is ask_asyncio and len(fake.streams) < resuming.MAX_FRUITLESS_ATTEMPTS)


def test_an_upload_without_progress_is_given_up(ask: Ask, fake: FakeTrainingService, address: str, path: Path) -> None:
    fake.cuts = [MIB, *[0] * 20]
    with pytest.raises(UnavailableError):
        ask(address, "upload_dataset", path)

    assert len(fake.streams) == 1 + resuming.MAX_FRUITLESS_ATTEMPTS


def test_the_timeout_is_for_the_whole(ask: Ask, fake: FakeTrainingService, address: str, path: Path) -> None:
    fake.cuts = [1] * 10_000
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        ask(address, "upload_dataset", path, timeout=0.3)

    assert fake.datasets == {}


def test_a_file_that_changes_on_the_way_is_no_dataset(ask: Ask, address: str, path: Path) -> None:
    def change(progress: UploadProgress) -> None:
        if progress.phase is UploadPhase.SENDING:
            path.write_bytes(bytes(TOTAL))

    with pytest.raises(DataLossError) as caught:
        ask(address, "upload_dataset", path, progress=change)
    assert caught.value.reason == "CHECKSUM_MISMATCH"


def test_a_file_that_becomes_shorter_on_the_way_is_named(ask: Ask, address: str, path: Path) -> None:
    def cut(progress: UploadProgress) -> None:
        if progress.phase is UploadPhase.SENDING:
            path.write_bytes(b"")

    with pytest.raises(DataLossError, match=r"tickets\.jsonl") as caught:
        ask(address, "upload_dataset", path, progress=cut)
    assert caught.value.reason == "FILE_CHANGED"


def test_a_path_that_leads_to_no_file_is_refused_before_anything_is_sent(
    ask: Ask, fake: FakeTrainingService, address: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ask(address, "upload_dataset", tmp_path)
    assert (caught.value.reason, caught.value.field) == ("NOT_A_FILE", "source")
    with pytest.raises(FileNotFoundError):
        ask(address, "upload_dataset", str(tmp_path / "none.jsonl"))
    assert fake.calls == []


def nested() -> Mapping[str, object]:
    """Return a sample too deep for JSON."""
    sample: dict[str, object] = {}
    for _ in range(100_000):
        sample = {"a": sample}
    return sample


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (["{}", "{\n}"], "line 2 has a line break inside"),
        (["{}", "{}", "\ud800"], "line 3: .*surrogates"),
        ([{"text": "\ud800"}], "line 1: .*surrogates"),
        ([{"text": float("nan")}], "line 1: .*JSON"),
        ([{"text": {1, 2}}], "line 1: .*set"),
        ([nested()], "line 1: .*recursion"),
        ([b"{}"], "line 1: a text or a mapping, not bytes"),
        (b"{}", "line 1: a text or a mapping, not int"),
        ({"text": "a"}, "one sample alone"),
    ],
    ids=["break", "surrogate", "surrogate inside", "nan", "set", "deep", "bytes", "bytes alone", "mapping alone"],
)
def test_samples_that_make_no_lines_are_refused_by_their_number(
    fake: FakeTrainingService, address: str, source: Any, words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        ask_blocking(address, "upload_dataset", source)

    assert (caught.value.reason, caught.value.field, fake.calls) == ("INVALID_VALUE", "source", [])


def test_a_display_name_that_cannot_be_sent_is_named(fake: FakeTrainingService, address: str, path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ask_blocking(address, "upload_dataset", path, "\ud800")

    assert (caught.value.field, fake.calls) == ("display_name", [])


def test_a_large_file_is_never_in_memory_whole(tmp_path: Path) -> None:
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.truncate(32 * MIB)

    class Sink(FakeTrainingService):
        def append(self, kept: bytearray, chunk: training_pb2.DatasetChunk, context: Any) -> None:
            assert len(chunk.data) <= MIB

        def finish(self, header: Any, data: bytes, context: Any) -> training_pb2.Dataset:
            return training_pb2.Dataset(digest=header.digest)

    with serving_training(Sink()) as address, Client(address) as client:
        tracemalloc.start()
        try:
            client.upload_dataset(tmp_path / "large.jsonl")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 16 * MIB
