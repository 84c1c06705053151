"""A worker keeps its lease, and lets go of it in good order: cancelled, stopped, lost, cut off, refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_service import refusal
from fake_worker_service import BASE, FakeJob
from motley.v1 import adapter_pb2
from motley_client import FailedPreconditionError, UnauthenticatedError, resuming
from motley_trainer.errors import SettingsError
from motley_trainer.worker.settings import WorkerBase
from motley_trainer.worker.stopping import Stop
from motley_trainer.worker.workplace import Workplace
from worker_house import FAST, WorkerHouse, worker_house


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(resuming, "LAST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[WorkerHouse]:
    with worker_house(tmp_path / "work") as house:
        yield house


def is_waiting(job: FakeJob) -> bool:
    return any(event.stage == "waiting" for event in job.events)


def checkpoints(job: FakeJob) -> list[int]:
    return [event.checkpoint_step for event in job.events if event.HasField("checkpoint_step")]


def test_a_cancelled_job_ends_after_its_step_and_keeps_its_checkpoint(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    def cancel() -> bool:
        job.cancel_requested = is_waiting(job)
        return job.cancel_requested

    house.work("waits", cancel, house.is_idle)

    assert job.state == "cancelled"
    assert checkpoints(job) == [1, 2]
    assert f"{job.id}/checkpoints/step-2" in house.files()
    assert not [name for name in house.files() if "data" in name or name.endswith(".json")]
    assert house.value("jobs_total", method="lora", state="cancelled") == 1


def test_a_job_that_was_cancelled_before_it_was_leased_never_begins(house: WorkerHouse) -> None:
    job = house.fake.add_job()
    job.cancel_requested = True

    house.work("passes")

    assert (job.state, job.kinds()) == ("cancelled", [])
    assert house.files() == []


def test_a_cancellation_that_comes_while_the_adapter_is_published_is_too_late(
    house: WorkerHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = house.fake.add_job()
    taken_up = house.adapters.before

    def cancel(stream: int, upload_id: str, message: adapter_pb2.UploadAdapterRequest) -> None:
        job.cancel_requested = True
        time.sleep(4 * FAST.heartbeat_seconds)  # so that the worker hears of it
        taken_up(stream, upload_id, message)

    monkeypatch.setattr(house.adapters, "before", cancel)

    house.work("passes")

    assert job.state == "succeeded"
    assert len(house.adapters.versions["legal"]) == 1


def test_a_worker_that_is_stopped_gives_its_job_back_and_another_goes_on_with_it(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("waits", lambda: is_waiting(job))

    assert (job.state, checkpoints(job)) == ("queued", [1, 2])
    assert house.value("jobs_total", method="lora", state="queued") == 1
    assert f"{job.id}/checkpoints/step-2" in house.files()

    house.work("waits", name="w2")

    assert job.state == "succeeded"
    assert job.steps() == [1, 1, 3]
    assert house.fake.offsets == [0], "the dataset was still there"
    assert [event.stage for event in job.events].count("fetching data") == 1


def test_a_second_signal_does_not_wait_for_the_step(house: WorkerHouse) -> None:
    job, stop = house.fake.add_job(), Stop()
    began = time.monotonic()

    def twice() -> bool:
        if job.steps():
            stop.interrupt()
        return bool(job.steps())

    house.work("clings", twice, stop=stop)

    assert job.state == "queued"
    assert time.monotonic() - began < FAST.grace_seconds / 2


def test_a_process_that_does_not_stop_is_killed_after_the_grace(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("clings", lambda: bool(job.steps()), timings=replace(FAST, grace_seconds=0.05))

    assert job.state == "queued"


def test_a_job_that_was_given_to_another_is_dropped_and_its_directory_stays(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    def take_away() -> bool:
        if is_waiting(job):
            house.fake.end_lease(job)
            job.state = "running"  # at another worker
            job.expires = time.monotonic() + 60
        return is_waiting(job)

    house.work("waits", take_away, lambda: house.value("jobs_total", method="lora", state="lost") == 1)

    assert job.state == "running"
    assert f"{job.id}/checkpoints/step-2" in house.files()


def test_a_job_that_was_lost_and_comes_back_goes_on_where_it_was(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    def take_away() -> bool:
        if is_waiting(job):
            house.fake.end_lease(job)
        return is_waiting(job)

    house.work("waits", take_away, house.is_idle)

    assert (job.state, len(job.tokens)) == ("succeeded", 3)
    assert 3 in job.steps()


def test_events_are_neither_lost_nor_doubled_where_answers_are_lost(house: WorkerHouse) -> None:
    job = house.fake.add_job()
    house.fake.lost_reports = 3

    house.work("hurries")

    assert job.state == "succeeded"
    assert job.steps() == list(range(1, 1001))
    assert len(job.tokens) == 1


def test_a_server_that_is_away_for_a_while_costs_nothing(house: WorkerHouse, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "motley_trainer")
    job = house.fake.add_job()
    gone: list[float] = []

    def go_away() -> bool:
        if len(job.steps()) > 100 and not gone:
            house.fake.is_down = True
            gone.append(time.monotonic())
        return bool(gone) and time.monotonic() > gone[0] + 0.3

    def come_back() -> bool:
        house.fake.is_down = False
        return house.is_idle()

    house.work("hurries", go_away, come_back)

    assert job.state == "succeeded"
    assert job.steps() == list(range(1, 1001))
    assert len(job.tokens) == 1
    said = [record.getMessage() for record in caplog.records if "answered" in record.getMessage()]
    assert [line.split(" answered")[0] for line in said] == [f"{job.id}: reports are{word}" for word in (" not", "")]


def test_a_lease_that_ran_out_while_the_server_was_away_is_let_go(tmp_path: Path) -> None:
    with worker_house(tmp_path / "work", lease_seconds=0.6) as house:
        job = house.fake.add_job()

        def go_away() -> bool:
            house.fake.is_down |= is_waiting(job)
            return house.fake.is_down

        def come_back() -> bool:
            if house.value("jobs_total", method="lora", state="lost") != 1:
                return False
            house.fake.is_down = False
            return True

        house.work("waits", go_away, come_back, house.is_idle)

    assert (job.state, len(job.tokens)) == ("succeeded", 2)
    assert job.steps()[-1] == 3


def test_a_lease_is_kept_while_nothing_happens(tmp_path: Path) -> None:
    with worker_house(tmp_path / "work", lease_seconds=0.6) as house:
        job = house.fake.add_job()
        waited: list[float] = []
        left: list[float | None] = []

        def wait() -> bool:
            if is_waiting(job) and not waited:
                waited.append(time.monotonic() + 1.2)
            left.append(house.value("lease_seconds_left"))
            return bool(waited) and time.monotonic() > waited[0]

        house.work("waits", wait, timings=replace(FAST, heartbeat_seconds=60.0))

    assert (job.state, len(job.tokens)) == ("queued", 1)
    assert left[-1] is not None
    assert 0.1 < left[-1] <= 0.6
    gaps = [after - before for before, after in zip(house.fake.reports, house.fake.reports[1:], strict=False)]
    assert max(gaps) < 0.6


def test_a_lease_is_kept_while_a_process_stops(tmp_path: Path) -> None:
    with worker_house(tmp_path / "work", lease_seconds=0.6) as house:
        job = house.fake.add_job()

        def cancel() -> bool:
            job.cancel_requested = is_waiting(job)
            return job.cancel_requested

        house.work("lingers", cancel, house.is_idle)

    assert (job.state, checkpoints(job)) == ("cancelled", [1, 2])


def test_a_token_that_is_no_good_any_more_is_a_lease_that_is_lost(house: WorkerHouse) -> None:
    house.adapters.refusals = [refusal(grpc.StatusCode.UNAUTHENTICATED, "LEASE_ENDED")]
    job = house.fake.add_job()

    house.work("passes", lambda: house.value("jobs_total", method="lora", state="lost") == 1)

    assert job.state == "running"
    assert f"{job.id}/result.json" in house.files()


def test_a_publication_that_is_cut_goes_on_where_it_broke(house: WorkerHouse) -> None:
    house.adapters.cuts = [0, 100, None]
    job = house.fake.add_job()

    house.work("passes")

    assert job.state == "succeeded"
    assert len(house.adapters.versions["legal"]) == 1
    assert len(house.adapters.streams) == 3


def test_a_publication_waits_for_a_server_that_is_away_while_the_lease_is_kept(tmp_path: Path) -> None:
    with worker_house(tmp_path / "work", lease_seconds=1.0) as house:
        house.adapters.cuts = [0] * 20  # more than the client's own patience
        job = house.fake.add_job()

        house.work("passes")

    assert (job.state, len(job.tokens)) == ("succeeded", 1)


def test_a_job_that_was_published_but_not_reported_is_published_again_under_its_upload(
    house: WorkerHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = house.fake.add_job()
    finish = house.adapters.finish

    def finish_and_vanish(*arguments: Any) -> adapter_pb2.AdapterVersion:
        house.fake.is_down = True
        return finish(*arguments)

    monkeypatch.setattr(house.adapters, "finish", finish_and_vanish)

    house.work("passes", lambda: house.fake.is_down and bool(house.adapters.versions))
    assert (job.state, house.files().count(f"{job.id}/result.json")) == ("running", 1)
    house.fake.is_down = False
    house.fake.end_lease(job)
    house.work("dies", name="w2")

    assert job.state == "succeeded", "its process was not started again"
    assert len(house.adapters.versions["legal"]) == 1
    uploads = [request.upload_id for name, request in house.adapters.calls if name == "UploadAdapter"]
    assert uploads == [f"upload-of-{job.id}"] * 2
    assert job.kinds().count("evaluation") == 2, "whether the first was heard, the second lease cannot know"
    assert house.files() == []


def test_a_report_of_the_end_whose_answer_was_lost_counts_as_taken(house: WorkerHouse) -> None:
    house.fake.lost_endings = 1
    job = house.fake.add_job()

    house.work("passes", lambda: house.value("jobs_total", method="lora", state="succeeded") == 1)

    assert (job.state, job.kinds().count("published"), len(job.tokens)) == ("succeeded", 1, 1)
    assert house.files() == []


def test_a_second_worker_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with Workplace(tmp_path / "work"), pytest.raises(SettingsError, match="another worker") as caught:
        Workplace(tmp_path / "work")
    assert (caught.value.reason, caught.value.field) == ("WORK_DIR_IN_USE", "work_dir")
    with Workplace(tmp_path / "work"):
        pass


def test_another_base_is_refused_at_registration_with_both_fingerprints(house: WorkerHouse) -> None:
    other = f"sha256:{'c' * 64}"
    told = refusal(grpc.StatusCode.FAILED_PRECONDITION, "BASE_MISMATCH", "base_fingerprint")
    told.message = f"this server serves {BASE}"
    house.fake.refusals = [told]

    with pytest.raises(FailedPreconditionError) as caught:
        house.work("passes", lambda: False, base=WorkerBase(Path("/bases/other"), "other", other))

    assert caught.value.reason == "BASE_MISMATCH"
    assert BASE in caught.value.message
    assert other in caught.value.message


def test_a_key_that_is_no_good_ends_the_worker(house: WorkerHouse) -> None:
    house.fake.refusals = [refusal(grpc.StatusCode.UNAUTHENTICATED, "BAD_KEY")]

    with pytest.raises(UnauthenticatedError):
        house.work("passes", lambda: False)


def test_a_server_that_is_not_there_yet_is_waited_for(house: WorkerHouse, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "motley_trainer")
    job = house.fake.add_job()
    house.fake.is_down = True
    begun = time.monotonic()

    def come_up() -> bool:
        house.fake.is_down = time.monotonic() < begun + 0.2
        return not house.fake.is_down

    house.work("passes", come_up, house.is_idle)

    assert job.state == "succeeded"
    assert caplog.text.count("the server does not answer") == 1, "once, though it was asked often"


def test_a_worker_that_the_server_has_forgotten_registers_again(house: WorkerHouse) -> None:
    jobs = [house.fake.add_job()]

    def forget() -> bool:
        if house.is_idle():
            house.fake.workers.clear()
            jobs.append(house.fake.add_job())
        return len(jobs) == 2

    house.work("passes", forget, house.is_idle)

    assert [job.state for job in jobs] == ["succeeded"] * 2
    assert [name for name, _ in house.fake.calls].count("RegisterWorker") == 2


def test_what_a_worker_says_of_itself(house: WorkerHouse) -> None:
    house.work("passes", lambda: bool(house.fake.workers), device="cuda")

    (told,) = house.fake.workers.values()
    assert (told.name, told.base_fingerprint, told.device, list(told.methods)) == ("w1", BASE, "cuda", [1, 2, 3, 4])
    assert told.version
