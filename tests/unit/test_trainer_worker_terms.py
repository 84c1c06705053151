"""A worker trains and measures by the terms that the server has now, not by those that it once registered under."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from motley.v1 import training_pb2
from worker_house import FAST, WorkerHouse, worker_house


@pytest.fixture
def house(tmp_path: Path) -> Iterator[WorkerHouse]:
    with worker_house(tmp_path / "work") as house:
        yield house


def calls(house: WorkerHouse, *names: str) -> list[str]:
    return [name for name, _ in house.fake.calls if name in names]


def test_a_server_that_holds_its_base_otherwise_is_noticed_before_a_job_is_trained(house: WorkerHouse) -> None:
    house.fake.terms_digest = "sha256:nf4"
    jobs = [house.fake.add_job()]
    held: dict[str, str] = {}

    def look() -> bool:
        for path in (house.directory / "jobs").glob("*/job.json"):
            held[path.parent.name] = json.loads(path.read_text())["served_quantization"]
        return house.is_idle()

    def restart() -> bool:
        if look():
            house.fake.quantization, house.fake.terms_digest = "int8", "sha256:int8"
            jobs.append(house.fake.add_job(b"another"))
        return len(jobs) == 2

    house.work("passes", restart, look)

    assert [(job.state, len(job.tokens)) for job in jobs] == [("succeeded", 1), ("succeeded", 2)]
    assert held == {jobs[0].id: "nf4", jobs[1].id: "int8"}
    reports = [request.ending for name, request in house.fake.calls if name == "ReportJob"]
    (given_back,) = [ending for ending in reports if ending.state == training_pb2.JOB_STATE_QUEUED]
    assert (given_back.reason, given_back.message) == (
        "", "the server's terms have changed, and the worker registers anew",
    )  # fmt: skip
    assert calls(house, "RegisterWorker") == ["RegisterWorker"] * 2
    assert house.value("jobs_total", method="lora", state="queued") == 1


def test_a_job_is_not_given_back_under_terms_that_are_the_same(house: WorkerHouse) -> None:
    house.fake.terms_digest = "sha256:nf4"
    jobs = [house.fake.add_job(bytes([number])) for number in range(2)]

    house.work("passes")

    assert [len(job.tokens) for job in jobs] == [1, 1]
    assert calls(house, "RegisterWorker") == ["RegisterWorker"]


def test_terms_that_never_agree_are_asked_for_at_leisure(house: WorkerHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose registrations and leases contradict one another must not be run down."""
    job = house.fake.add_job()
    lease = house.fake._lease

    lent: list[float] = []

    def contradict(*arguments: object) -> training_pb2.Lease:
        lent.append(time.monotonic())
        found = lease(*arguments)  # type: ignore[arg-type]
        found.terms_digest = "sha256:other"
        return found

    monkeypatch.setattr(house.fake, "_lease", contradict)

    house.work("passes", lambda: len(lent) == 8)

    pauses = [after - before for before, after in pairwise(lent)]
    wanted = [min(FAST.idle_seconds * number, FAST.last_fault_seconds) for number in range(1, 8)]
    assert all(pause >= least for pause, least in zip(pauses[1:], wanted[1:], strict=True)), "after the first"
    assert job.kinds() == []


def test_a_job_whose_lease_ended_before_it_could_be_given_back_is_let_go(
    house: WorkerHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = house.fake.add_job()
    lease = house.fake._lease

    def contradict_once(*arguments: object) -> training_pb2.Lease:
        found = lease(*arguments)  # type: ignore[arg-type]
        if len(job.tokens) == 1:
            found.terms_digest = "sha256:other"
            house.fake.end_lease(job)
        return found

    monkeypatch.setattr(house.fake, "_lease", contradict_once)

    house.work("passes")

    assert job.state == "succeeded"
    assert calls(house, "RegisterWorker") == ["RegisterWorker"] * 2
