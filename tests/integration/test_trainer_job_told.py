"""What a job on the embedded base tells beside its steps: how far it reads, what it trains, and why it starts over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from job_folders import make_job, reversals
from motley_trainer.job.reporting import JobCancelledError, Reporter
from motley_trainer.job.run import run

SAMPLES = reversals(40)
SPEC: dict[str, Any] = {"steps": 4, "batch_size": 4, "checkpoint_steps": 3, "optimizer": {"learning_rate": 4e-3}}
Events = list[Mapping[str, Any]]


def job(folder: Path, **more: Any) -> Path:
    return make_job(folder, SAMPLES, **{**SPEC, **more})


def stopped(folder: Path, after: str) -> Events:
    """Run a job, and stop it at the first look after something of this kind was told."""
    events: Events = []
    with pytest.raises(JobCancelledError):
        run(folder, events.append, lambda: any(after in event for event in events))
    return events


def test_reading_can_be_stopped_though_nothing_is_to_be_told_yet() -> None:
    events: list[Mapping[str, object]] = []
    answers = iter([False, True])
    reporter = Reporter(events.append, lambda: next(answers))
    reporter.read("dataset", 1, 0.0)
    with pytest.raises(JobCancelledError):
        reporter.read("dataset", 2, 0.5)
    assert events == []


@pytest.mark.parametrize(("term", "change"), [("quantization", {"served": "nf4"}), ("dtype", {"dtype": "bfloat16"})])
def test_checkpoints_of_other_terms_are_dropped_and_the_training_starts_over(
    tmp_path: Path, term: str, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    stopped(job(tmp_path), "checkpoint_step")
    old = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert old
    job(tmp_path, **change)  # as after a restart of the server
    events = stopped(tmp_path, "progress")
    (told,) = [event["stage"] for event in events if str(event.get("stage", "")).startswith("starting over")]
    assert f"another {term}" in told
    assert len(told) <= 200, "or the server takes no such stage"
    assert told in caplog.text
    assert [event["progress"]["step"] for event in events if "progress" in event] == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert run(tmp_path, events.append).passed
    assert sum("starting over" in str(event.get("stage")) for event in events) == 1


def test_a_job_that_reads_its_data_says_how_far_it_is_and_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motley_trainer.job.reporting.SECONDS_BETWEEN_STAGES", 0.0)
    folder, events = job(tmp_path), list[Mapping[str, Any]]()
    with pytest.raises(JobCancelledError):
        run(folder, events.append, lambda: len(events) == 3)
    assert [event["stage"] for event in events] == [
        "reading data", "reading data: line 1 of dataset, 0%", "reading data: line 2 of dataset, 2%",
    ]  # fmt: skip


def test_an_s2ft_says_which_shares_its_own_came_to(tmp_path: Path) -> None:
    folder = make_job(
        tmp_path, SAMPLES, method="S2FT", **{**SPEC, "lora": None, "s2ft": {"o_share": 0.001, "down_share": 1e-320}}
    )
    content = json.loads((folder / "job.json").read_text())
    del content["spec"]["lora"]
    (folder / "job.json").write_text(json.dumps(content))
    told = [event["stage"] for event in stopped(folder, "progress") if "stage" in event]
    assert told[-1].startswith("training ")
    assert "% of o_proj" in told[-1]
    assert "% of down_proj" in told[-1]
    assert not any("%" in event.get("stage", "") for event in stopped(folder, "progress")), "once it is chosen"
