"""A worker does its jobs and tells what became of them, whatever their processes do."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_service import refusal
from motley.v1 import adapter_pb2, training_pb2
from worker_house import FAST, KEY, WorkerHouse, worker_house

AT_ONCE = replace(FAST, flush_seconds=60.0, heartbeat_seconds=60.0)  # all that happened is told with the end


@pytest.fixture
def house(tmp_path: Path) -> Iterator[WorkerHouse]:
    with worker_house(tmp_path / "work") as house:
        yield house


def test_a_job_is_fetched_trained_published_and_reported(house: WorkerHouse) -> None:
    job = house.fake.add_job(
        b"x" * 5000,
        publish=training_pb2.PublishSettings(aliases=["default", "beta"], labels={"from": "a job"}),
        gate=training_pb2.Gate(dataset=house.fake.add_dataset(b"y" * 2500)),
    )

    house.work("passes")

    assert (job.state, job.reason, job.message) == ("succeeded", "", "")
    assert job.steps() == [1, 2, 3]
    assert [job.events[0].stage, job.events[1].stage, job.events[-2].stage] == [
        "fetching data", "reading data", "publishing",
    ]  # fmt: skip
    published = job.events[-1].published
    assert (published.name, published.version, published.labels["from"]) == ("legal", 1, "a job")
    assert published == house.adapters.versions["legal"][0]
    assert sorted(house.adapters.aliases["legal"]) == ["beta", "default"]
    assert house.adapters.files["legal", 1]["adapter_model.safetensors"] == b"weights" * 1000
    assert house.files() == []


def test_calls_carry_the_workers_key_or_the_token_of_the_lease(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("passes")

    shown = {(name, credential) for (name, _), credential in zip(house.fake.calls, house.fake.credentials, strict=True)}
    token = f"Bearer {job.tokens[0]}"
    assert {name for name, credential in shown if credential == token} == {"FetchDataset", "ReportJob"}
    assert {name for name, credential in shown if credential == f"Bearer {KEY}"} == {"RegisterWorker", "LeaseJob"}
    assert set(house.adapters.credentials) == {token}
    upload = next(request for name, request in house.adapters.calls if name == "UploadAdapter")
    assert upload.upload_id == f"upload-of-{job.id}"


def test_jobs_are_done_one_after_the_other(house: WorkerHouse) -> None:
    jobs = [house.fake.add_job(bytes([number])) for number in range(3)]

    house.work("passes")

    assert [job.state for job in jobs] == ["succeeded"] * 3
    calls = [name for name, _ in house.fake.calls if name in ("LeaseJob", "FetchDataset")]
    assert calls[:6] == ["LeaseJob", "FetchDataset"] * 3
    assert house.value("jobs_total", method="lora", state="succeeded") == 3


def test_with_once_a_worker_ends_after_one_job(house: WorkerHouse) -> None:
    jobs = [house.fake.add_job(), house.fake.add_job()]

    house.work("passes", lambda: False, takes_one=True)

    assert [job.state for job in jobs] == ["succeeded", "queued"]


def test_what_does_not_pass_its_gate_is_rejected_with_the_figures_and_not_published(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("rejects")

    assert (job.state, job.reason) == ("rejected", "GATE_NOT_PASSED")
    assert "loss_before 2.0, loss_after 3.0" in job.message
    assert job.kinds().count("evaluation") == 1
    assert house.adapters.calls == []
    assert house.files() == []


def test_a_job_that_says_why_it_failed_is_not_tried_again(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("fails")

    assert (job.state, job.reason) == ("failed", "LOSS_NOT_FINITE")
    assert job.message == "the loss is nan (field optimizer.learning_rate)"
    assert house.value("restarts_total") == 0
    assert house.files() == []


def test_a_process_that_dies_goes_on_from_its_last_checkpoint(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("dies-once")

    assert job.state == "succeeded"
    assert job.steps() == [1, 2, 3]
    assert any("killed by SIGKILL" in event.stage for event in job.events)
    assert house.value("restarts_total") == 1


@pytest.mark.parametrize(
    ("mode", "cause", "words"),
    [("dies", "killed by SIGKILL", "the last\nwords"), ("crashes", "exit code 1", "no such")],
)
def test_a_process_that_dies_again_and_again_fails_with_its_last_words(
    house: WorkerHouse, mode: str, cause: str, words: str
) -> None:
    job = house.fake.add_job()

    house.work(mode)

    assert (job.state, job.reason) == ("failed", "JOB_DIED")
    assert cause in job.message
    assert words in job.message
    assert [event.stage for event in job.events].count("reading data") == 4
    assert house.value("restarts_total") == 3


def test_a_result_that_is_not_there_is_a_death(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("lies")

    assert (job.state, job.reason) == ("failed", "JOB_DIED")
    assert "exit code 0" in job.message


def test_the_checkpoints_of_a_failed_job_stay_and_nothing_else(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("dies")

    assert job.state == "failed"
    assert house.files() == [
        job.id, f"{job.id}/checkpoints", *(f"{job.id}/checkpoints/step-{step}" for step in (1, 2)),
    ]  # fmt: skip


def test_lines_that_mean_nothing_are_logged_and_left_out(house: WorkerHouse, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "motley_trainer")
    job = house.fake.add_job()

    house.work("babbles")

    assert job.state == "succeeded"
    assert set(job.kinds()) == {"stage", "progress", "checkpoint_step", "evaluation", "published"}
    assert job.steps() == [1, 2, 3]
    malformed = [record.getMessage() for record in caplog.records if "means nothing" in record.getMessage()]
    assert len(malformed) == 10
    assert max(map(len, malformed)) < 800
    assert "12 lines in all meant nothing" in caplog.text
    assert "words on stderr" in caplog.text


def test_a_process_that_takes_too_much_memory_is_killed_and_the_job_fails(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("eats", memory_limit_bytes=40 << 20)

    assert (job.state, job.reason) == ("failed", "OUT_OF_MEMORY")
    assert str(40 << 20) in job.message
    assert [event.stage for event in job.events].count("reading data") == 1


def test_an_adapter_that_the_server_does_not_take_stays_at_the_worker(
    house: WorkerHouse, caplog: pytest.LogCaptureFixture
) -> None:
    job = house.fake.add_job()
    house.adapters.refusals += [refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_ADAPTERS")] * 2

    house.work("passes")

    assert (job.state, job.reason) == ("failed", "QUOTA_ADAPTERS")
    assert f"7 days its adapter stays with worker w1, in jobs/{job.id}/adapter of its work directory" in job.message
    assert "`motley adapters push`" in job.message
    assert str(house.directory) not in job.message, "where that is on the worker's machine is no tenant's to know"
    folder = house.directory / "jobs" / job.id
    assert str(folder / "adapter") in caplog.text
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights" * 1000
    assert json.loads((folder / "result.json").read_text())["passed"] is True
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "checkpoints", "result.json"]


def test_an_event_that_the_server_does_not_take_is_left_out_alone(house: WorkerHouse) -> None:
    house.fake.refused_stage = "publishing"
    job = house.fake.add_job()

    house.work("passes", timings=AT_ONCE)

    assert job.state == "succeeded"
    assert [event.stage for event in job.events if event.stage] == ["fetching data", "reading data"]
    assert job.steps() == [1, 2, 3]


def test_an_end_that_the_server_does_not_take_is_a_failure(house: WorkerHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    job = house.fake.add_job()
    finish = house.adapters.finish

    def finish_and_delete(*arguments: Any) -> adapter_pb2.AdapterVersion:
        version = finish(*arguments)
        house.adapters.versions["legal"].remove(version)
        return version

    monkeypatch.setattr(house.adapters, "finish", finish_and_delete)

    house.work("passes")

    assert (job.state, job.reason) == ("failed", "NOT_PUBLISHED")
    assert job.steps() == [1, 2, 3]


def test_a_reason_that_is_no_word_does_not_keep_a_job_from_failing(house: WorkerHouse) -> None:
    job = house.fake.add_job()

    house.work("mumbles", timings=AT_ONCE)

    assert (job.state, job.reason) == ("failed", "INVALID_ENDING")
    assert [event.stage for event in job.events] == ["fetching data", "reading data"], "the events were no fault of it"


def test_adapters_to_keep_clear_of_are_there_before_the_job_begins(house: WorkerHouse) -> None:
    for name in ("first", "second"):
        house.adapters.point(name, "default", house.adapters.add(name, {"motley_manifest.json": name.encode()}).version)
    job = house.fake.add_job(s2ft=training_pb2.S2ftSettings(disjoint_from=["first", "second"]))
    seen: dict[str, bytes] = {}

    def look() -> bool:
        for path in (house.directory / "jobs").glob("*/adapters/[0-9]/motley_manifest.json"):
            seen[path.parent.name] = path.read_bytes()
        return job.kinds().count("stage") == 3

    house.work("waits", look)

    assert seen == {"0": b"first", "1": b"second"}
    assert house.files().count(f"{job.id}/adapters/.new-0") == 0
