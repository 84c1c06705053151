"""A fault of the worker's own gives the job back, and the worker holds back; a fault of the job's fails it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_worker_service import FakeJob
from motley.v1 import training_pb2
from motley_client.dataset_arrival import DatasetArrival
from motley_trainer.worker import work
from motley_trainer.worker.faults import MAX_OF_ONE_JOB, Faults
from motley_trainer.worker.work import Work
from motley_trainer.worker.workplace import Workplace
from worker_house import WorkerHouse, worker_house

NO_ROOM = OSError(28, "No space left on device", "/jobs/x")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[WorkerHouse]:
    with worker_house(tmp_path / "work") as house:
        yield house


def endings(house: WorkerHouse) -> list[training_pb2.JobEnding]:
    """Return how leases were told to have ended, in order."""
    reports = [request for name, request in house.fake.calls if name == "ReportJob"]
    return [request.ending for request in reports if request.HasField("ending")]


def reasons(house: WorkerHouse) -> list[tuple[str, str]]:
    return [(training_pb2.JobState.Name(one.state), one.reason) for one in endings(house)]


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception, times: int) -> list[str]:
    """Have a method fail so many times; return the list of its calls."""
    real = getattr(owner, name)
    calls: list[str] = []

    def fail(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        if len(calls) <= times:
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, fail)
    return calls


def test_without_room_on_disk_the_job_is_given_back_and_the_worker_holds_back_longer_each_time(
    house: WorkerHouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, DatasetArrival, "take", NO_ROOM, times=4)
    job, other = house.fake.add_job(b"1"), house.fake.add_job(b"2")
    paused: list[float | None] = []

    def has_gone_on() -> bool:
        paused.append(house.value("fault_pause_seconds"))
        return house.is_idle()

    house.work("passes", has_gone_on, lambda: house.value("fault_pause_seconds") == 0)

    assert (job.state, other.state) == ("succeeded", "succeeded"), "no tenant's job pays for the worker's disk"
    given_back = ("JOB_STATE_QUEUED", "DISK_FULL")
    assert reasons(house) == [given_back] * 4 + [("JOB_STATE_SUCCEEDED", "")] * 2
    assert all("/jobs/x" in one.message for one in endings(house)[:4])
    told = [record.args for record in caplog.records if "asks for no job" in record.getMessage()]
    assert told == [("DISK_FULL", seconds) for seconds in (0.02, 0.04, 0.05, 0.05)]
    assert house.value("faults_total", reason="DISK_FULL") == 4
    assert {0.0, 0.05} <= set(paused)


@pytest.mark.parametrize(("number", "reason"), [(28, "DISK_FULL"), (13, "WORKER_FAULT")])
def test_a_directory_that_cannot_be_made_fails_neither_the_job_nor_the_worker(
    house: WorkerHouse, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    failing(monkeypatch, Workplace, "job", OSError(number, "refused", "/jobs/x"), times=MAX_OF_ONE_JOB + 1)
    job = house.fake.add_job()

    house.work("passes")

    assert job.state == "succeeded"
    assert reasons(house) == [("JOB_STATE_QUEUED", reason)] * (MAX_OF_ONE_JOB + 1) + [("JOB_STATE_SUCCEEDED", "")]


@pytest.mark.parametrize("reason", ["DISK_FULL", "OUTPUT_UNWRITABLE", "NO_DEVICE"])
def test_what_a_jobs_process_lacks_at_this_worker_gives_the_job_back(house: WorkerHouse, reason: str) -> None:
    job = house.fake.add_job()

    house.work(f"lacks-{reason}")

    assert reasons(house) == [("JOB_STATE_QUEUED", reason), ("JOB_STATE_SUCCEEDED", "")]
    assert job.steps() == [2, 3], "its checkpoint was kept"
    assert house.fake.offsets == [0]


def test_data_that_changed_at_the_worker_is_fetched_again(house: WorkerHouse) -> None:
    house.fake.add_job()

    house.work("lacks-DATASET_CHANGED")

    assert reasons(house) == [("JOB_STATE_QUEUED", "DATASET_CHANGED"), ("JOB_STATE_SUCCEEDED", "")]
    assert house.fake.offsets == [0, 0]


def test_a_fault_that_nothing_explains_is_the_jobs_own_if_it_comes_again_and_again(
    house: WorkerHouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "motley_trainer")
    failing(monkeypatch, Work, "_train", KeyError("surprise"), times=MAX_OF_ONE_JOB)
    job, good = house.fake.add_job(b"1"), house.fake.add_job(b"2")

    house.work("passes")

    assert (job.state, job.reason, job.message) == ("failed", "WORKER_FAULT", "KeyError: 'surprise'")
    given_back = ("JOB_STATE_QUEUED", "WORKER_FAULT")
    assert [one for one in reasons(house) if one[1]] == [given_back, given_back, ("JOB_STATE_FAILED", "WORKER_FAULT")]
    assert good.state == "succeeded"
    assert "Traceback" in caplog.text


def test_a_name_that_must_not_become_a_path_fails_its_job_at_once(house: WorkerHouse) -> None:
    job, good = house.fake.add_job(spoilt := b"1"), house.fake.add_job(b"2")
    house.fake.datasets.pop(job.spec.dataset)
    job.spec.dataset = f"../../{spoilt.hex()}"

    house.work("passes")

    assert (job.state, job.reason, len(job.tokens)) == ("failed", "BAD_SPEC", 1)
    assert good.state == "succeeded"
    assert not (house.directory.parent / "31.jsonl").exists()


def out_of_memory(job: FakeJob) -> bool:
    return (job.state, job.reason) == ("failed", "OUT_OF_MEMORY")


@pytest.mark.parametrize(("kills", "is_memory"), [(1, True), (0, False), (None, False)])
def test_a_process_that_the_kernel_kills_twice_for_want_of_memory_is_not_started_again(
    house: WorkerHouse, monkeypatch: pytest.MonkeyPatch, kills: int | None, is_memory: bool
) -> None:
    """Each look at the kernel's count of such kills finds so many more than the one before."""
    counts = iter(range(1 << 30))
    monkeypatch.setattr(work, "num_oom_kills", lambda: None if kills is None else next(counts) * kills)
    job = house.fake.add_job()

    house.work("dies")

    assert out_of_memory(job) == is_memory
    assert house.value("restarts_total") == (1 if is_memory else 3)
    assert ("for want of memory" in job.message) == is_memory


def test_pauses_double_up_to_a_bound_and_begin_anew_once_a_job_came_to_its_end() -> None:
    faults = Faults(2.0, 9.0)
    assert [faults.next_pause() for _ in range(5)] == [2.0, 4.0, 8.0, 9.0, 9.0]
    assert [faults.blames("a") for _ in range(MAX_OF_ONE_JOB)] == [False, False, True]
    assert not faults.blames("b")
    faults.over("a")
    assert faults.next_pause() == 2.0
    assert not faults.blames("a")
    for _ in range(2000):  # no number grows beyond what can be counted with
        assert faults.next_pause() <= 9.0
