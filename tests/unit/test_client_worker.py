"""What a worker says and hears by the client: terms, leases, events, and datasets that arrive whole or not at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_worker_service import FakeJob, FakeWorkerService, serving_workers
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from motley.v1 import training_pb2
from motley_client import (
    DataLossError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    resuming,
)
from motley_client import convert_worker as convert
from motley_client.types_worker import JobEnding, LeaseEnd
from motley_client.worker_calls import LeaseClient, WorkerClient

DATA = random.Random(7).randbytes(10_500)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWorkerService:
    monkeypatch.setattr(resuming, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(resuming, "LAST_PAUSE_SECONDS", 0.01)
    return FakeWorkerService()


@pytest.fixture
def address(fake: FakeWorkerService) -> Iterator[str]:
    with serving_workers(fake) as address:
        yield address


@pytest.fixture
def job(fake: FakeWorkerService, address: str) -> FakeJob:
    """Return a job in a lease."""
    job = fake.add_job(DATA)
    fake._lease(job, "w1")
    return job


def fetch(address: str, token: str, digest: str, path: Path) -> None:
    async def run() -> None:
        async with LeaseClient(address, token) as client:
            await client.fetch_dataset(digest, path)

    asyncio.run(run())


def test_a_dataset_arrives_whole(fake: FakeWorkerService, address: str, job: FakeJob, tmp_path: Path) -> None:
    path = tmp_path / "data" / "x.jsonl"

    fetch(address, job.tokens[-1], job.spec.dataset, path)

    assert path.read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path]


def test_a_dataset_that_is_cut_goes_on_where_it_broke(
    fake: FakeWorkerService, address: str, job: FakeJob, tmp_path: Path
) -> None:
    fake.cuts = [2500, 0, 5000]

    fetch(address, job.tokens[-1], job.spec.dataset, tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == DATA
    assert fake.offsets == [0, 2500, 2500, 7500]


def test_an_attempt_takes_up_what_another_left(
    fake: FakeWorkerService, address: str, job: FakeJob, tmp_path: Path
) -> None:
    fake.cuts = [3000, *[0] * resuming.MAX_FRUITLESS_ATTEMPTS]
    with pytest.raises(Exception, match="no server answers"):
        fetch(address, job.tokens[-1], job.spec.dataset, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    fake.cuts, fake.offsets = [], []

    fetch(address, job.tokens[-1], job.spec.dataset, tmp_path / "x")

    assert fake.offsets == [3000]
    assert (tmp_path / "x").read_bytes() == DATA


@pytest.mark.parametrize(
    ("left", "offsets"),
    [(b"damaged" * 100, [700, 0]), (DATA + b"more", [10_504, 0]), (DATA, [])],
    ids=["other bytes", "too many", "all of them"],
)
def test_what_lay_there_is_taken_up_only_if_it_was_right(
    fake: FakeWorkerService, address: str, job: FakeJob, tmp_path: Path, left: bytes, offsets: list[int]
) -> None:
    (tmp_path / ".x.partial").write_bytes(left)

    fetch(address, job.tokens[-1], job.spec.dataset, tmp_path / "x")

    assert (tmp_path / "x").read_bytes() == DATA
    assert fake.offsets == offsets


def test_other_bytes_than_were_asked_for_are_no_dataset(
    fake: FakeWorkerService, address: str, job: FakeJob, tmp_path: Path
) -> None:
    fake.datasets[job.spec.dataset] = DATA[::-1]

    with pytest.raises(DataLossError) as caught:
        fetch(address, job.tokens[-1], job.spec.dataset, tmp_path / "x")

    assert (caught.value.reason, caught.value.field) == ("CHECKSUM_MISMATCH", "digest")
    assert not (tmp_path / "x").exists()
    assert (tmp_path / ".x.partial").read_bytes() == b""


def test_what_is_not_the_jobs_is_not_given(address: str, job: FakeJob, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        fetch(address, job.tokens[-1], f"sha256:{'0' * 64}", tmp_path / "x")
    with pytest.raises(UnauthenticatedError):
        fetch(address, "mj_another", job.spec.dataset, tmp_path / "x")


def test_a_worker_registers_and_leases(fake: FakeWorkerService, address: str) -> None:
    made = fake.add_job(
        method=training_pb2.TRAINING_METHOD_S2FT,
        s2ft=training_pb2.S2ftSettings(disjoint_from=["a", "b"]),
        gate=training_pb2.Gate(dataset="sha256:1"),
        publish=training_pb2.PublishSettings(aliases=["beta"], labels={"k": "v"}),
    )

    async def run() -> tuple[Any, Any, Any]:
        async with WorkerClient(address, "mk_1") as client:
            terms = await client.register_worker("w", ["lora", "s2ft"], fake.base, "cpu", "1.0")
            return terms, await client.lease_job("w", 1), await client.lease_job("w", 0.01)

    terms, lease, none = asyncio.run(run())

    assert (terms.quantization, terms.dtype, terms.lease_seconds) == ("nf4", "bfloat16", 5.0)
    assert none is None
    assert (lease.token, lease.upload_id) == (made.tokens[0], f"upload-of-{made.id}")
    found = lease.job
    assert (found.id, found.method, found.adapter_name, found.aliases) == (made.id, "s2ft", "legal", ("beta",))
    assert (found.datasets, found.reads) == ((made.spec.dataset, "sha256:1"), ("a", "b"))
    assert (found.labels, found.base_fingerprint) == ({"k": "v"}, fake.base)
    assert found.spec["s2ft"] == {"disjoint_from": ["a", "b"]}
    assert lease.token not in repr(lease)


def test_terms_and_leases_tell_the_digest_of_the_terms() -> None:
    told = training_pb2.RegisterWorkerResponse(lease_duration=Duration(seconds=5), terms_digest="sha256:1")
    assert convert.terms(told).terms_digest == "sha256:1"
    lent = convert.lease(training_pb2.LeaseJobResponse(lease=training_pb2.Lease(token="mj_1", terms_digest="sha256:2")))
    assert lent is not None
    assert lent.terms_digest == "sha256:2"


def test_a_dataset_that_is_named_twice_is_fetched_once() -> None:
    spec = training_pb2.TrainingSpec(dataset="sha256:1", gate=training_pb2.Gate(dataset="sha256:1"))
    leased = convert.lease(
        training_pb2.LeaseJobResponse(lease=training_pb2.Lease(job=training_pb2.TrainingJob(spec=spec)))
    )
    assert leased is not None
    assert (leased.job.datasets, leased.job.method) == (("sha256:1",), "unspecified")


def test_a_job_of_loram_has_the_text_to_align_on_and_the_adapter_whose_cut_is_taken() -> None:
    alignment = training_pb2.LoramAlignment(dataset="sha256:2")
    spec = training_pb2.TrainingSpec(
        method=training_pb2.TRAINING_METHOD_LORAM,
        dataset="sha256:1",
        loram=training_pb2.LoramSettings(same_cut_as="legal@3", alignment=alignment),
    )
    leased = convert.lease(
        training_pb2.LeaseJobResponse(lease=training_pb2.Lease(job=training_pb2.TrainingJob(spec=spec)))
    )
    assert leased is not None
    assert (leased.job.method, leased.job.datasets) == ("loram", ("sha256:1", "sha256:2"))
    assert leased.job.reads == ("legal@3",)
    assert leased.job.spec["loram"] == {"same_cut_as": "legal@3", "alignment": {"dataset": "sha256:2"}}


def test_where_tokens_went_may_be_told() -> None:
    event = convert.told_event({"routing": {"modules": {"a": {"shares": [0.75, 0.25]}}}})
    message = training_pb2.JobEvent.FromString(event.message)
    assert (event.kind, list(message.routing.modules["a"].shares)) == ("routing", [0.75, 0.25])


def test_leases_that_last_no_time_are_a_fault_of_the_servers() -> None:
    with pytest.raises(InternalError):
        convert.terms(training_pb2.RegisterWorkerResponse())


def test_a_method_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'adam' is none of lora, s2ft"):
        convert.register_request("w", ["lora", "adam"], "", "", "")


def test_every_method_of_the_surface_has_a_name() -> None:
    names = {value.name for value in training_pb2.TrainingMethod.DESCRIPTOR.values if value.number}
    assert {f"TRAINING_METHOD_{name.upper()}" for name in convert._METHODS.values()} == names


@pytest.mark.parametrize("end", LeaseEnd)
def test_an_ending_travels_as_the_state_of_its_name(end: LeaseEnd) -> None:
    request = convert.report_request((), 4, JobEnding(end, "WHY", "because"))
    assert training_pb2.JobState.Name(request.ending.state) == f"JOB_STATE_{end.value.upper()}"
    assert (request.num_reported, request.ending.reason, request.ending.message) == (4, "WHY", "because")


def test_what_is_told_travels_as_it_was() -> None:
    told: list[dict[str, Any]] = [
        {"progress": {"step": 10, "loss": 2.5, "remaining": "12.5s", "memory_bytes": 2**40}},
        {"stage": "reading data"},
        {"data": {"num_samples": 3}},
        {"checkpoint_step": 50},
        {"evaluation": {"loss_before": 1.0, "exact_match_after": 0.5}},
    ]
    events = convert.report_request(map(convert.told_event, told), 0, None).events
    assert [event.WhichOneof("event") for event in events] == [next(iter(one)) for one in told]
    assert events[0].progress.remaining.ToTimedelta().total_seconds() == 12.5
    assert (events[0].progress.memory_bytes, events[3].checkpoint_step) == (2**40, 50)
    assert not events[4].evaluation.HasField("exact_match_before")


@pytest.mark.parametrize(
    "told",
    [
        {}, {"unknown": 1}, {"progress": 5}, {"progress": {"step": "x"}}, {"progress": {"loss": float("nan")}},
        {"progress": None}, {"stage": 5}, {"stage": "a", "data": {}}, {"stage": "a", "sequence": 1},
        {"stage": "a", "time": "2026-01-01T00:00:00Z"}, {"state_change": {}}, {"published": {}},
        {"checkpoint_step": 1.5},
    ],
)  # fmt: skip
def test_what_is_no_event_of_a_jobs_process_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        convert.told_event(told)
    assert caught.value.field == "event"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(("progress", "data", "evaluation", "stage", "checkpoint_step")), JSON, max_size=2)
)
def test_whatever_is_told_is_an_event_or_refused(told: dict[str, Any]) -> None:
    with suppress(InvalidArgumentError):
        assert convert.told_event(told).kind in told
