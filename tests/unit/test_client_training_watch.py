"""Both clients watch a job to its end, each event once, whatever breaks on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, closing
from datetime import UTC, datetime
from time import monotonic, sleep
from typing import Any, cast

import pytest
from both_clients import BOTH, Ask
from fake_relay import relaying
from fake_service import FIRST_SECOND
from fake_training_service import FakeTrainingService, serving_training
from motley.v1 import training_pb2
from motley_client import (
    AdapterVersion,
    AsyncClient,
    Checkpoint,
    Client,
    DataReport,
    DeadlineExceededError,
    Evaluation,
    InvalidArgumentError,
    JobEvent,
    JobState,
    NotFoundError,
    OutOfRangeError,
    RoutingReport,
    Stage,
    StateChange,
    TrainingProgress,
    UnavailableError,
    convert_training,
    resuming,
)
from training_words import change, progress, spec_message, whole_life

JOB = "job-0000000000000001"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTrainingService:
    monkeypatch.setattr(resuming, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(resuming, "LAST_PAUSE_SECONDS", 0.01)
    fake = FakeTrainingService()
    fake.add_job(spec_message())
    return fake


@pytest.fixture
def address(fake: FakeTrainingService) -> Iterator[str]:
    with serving_training(fake) as address:
        yield address


@pytest.fixture(**BOTH)
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


def sequences(events: list[JobEvent]) -> list[int]:
    return [one.sequence for one in events]


def watches(fake: FakeTrainingService) -> list[int]:
    """Return behind which event each watch began."""
    return [request.after_sequence for name, request in fake.calls if name == "WatchTrainingJob"]


def test_every_kind_of_event_comes_in_order_until_the_last(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    fake.happen(JOB, *whole_life())

    events = ask(address, "watch_training_job", JOB, key="mk_a_b")

    assert sequences(events) == list(range(1, 11))
    assert events[0] == JobEvent(1, datetime.fromtimestamp(FIRST_SECOND + 2, UTC), StateChange(JobState.QUEUED, "", ""))
    told = [one.event for one in events[1:]]
    assert told[:7] == [
        StateChange(JobState.RUNNING, "", ""),
        Stage("reading data"),
        DataReport(90, 10, 2, 1, 1234),
        TrainingProgress(10, 30, 1.25, 2e-4, 0.5, 900.4, 75.5, 412 << 20),
        Checkpoint(10),
        RoutingReport({"a": (0.7, 0.1, 0.1, 0.1), "b": (0.25, 0.45, 0.2, 0.1)}),
        Evaluation(10, 2.0, 0.5, 0.0, 0.9),
    ]
    assert isinstance(told[7], AdapterVersion)
    assert (told[7].name, told[7].version) == ("legal", 3)
    assert told[8] == StateChange(JobState.SUCCEEDED, "", "")
    assert set(fake.credentials) == {"Bearer mk_a_b"}


def test_an_event_of_a_kind_that_the_client_does_not_know_still_counts() -> None:
    event = convert_training.job_event(training_pb2.JobEvent(sequence=7))
    assert (event.sequence, event.event) == (7, None)
    strange = convert_training.job_event(change(cast(Any, 99), "WHY", "so")).event
    assert strange == StateChange(None, "WHY", "so")


def test_a_watch_begins_where_it_is_told_and_ends_at_once_behind_the_last(
    ask: Ask, fake: FakeTrainingService, address: str
) -> None:
    fake.happen(JOB, *whole_life())

    assert sequences(ask(address, "watch_training_job", JOB, 8)) == [9, 10]
    assert ask(address, "watch_training_job", JOB, 10) == []


def test_events_come_while_the_job_goes_on(fake: FakeTrainingService, address: str) -> None:
    with Client(address) as client, closing(client.watch_training_job(JOB)) as events:
        assert next(events).sequence == 1
        for step in (1, 2):
            fake.happen(JOB, progress(step))
            assert cast(TrainingProgress, next(events).event).step == step
        fake.happen(JOB, change(training_pb2.JOB_STATE_FAILED, "LOSS_NOT_FINITE", "at step 3"))
        assert next(events).event == StateChange(JobState.FAILED, "LOSS_NOT_FINITE", "at step 3")
        assert next(events, None) is None


@pytest.mark.parametrize("cuts", [[0], [1], [3, 0, 2], [9], [10]], ids=str)
def test_a_watch_that_is_cut_goes_on_behind_the_last_event(
    ask: Ask, fake: FakeTrainingService, address: str, cuts: list[int]
) -> None:
    fake.happen(JOB, *whole_life())
    fake.watch_cuts = list(cuts)

    assert sequences(ask(address, "watch_training_job", JOB)) == list(range(1, 11))
    assert watches(fake) == [sum(cuts[:place]) for place in range(len(cuts) + 1)]


def test_the_pauses_of_a_watch_begin_anew_with_each_event(
    ask: Ask, fake: FakeTrainingService, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "LAST_PAUSE_SECONDS", 1000.0)
    fake.happen(JOB, *(progress(step) for step in range(20)), whole_life()[-1])
    fake.watch_cuts = [1] * 21

    assert len(ask(address, "watch_training_job", JOB, timeout=20)) == 22


def test_a_watch_goes_on_over_connections_that_drop(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    fake.happen(JOB, *(progress(step) for step in range(200)), whole_life()[-1])
    with relaying(address, [4000, 9000]) as relay:
        events = ask(relay.address, "watch_training_job", JOB)

    assert relay.num_dropped == 2
    assert sequences(events) == list(range(1, 203))


class Restarting(FakeTrainingService):
    """Be away for so many calls, each time that a watch was cut."""

    calls_away = 0

    def _cut(self, context: Any) -> Any:
        if self.calls[-1][0] == "WatchTrainingJob":
            self.away = self.calls_away
        super()._cut(context)


def restarting(calls_away: int) -> Restarting:
    fake = Restarting()
    fake.calls_away = calls_away
    fake.add_job(spec_message())
    fake.happen(JOB, *whole_life())
    return fake


@pytest.mark.usefixtures("fake")  # for its short pauses
def test_a_server_that_was_there_is_waited_for_longer_than_an_uploads(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "MAX_FRUITLESS_ATTEMPTS", 1)
    fake = restarting(6)  # which are more than one call is tried
    fake.watch_cuts = [4]
    with serving_training(fake) as address:
        assert sequences(ask(address, "watch_training_job", JOB)) == list(range(1, 11))
    assert watches(fake) == [0, 4]


def test_a_server_that_stays_away_is_given_up_when_patience_ends(ask: Ask) -> None:
    fake = restarting(1000)
    fake.watch_cuts = [4]
    with serving_training(fake) as address, pytest.raises(UnavailableError):
        ask(address, "watch_training_job", JOB, patience=0.0)
    assert len(fake.calls) == 2


def test_a_server_that_was_never_there_is_not_waited_for(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    fake.away = 1000
    with pytest.raises(UnavailableError):
        ask(address, "watch_training_job", JOB)

    assert {name for name, _ in fake.calls} == {"GetTrainingJob"}
    assert len(fake.calls) == 4, "which gRPC tries by itself"


def test_what_the_server_refuses_is_raised_at_once(ask: Ask, fake: FakeTrainingService, address: str) -> None:
    with pytest.raises(NotFoundError):
        ask(address, "watch_training_job", "job-x")
    with pytest.raises(OutOfRangeError):
        ask(address, "watch_training_job", JOB, 2)
    assert watches(fake) == [2]


@pytest.mark.usefixtures("fake")  # for its short pauses
def test_a_job_that_is_gone_after_a_cut_is_no_longer_watched(ask: Ask) -> None:
    class Forgetful(FakeTrainingService):
        def _cut(self, context: Any) -> Any:
            self.jobs.clear()
            super()._cut(context)

    fake = Forgetful()
    fake.add_job(spec_message())
    fake.watch_cuts = [1]
    with serving_training(fake) as address, pytest.raises(NotFoundError):
        ask(address, "watch_training_job", JOB)
    assert watches(fake) == [0]


def test_the_timeout_is_for_the_whole(ask: Ask, address: str) -> None:
    began = monotonic()
    with pytest.raises(DeadlineExceededError):
        ask(address, "watch_training_job", JOB, timeout=0.2)

    assert monotonic() - began < 5


def wait_for_ended(fake: FakeTrainingService) -> None:
    deadline = monotonic() + 10
    while fake.num_ended == 0 and monotonic() < deadline:
        sleep(0.005)


def test_closing_the_generator_ends_the_watch(fake: FakeTrainingService, address: str) -> None:
    with Client(address) as client:
        with closing(client.watch_training_job(JOB)) as events:
            assert next(events).sequence == 1
            assert fake.num_ended == 0
        wait_for_ended(fake)
        assert fake.num_ended == 1


def test_closing_the_asyncio_generator_ends_the_watch(fake: FakeTrainingService, address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            async with aclosing(client.watch_training_job(JOB)) as events:
                assert (await anext(events)).sequence == 1
            await asyncio.to_thread(wait_for_ended, fake)
            assert fake.num_ended == 1

    asyncio.run(run())


def test_what_cannot_be_asked_is_refused_before_the_iteration(fake: FakeTrainingService, address: str) -> None:
    with Client(address) as client, pytest.raises(InvalidArgumentError) as caught:
        client.watch_training_job(JOB, 2**63)

    assert (caught.value.field, fake.calls) == ("after_sequence", [])
