"""`motley train` by LoQT: what its flags ask for, what is refused, and what is told of the base that is made."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_training_service import BASE_FINGERPRINT, FakeTrainingService, digest_of, serving_training
from motley.v1 import training_pb2 as pb
from motley_client import Client, LoqtSettings, Merge, MergeReport, TrainedBase, TrainingSpec
from training_words import DIGEST, SPEC, change, told, train

JOB = "job-0000000000000001"
LINES = b'{"text": "a"}\n' * 3
FLAGS = "--rank 4 --factor-scale 0.25 --merge-interval 9 --merge-schedule static --keep-moments --seed 3".split()
MADE = TrainedBase("/bases/my own", DIGEST, BASE_FINGERPRINT, 2, 9000)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeTrainingService]:
    """Serve training, of a base called `paper`, at the address that the environment names."""
    fake = FakeTrainingService()
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    monkeypatch.setattr(Client, "info", lambda self: SimpleNamespace(base_model="paper"))
    with serving_training(fake) as address:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("MOTLEY_SERVER", address)
        monkeypatch.delenv("MOTLEY_KEY", raising=False)
        yield fake


def asked(fake: FakeTrainingService) -> pb.TrainingSpec:
    (request,) = (request for name, request in fake.calls if name == "CreateTrainingJob")
    assert isinstance(request, pb.CreateTrainingJobRequest)
    return request.spec


def spec_with(**settings: Any) -> pb.TrainingSpec:
    """Return a spec that says nothing but its data and these settings."""
    dataset = digest_of(LINES)
    return pb.TrainingSpec(method=pb.TRAINING_METHOD_LOQT, dataset=dataset, loqt=pb.LoqtSettings(**settings))


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {}),
        (["--from", "scratch"], {"start": pb.LOQT_START_SCRATCH}),
        (["--from", "paper"], {"start": pb.LOQT_START_BASE}),
    ],
    ids=["nothing", "scratch", "the base"],
)
def test_a_base_is_asked_for_as_the_flags_say(
    fake: FakeTrainingService, flags: list[str], settings: dict[str, Any]
) -> None:
    told("submit", "plain.jsonl", "--method", "loqt", *flags, *FLAGS)
    said = {"rank": 4, "scale": 0.25, "merge_interval": 9, "schedule": pb.LOQT_SCHEDULE_STATIC, "keep_moments": True}
    wanted = spec_with(**said | settings)
    wanted.seed = 3
    assert asked(fake) == wanted
    assert not asked(fake).HasField("publish")


def test_to_train_on_from_a_base_that_is_not_served_is_refused_by_its_name(fake: FakeTrainingService) -> None:
    result = train("submit", "plain.jsonl", "--method", "loqt", "--from", "tiny")
    assert (result.exit_code, fake.calls) == (2, [])
    assert "'tiny' is not served, but 'paper'" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--adapter", "mine"], "has no --adapter"),
        (["--alias", "prod", "--label", "a=b"], "has no --alias and no --label"),
        (["--keep-aliases"], "has no --keep-aliases"),
        (["--dropout", "0"], "--method loqt has no --dropout"),
        (["--alpha", "1", "--scale", "alpha"], "--method loqt has no --alpha and no --scale"),
        (["--align-by-loqt"], "--method loqt has no --align-by-loqt"),
        (["--merge-schedule", "cosine"], "cosine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_of_adapters_are_refused_by_name(fake: FakeTrainingService, flags: list[str], complaint: str) -> None:
    result = train("submit", DIGEST, "--method", "loqt", *flags)
    assert (result.exit_code, result.stdout, fake.calls) == (2, "", [])
    assert complaint in result.stderr


def events() -> list[pb.JobEvent]:
    """Return what happens to a job that makes a base."""
    merges = [pb.LoqtMerge(step=step, digest=DIGEST) for step in (0, 100, 201)]
    many = [pb.LoqtMerge(step=step, digest=DIGEST) for step in range(300, 309)]
    made = pb.TrainedBase(
        directory=MADE.directory,
        fingerprint=MADE.fingerprint,
        original_fingerprint=MADE.original_fingerprint,
        num_merges=MADE.num_merges,
        size_bytes=MADE.size_bytes,
    )
    return [
        pb.JobEvent(merges=pb.LoqtMerges(merges=merges[:1])),
        pb.JobEvent(merges=pb.LoqtMerges(merges=merges)),
        pb.JobEvent(merges=pb.LoqtMerges(merges=many)),
        pb.JobEvent(merges=pb.LoqtMerges()),
        pb.JobEvent(base=made),
        change(pb.JOB_STATE_SUCCEEDED),
    ]


def test_watch_tells_of_merges_and_of_the_base_that_was_made(fake: FakeTrainingService) -> None:
    fake.add_job(spec_with())
    fake.happen(JOB, *events())
    lines = [line.partition("Z  ")[2] for line in train("watch", JOB).stdout.splitlines()]
    assert lines[1:] == [
        f"merged at step 0; the weights are then {DIGEST}",
        f"merged at steps 0, 100 and 201; the weights are then {DIGEST}",
        f"merged at 9 steps from 300 to 308; the weights are then {DIGEST}",
        "merged: nothing",
        f"base made: {DIGEST}, from {BASE_FINGERPRINT} by 2 merges, 9000 bytes; "
        "serve it where its worker is: motley serve --base '/bases/my own'",
        "succeeded",
    ]
    found = [json.loads(line) for line in train("watch", JOB, "--json").stdout.splitlines()]
    assert found[2]["merges"]["merges"][1] == {"step": 100, "digest": DIGEST}
    assert found[5]["base"]["directory"] == MADE.directory


def test_a_job_is_shown_with_what_it_made(fake: FakeTrainingService, tmp_path: Path) -> None:
    fake.add_job(spec_with(rank=4))
    fake.happen(JOB, *events())
    lines = told("show", JOB).splitlines()
    made = next(line for line in lines if line.startswith("made "))
    assert shlex.split(made.partition(": ")[2]) == ["motley", "serve", "--base", MADE.directory]
    assert "adapter" in lines
    shown = json.loads(told("show", JOB, "--json"))
    assert shown["base"]["num_merges"] == 2
    assert "publish" not in shown["spec"]
    (row,) = told("list").splitlines()[1:]
    assert row.split()[1:3] == ["succeeded", "loqt"]
    (tmp_path / "spec.json").write_text(json.dumps(shown["spec"]))
    told("submit", "--spec", "spec.json")
    assert asked(fake) == spec_with(rank=4)


def test_the_client_reads_what_was_merged_and_made(fake: FakeTrainingService) -> None:
    fake.add_job(spec_with())
    fake.happen(JOB, *events())
    with Client(os.environ["MOTLEY_SERVER"]) as client:
        told_events = [one.event for one in client.watch_training_job(JOB)]
        job = client.get_training_job(JOB)
    assert told_events[1] == MergeReport((Merge(0, DIGEST),))
    assert told_events[5] == MADE
    assert (job.base, job.version) == (MADE, None)
    assert job.spec == TrainingSpec(dataset=digest_of(LINES), settings=LoqtSettings())
    assert (job.spec.adapter_name, SPEC.adapter_name) == ("", "legal")
