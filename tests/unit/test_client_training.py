"""Both clients manage datasets and jobs alike, and what is repeated happens once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, cast

import grpc
import pytest
from both_clients import BOTH, Ask, ask_asyncio, ask_blocking
from fake_service import FIRST_SECOND, refusal
from fake_training_service import BASE_FINGERPRINT, FakeTrainingService, serving_training
from motley.v1 import training_pb2
from motley_client import (
    Client,
    DataReport,
    Dataset,
    DatasetFormat,
    DatasetStatus,
    Evaluation,
    FailedPreconditionError,
    InvalidArgumentError,
    JobState,
    NotFoundError,
    PermissionDeniedError,
    StateChange,
    TrainingCapabilities,
    TrainingJob,
    TrainingMethod,
    TrainingProgress,
    Worker,
    convert_training,
)
from training_words import SPEC, spec_message, whole_life

JOB = "job-0000000000000001"


@pytest.fixture
def fake() -> FakeTrainingService:
    return FakeTrainingService()


@pytest.fixture
def address(fake: FakeTrainingService) -> Iterator[str]:
    with serving_training(fake) as address:
        yield address


@pytest.fixture(**BOTH)
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


def second(number: int) -> datetime:
    """Return when the fake did its first, second, ... thing."""
    return datetime.fromtimestamp(FIRST_SECOND + number, UTC)


def test_a_dataset_is_shown_whole_or_on_its_way_and_forgotten(
    ask: Ask, fake: FakeTrainingService, address: str
) -> None:
    digest = fake.add_dataset(b"{}\n{}\n", "mine").digest
    fake.uploads["sha256:half"] = bytearray(b"abc")

    whole = Dataset(digest, "mine", DatasetFormat.COMPLETION, 6, 2, second(1))
    assert ask(address, "get_dataset", digest) == DatasetStatus(whole, 6)
    assert ask(address, "get_dataset", "sha256:half") == DatasetStatus(None, 3)
    assert ask(address, "list_datasets") == [whole]
    assert ask(address, "delete_dataset", digest) is None
    with pytest.raises(NotFoundError) as caught:
        ask(address, "get_dataset", digest)
    assert caught.value.field == "digest"


def test_a_job_is_queued_as_it_was_asked_for(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    made = ask(address, "create_training_job", SPEC)

    assert fake.calls[0][1].spec == spec_message()
    assert made == TrainingJob(
        id=JOB,
        spec=SPEC,
        state=JobState.QUEUED,
        reason="",
        message="",
        create_time=second(1),
        start_time=None,
        end_time=None,
        attempts=0,
        worker="",
        cancel_requested=False,
        progress=None,
        data=None,
        evaluation=None,
        version=None,
        last_sequence=1,
        base_fingerprint=BASE_FINGERPRINT,
        base=None,
    )
    assert hash(made) == hash(ask(address, "get_training_job", JOB))


def test_a_job_that_ended_shows_all_that_came_of_it(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    job = fake.add_job(spec_message())
    fake.happen(job.id, *whole_life())
    job.start_time.FromSeconds(FIRST_SECOND + 50)
    job.end_time.FromSeconds(FIRST_SECOND + 60)
    job.attempts, job.worker = 2, "w1"

    found = ask(address, "get_training_job", JOB)

    assert (found.state, found.attempts, found.worker, found.last_sequence) == (JobState.SUCCEEDED, 2, "w1", 10)
    assert (found.start_time, found.end_time) == (second(50), second(60))
    assert found.progress == TrainingProgress(10, 30, 1.25, 2e-4, 0.5, 900.4, 75.5, 412 << 20)
    assert found.data == DataReport(90, 10, 2, 1, 1234)
    assert found.evaluation == Evaluation(10, 2.0, 0.5, 0.0, 0.9)
    assert (found.version.name, found.version.version) == ("legal", 3)


def test_what_nobody_measured_is_none() -> None:
    read = convert_training.job(training_pb2.TrainingJob(progress={}, evaluation={}))

    assert read.progress is not None
    assert read.progress.remaining_seconds is None
    assert read.evaluation == Evaluation(0, 0.0, 0.0, None, None)


def test_a_queued_job_is_cancelled_at_once_a_running_one_later_and_an_ended_one_not(
    ask: Ask, fake: FakeTrainingService, address: str
) -> None:
    queued, running = fake.add_job(spec_message()).id, fake.add_job(spec_message()).id
    fake.happen(running, whole_life()[0])

    assert ask(address, "cancel_training_job", queued).state is JobState.CANCELLED
    later = ask(address, "cancel_training_job", running)
    assert (later.state, later.cancel_requested) == (JobState.RUNNING, True)
    with pytest.raises(FailedPreconditionError):
        ask(address, "cancel_training_job", queued)


def test_lists_go_through_every_page_in_order(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    for number in range(5):
        fake.add_dataset(str(number).encode(), str(number))
        fake.add_job(spec_message())
    fake.happen(JOB, whole_life()[-1])

    assert [one.display_name for one in ask(address, "list_datasets")] == ["4", "3", "2", "1", "0"]
    assert [int(one.id[4:], 16) for one in ask(address, "list_training_jobs", page_size=4)] == [5, 4, 3, 2, 1]
    assert [one.id for one in ask(address, "list_training_jobs", JobState.SUCCEEDED)] == [JOB]
    pages = [(name, request.page_size, request.page_token) for name, request in fake.calls]
    assert pages == [
        *(("ListDatasets", 0, token) for token in ("", "2", "4")),
        *(("ListTrainingJobs", 4, token) for token in ("", "4")),
        ("ListTrainingJobs", 0, ""),
    ]


def test_a_page_is_fetched_when_the_iteration_gets_there(fake: FakeTrainingService, address: str) -> None:
    for number in range(5):
        fake.add_dataset(str(number).encode())
        fake.add_job(spec_message())
    with Client(address) as client:
        for listed in (client.list_datasets(), client.list_training_jobs()):
            fake.calls.clear()
            assert [next(listed), next(listed)]
            assert len(fake.calls) == 1


def test_capabilities_tell_methods_workers_and_what_is_queued(
    ask: Ask, fake: FakeTrainingService, address: str
) -> None:
    worker = training_pb2.Worker(name="w1", methods=[cast(Any, 99), 2], device="cpu", is_busy=True)
    worker.last_seen_time.FromSeconds(FIRST_SECOND)
    fake.workers.append(worker)
    fake.add_job(spec_message())

    assert ask(address, "training_capabilities") == TrainingCapabilities(
        methods=(TrainingMethod.LORA, TrainingMethod.S2FT),
        workers=(Worker("w1", (TrainingMethod.S2FT,), "cpu", True, second(0)),),
        max_dataset_bytes=1 << 30,
        max_datasets=1000,
        queued_jobs=1,
        running_jobs=0,
    )


CHANGES: list[tuple[str, tuple[Any, ...]]] = [
    ("delete_dataset", ("sha256:x",)),
    ("create_training_job", (SPEC,)),
    ("cancel_training_job", (JOB,)),
]
READS: list[tuple[str, tuple[Any, ...]]] = [
    ("get_dataset", ("sha256:x",)),
    ("list_datasets", ()),
    ("get_training_job", (JOB,)),
    ("list_training_jobs", ()),
    ("training_capabilities", ()),
]


@pytest.mark.parametrize(("call", "args"), [*CHANGES, *READS])
def test_a_call_whose_answer_is_lost_is_repeated_and_happens_once(
    ask: Ask, fake: FakeTrainingService, address: str, call: str, args: tuple[Any, ...]
) -> None:
    fake.datasets["sha256:x"] = training_pb2.Dataset(digest="sha256:x")
    fake.add_job(spec_message())
    fake.losses = 2

    ask(address, call, *args)

    assert len(fake.calls) == 3
    if (call, args) in CHANGES:
        assert len({request.request_id for _, request in fake.calls}) == 1
        assert fake.calls[0][1].request_id
    assert len(fake.jobs) == (2 if call == "create_training_job" else 1)


def test_every_change_has_a_request_id_of_its_own_unless_one_is_given(
    ask: Ask, fake: FakeTrainingService, address: str
) -> None:
    for words in ({}, {}, {"request_id": "mine"}, {"request_id": "mine"}):
        ask(address, "create_training_job", SPEC, **words)

    ids = [request.request_id for _, request in fake.calls]
    assert len(set(ids)) == len(fake.jobs) == 3
    assert ids[2:] == ["mine", "mine"]


@pytest.mark.parametrize(
    ("call", "args"),
    [*CHANGES, *READS, ("upload_dataset", ([],)), ("watch_training_job", (JOB,))],
)
def test_every_call_sends_the_key_and_turns_a_refusal_into_its_typed_error(
    fake: FakeTrainingService, address: str, call: str, args: tuple[Any, ...]
) -> None:
    for ask in (ask_blocking, ask_asyncio):
        fake.refusals.append(refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED", "id"))
        with pytest.raises(PermissionDeniedError) as caught:
            ask(address, call, *args, key="mk_a_b")
        assert (caught.value.reason, caught.value.field) == ("ROLE_REQUIRED", "id")
    assert fake.credentials == ["Bearer mk_a_b"] * 2


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: convert_training.get_dataset_request("\ud800"), "digest"),
        (lambda: convert_training.delete_dataset_request("\ud800", None), "digest"),
        (lambda: convert_training.delete_dataset_request("a", "\ud800"), "request_id"),
        (lambda: convert_training.list_datasets_request(2**31), "page_size"),
        (lambda: convert_training.create_job_request(SPEC, "\ud800"), "request_id"),
        (lambda: convert_training.get_job_request(cast(str, 5)), "id"),
        (lambda: convert_training.list_jobs_request(cast(JobState, "done"), None), "state"),
        (lambda: convert_training.list_jobs_request(None, -(2**40)), "page_size"),
        (lambda: convert_training.cancel_job_request("\ud800", None), "id"),
        (lambda: convert_training.watch_job_request("\ud800", 0), "id"),
        (lambda: convert_training.watch_job_request("a", 2**63), "after_sequence"),
    ],
)
def test_a_value_that_cannot_be_sent_is_named(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make()

    assert (caught.value.reason, caught.value.field) == ("INVALID_VALUE", field)


def test_every_enum_travels() -> None:
    states = set(training_pb2.JobState.values()) - {0}
    assert {convert_training.list_jobs_request(state, None).state for state in JobState} == states
    assert {convert_training.job(training_pb2.TrainingJob(state=state)).state for state in states} == set(JobState)
    formats = set(training_pb2.DatasetFormat.values()) - {0}
    read = {convert_training.dataset(training_pb2.Dataset(format=number)).format for number in formats}
    assert read == set(DatasetFormat)
    strange = cast(Any, 99)
    assert convert_training.dataset(training_pb2.Dataset(format=strange)).format is None
    assert convert_training.job(training_pb2.TrainingJob(state=strange)).state is None


def test_only_what_waits_or_runs_is_no_end() -> None:
    assert {state for state in JobState if not state.is_end} == {JobState.QUEUED, JobState.RUNNING}


def test_types_show_every_field_of_their_messages() -> None:
    pairs = (
        (Dataset, training_pb2.Dataset),
        (DatasetStatus, training_pb2.GetDatasetResponse),
        (StateChange, training_pb2.StateChange),
        (TrainingProgress, training_pb2.TrainingProgress),
        (DataReport, training_pb2.DataReport),
        (Evaluation, training_pb2.Evaluation),
        (TrainingJob, training_pb2.TrainingJob),
        (Worker, training_pb2.Worker),
        (TrainingCapabilities, training_pb2.GetTrainingCapabilitiesResponse),
    )
    for kind, message in pairs:
        names = {field.name.removesuffix("_seconds") for field in dataclasses.fields(kind)}
        assert names == {field.name for field in message.DESCRIPTOR.fields}
