"""`motley train` but for `submit`, against a service in memory: what is sent and printed, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import make_certificates
from fake_service import FIRST_SECOND, refusal
from fake_training_service import BASE_FINGERPRINT, FakeTrainingService, digest_of, serving_training
from motley.v1 import training_pb2
from motley_client.cli import app
from motley_client.cli_train_routing import routing_words
from motley_client.cli_train_watch import EXIT_BY_STATE
from motley_client.types_training import JobState, RoutingReport
from training_words import DIGEST, change, progress, read_terminal, spec_message, told, train, whole_life

JOB = "job-0000000000000001"


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeTrainingService]:
    """Serve training at the address that the environment names, and hide this machine's settings."""
    fake = FakeTrainingService()
    with serving_training(fake) as address:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("MOTLEY_SERVER", address)
        monkeypatch.delenv("MOTLEY_KEY", raising=False)
        yield fake


def ended(fake: FakeTrainingService, state: Any, reason: str = "", message: str = "") -> str:
    """Make a job that ended, and return its id."""
    job = fake.add_job(spec_message())
    fake.happen(job.id, change(state, reason, message))
    return job.id


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (training_pb2.JOB_STATE_SUCCEEDED, 0),
        (training_pb2.JOB_STATE_REJECTED, 4),
        (training_pb2.JOB_STATE_FAILED, 5),
        (training_pb2.JOB_STATE_CANCELLED, 6),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_exit_status_of_a_watch_is_the_jobs_end(
    fake: FakeTrainingService, flags: list[str], state: Any, status: int
) -> None:
    assert train("watch", ended(fake, state), *flags).exit_code == status
    assert str(status) in train("watch", "--help").stdout


def test_every_end_has_an_exit_status_of_its_own() -> None:
    assert set(EXIT_BY_STATE) == {state for state in JobState if state.is_end}
    assert len({*EXIT_BY_STATE.values(), 1, 2, 3}) == len(EXIT_BY_STATE) + 3


def test_watch_prints_a_line_an_event_where_nobody_looks_on(fake: FakeTrainingService) -> None:
    fake.add_job(spec_message())
    fake.happen(JOB, *whole_life()[:-1], training_pb2.JobEvent())
    fake.happen(JOB, change(training_pb2.JOB_STATE_FAILED, "LOSS_NOT_FINITE", "loss is nan at step 11"))

    lines = train("watch", JOB).stdout.splitlines()

    assert lines[0] == "2027-01-15T08:00:02Z  queued"
    assert [line.partition("Z  ")[2] for line in lines[1:]] == [
        "running",
        "reading data",
        "data: 90 samples, 10 held out, 2 truncated, 1 dropped, 1234 tokens",
        "step 10/30  loss 1.2500  lr 2.00e-04  grad norm 0.5  900 tokens/s  0:01:16 left  412 MiB",
        "checkpoint at step 10",
        "routing: experts have 10.0% to 70.0% of tokens over 2 modules; even is 25.0%",
        "evaluation: loss 2.0000 before, 0.5000 after; exact match 0.0% before, 90.0% after; 10 samples",
        f"published legal@3 {DIGEST}",
        "something that this version of motley does not know",
        "failed: loss is nan at step 11 (LOSS_NOT_FINITE)",
    ]


def test_watch_prints_a_json_object_an_event(fake: FakeTrainingService) -> None:
    fake.add_job(spec_message())
    fake.happen(JOB, progress(5, float("nan")), *whole_life())

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no standard JSON")

    events = [json.loads(line, parse_constant=refuse) for line in told("watch", JOB, "--json").splitlines()]

    assert [one.pop("sequence") for one in events] == list(range(1, 12))
    assert events[0] == {
        "time": "2027-01-15T08:00:02Z", "state_change": {"state": "queued", "reason": "", "message": ""},
    }  # fmt: skip
    numbers = {
        "step": 5, "num_steps": 30, "loss": None, "learning_rate": 2e-4, "gradient_norm": 0.5,
        "tokens_per_second": 900.4, "remaining_seconds": 75.5, "memory_bytes": 412 << 20,
    }  # fmt: skip
    assert events[1]["progress"] == numbers
    assert events[3]["stage"] == "reading data"
    assert events[4]["data"] == {
        "num_samples": 90, "num_held_out": 10, "num_truncated": 2, "num_dropped": 1, "num_tokens": 1234,
    }  # fmt: skip
    assert events[5]["progress"] == numbers | {"step": 10, "loss": 1.25}
    assert events[6]["checkpoint_step"] == 10
    assert events[7]["routing"] == {
        "modules": {"a": {"shares": [0.7, 0.1, 0.1, 0.1]}, "b": {"shares": [0.25, 0.45, 0.2, 0.1]}},
    }  # fmt: skip
    assert events[8]["evaluation"] == {
        "num_samples": 10, "loss_before": 2.0, "loss_after": 0.5, "exact_match_before": 0.0, "exact_match_after": 0.9,
    }  # fmt: skip
    assert (events[9]["published"]["name"], events[9]["published"]["kind"]) == ("legal", "lora")
    assert all(len(one) == 2 for one in events)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({}, "no experts"),
        ({"a": (1.0,)}, "experts have 100.0% to 100.0% of tokens over 1 modules; even is 100.0%"),
        (
            {"a": (0.5, 0.5), "b": (0.5, 0.25, 0.25, 0.0)},
            "experts have 0.0% to 50.0% of tokens over 2 modules; even is 25.0% or 50.0%",
        ),
    ],
    ids=["none", "one", "unlike"],
)
def test_where_tokens_went_is_one_line(modules: Mapping[str, tuple[float, ...]], words: str) -> None:
    assert routing_words(RoutingReport(modules)) == f"routing: {words}"


def test_a_terminal_gets_one_live_line_and_keeps_the_last_of_it(
    fake: FakeTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_job(spec_message())
    steps = [progress(step) for step in (8, 9)]
    fake.happen(JOB, *steps, change(training_pb2.JOB_STATE_SUCCEEDED))
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            app(["train", "watch", JOB])
        terminal.flush()
        drawn = read_terminal(ours)

    assert caught.value.code == 0
    assert drawn.count("step 8/30") == 1, "and was then overdrawn"
    assert drawn.count("step 9/30") == 2, "and stays"
    assert "\x1b[2K" in drawn
    assert [line for line in drawn.splitlines() if line.endswith("succeeded")]


@pytest.fixture
def three_jobs(fake: FakeTrainingService) -> FakeTrainingService:
    """Keep a job that waits, one that has succeeded, and one that runs."""
    s2ft = training_pb2.TrainingSpec(
        method=training_pb2.TRAINING_METHOD_S2FT, publish=training_pb2.PublishSettings(adapter_name="poems")
    )
    for spec in (spec_message(), spec_message(), s2ft):
        fake.add_job(spec)
    done = fake.jobs["job-0000000000000002"]
    fake.happen(done.id, *whole_life())
    done.attempts, done.worker = 2, "w1"
    done.start_time.FromSeconds(FIRST_SECOND + 40)
    done.end_time.FromSeconds(FIRST_SECOND + 50)
    fake.happen("job-0000000000000003", change(training_pb2.JOB_STATE_RUNNING))
    return fake


@pytest.mark.usefixtures("three_jobs")
def test_list_prints_a_line_for_each_job() -> None:
    assert told("list").splitlines() == [
        "id                    state      method  adapter  created               step   worker",
        "job-0000000000000003  running    s2ft    poems    2027-01-15T08:00:05Z",
        "job-0000000000000002  succeeded  lora    legal    2027-01-15T08:00:03Z  10/30  w1",
        "job-0000000000000001  queued     lora    legal    2027-01-15T08:00:01Z",
    ]
    assert [line.split()[0] for line in told("list", "--state", "running").splitlines()[1:]] == ["job-0000000000000003"]
    assert [one["id"][-1] for one in json.loads(told("list", "--json"))["jobs"]] == ["3", "2", "1"]


def test_lists_of_nothing_are_a_heading_and_an_empty_list() -> None:
    for command, key in (("list", "jobs"), ("datasets", "datasets")):
        assert len(told(command).splitlines()) == 1
        assert json.loads(told(command, "--json")) == {key: []}


@pytest.mark.usefixtures("three_jobs")
def test_show_prints_all_that_is_known() -> None:
    lines = told("show", "job-0000000000000002").splitlines()
    assert lines[:-1] == [
        "id            job-0000000000000002",
        "state         succeeded",
        "adapter       legal",
        "method        lora",
        f"dataset       {DIGEST}",
        f"base          {BASE_FINGERPRINT}",
        "created       2027-01-15T08:00:03Z",
        "started       2027-01-15T08:00:40Z",
        "ended         2027-01-15T08:00:50Z",
        "attempts      2",
        "worker        w1",
        "cancelling    no",
        "data          90 samples, 10 held out, 2 truncated, 1 dropped, 1234 tokens",
        "progress      step 10/30  loss 1.2500  lr 2.00e-04  grad norm 0.5  900 tokens/s  0:01:16 left  412 MiB",
        "evaluation    loss 2.0000 before, 0.5000 after; exact match 0.0% before, 90.0% after; 10 samples",
        f"published     legal@3 {DIGEST}",
        "made",
    ]
    assert json.loads(lines[-1].removeprefix("spec"))["steps"] == 30
    assert "started" in told("show", JOB).splitlines(), "nothing is known of it yet"


@pytest.mark.usefixtures("three_jobs")
def test_show_prints_json_with_exactly_these_keys() -> None:
    shown = json.loads(told("show", "job-0000000000000002", "--json"))
    assert shown.keys() == {field.name for field in training_pb2.TrainingJob.DESCRIPTOR.fields}
    assert shown["spec"] == {
        "method": "TRAINING_METHOD_LORA", "dataset": DIGEST, "lora": {"rank": 4}, "steps": 30,
        "publish": {"adapter_name": "legal"},
    }  # fmt: skip
    assert (shown["state"], shown["attempts"], shown["last_sequence"]) == ("succeeded", 2, 10)
    assert (shown["start_time"], shown["end_time"]) == ("2027-01-15T08:00:40Z", "2027-01-15T08:00:50Z")
    assert (shown["progress"]["step"], shown["data"]["num_samples"]) == (10, 90)
    assert (shown["evaluation"]["loss_after"], shown["version"]["version"]) == (0.5, 3)

    waiting = json.loads(told("show", JOB, "--json"))
    parts = ("start_time", "end_time", "progress", "data", "evaluation", "version")
    assert [waiting[name] for name in parts] == [None] * len(parts)


def test_cancel_tells_now_from_later(three_jobs: FakeTrainingService) -> None:
    assert told("cancel", JOB) == f"cancelled {JOB}\n"
    running = "job-0000000000000003"
    assert told("cancel", running) == f"{running} ends after the step that it is at\n"
    assert three_jobs.jobs[running].cancel_requested
    late = train("cancel", "job-0000000000000002")
    assert (late.exit_code, late.stderr) == (1, "error: JOB_ENDED it is (JOB_ENDED, field id)\n")


def test_datasets_are_listed_and_forgotten_after_a_yes(fake: FakeTrainingService) -> None:
    digests = [fake.add_dataset(data, name).digest for data, name in ((b"{}\n{}\n", "first"), (b"{}\n", "second"))]
    assert [line.split() for line in told("datasets").splitlines()] == [
        ["digest", "name", "format", "samples", "size", "bytes", "created"],
        [digests[1], "second", "completion", "1", "3", "2027-01-15T08:00:02Z"],
        [digests[0], "first", "completion", "2", "6", "2027-01-15T08:00:01Z"],
    ]
    assert json.loads(told("datasets", "--json"))["datasets"][1] == {
        "digest": digests[0], "display_name": "first", "format": "completion", "size_bytes": 6, "num_samples": 2,
        "create_time": "2027-01-15T08:00:01Z",
    }  # fmt: skip

    for typed in ("n\n", ""):
        assert train("forget", digests[0], typed=typed).exit_code == 1
    assert len(fake.datasets) == 2
    assert train("forget", digests[0], typed="y\n").exit_code == 0
    assert told("forget", digests[1], "--yes") == f"deleted {digests[1]}\n"
    assert fake.datasets == {}


def test_capabilities_tell_methods_limits_and_workers(fake: FakeTrainingService) -> None:
    worker = training_pb2.Worker(name="w1", methods=[1, 2], device="cpu", is_busy=True)
    worker.last_seen_time.FromSeconds(FIRST_SECOND)
    fake.workers.append(worker)
    fake.add_job(spec_message())

    assert told("capabilities").splitlines() == [
        "methods       lora s2ft",
        "queued jobs   1",
        "running jobs  0",
        "datasets      at most 1000 of 1073741824 bytes",
        "",
        "worker  methods    device        last seen",
        "w1      lora s2ft  cpu     busy  2027-01-15T08:00:00Z",
    ]
    assert json.loads(told("capabilities", "--json")) == {
        "methods": ["lora", "s2ft"],
        "workers": [
            {"name": "w1", "methods": ["lora", "s2ft"], "device": "cpu", "is_busy": True,
             "last_seen_time": "2027-01-15T08:00:00Z"}
        ],
        "max_dataset_bytes": 1 << 30,
        "max_datasets": 1000,
        "queued_jobs": 1,
        "running_jobs": 0,
    }  # fmt: skip


COMMANDS = [
    ["submit", DIGEST, "--adapter", "mine", "--method", "lora"],
    ["watch", "job-0000000000000002"],
    ["list"],
    ["show", JOB],
    ["cancel", JOB],
    ["datasets"],
    ["forget", digest_of(b""), "--yes"],
    ["capabilities"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_sends_the_key_and_tells_a_refusal_in_one_line(
    fake: FakeTrainingService, command: list[str]
) -> None:
    fake.refusals.append(refusal(grpc.StatusCode.PERMISSION_DENIED, "ROLE_LACKING"))
    result = train(*command, "--key", "mk_a_b")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: ROLE_LACKING it is (ROLE_LACKING)\n"
    assert fake.credentials == ["Bearer mk_a_b"]


@pytest.mark.parametrize("command", COMMANDS[:2], ids=["submit", "watch"])
def test_a_command_goes_by_tls_where_a_ca_file_says_so(
    three_jobs: FakeTrainingService, command: list[str], tmp_path: Path
) -> None:
    three_jobs.add_dataset(b"")
    certificates = make_certificates(tmp_path)
    with serving_training(three_jobs, certificates) as address:
        result = train(*command, "--server", address, "--ca-file", str(certificates.authority))

    assert (result.exit_code, result.stderr) == (0, "")
    assert three_jobs.calls


@pytest.mark.parametrize("command", COMMANDS[:2], ids=["submit", "watch"])
def test_no_server_is_exit_code_3(command: list[str]) -> None:
    result = train(*command, "--server", "127.0.0.1:1")

    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.endswith("(UNREACHABLE)\n")
