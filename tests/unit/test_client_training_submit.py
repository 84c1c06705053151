"""`motley train submit` against a service in memory: what its flags ask for, and which of them are refused."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_training_service import FakeTrainingService, digest_of, serving_training
from motley.v1 import training_pb2
from motley_client.cli import app
from training_words import DIGEST, change, read_terminal, spec_message, told, train

JOB = "job-0000000000000001"
LINES = b'{"prompt": "a", "completion": "b"}\n' * 3
HELD_OUT = b'{"prompt": "c", "completion": "d"}\n'


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeTrainingService]:
    """Serve training at the address that the environment names, and hide this machine's settings."""
    fake = FakeTrainingService()
    with serving_training(fake) as address:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("MOTLEY_SERVER", address)
        monkeypatch.delenv("MOTLEY_KEY", raising=False)
        yield fake


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Write a dataset."""
    path = tmp_path / "tickets.jsonl"
    path.write_bytes(LINES)
    return str(path)


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    """Write another one."""
    path = tmp_path / "held.jsonl"
    path.write_bytes(HELD_OUT)
    return str(path)


def asked(fake: FakeTrainingService) -> training_pb2.CreateTrainingJobRequest:
    (request,) = (request for name, request in fake.calls if name == "CreateTrainingJob")
    assert isinstance(request, training_pb2.CreateTrainingJobRequest)
    return request


STEPS = (
    "--steps 30 --batch-size 8 --micro-batch-size 2 --lr 1e-4 --schedule cosine --warmup 0 --max-length 64 "
    "--over-length refuse --seed 7 --quantization nf4 --checkpoint-steps 5 --max-loss-ratio 0.9 --min-exact-match 0.5 "
    "--alias prod --alias new --label team=search --label note=a=b --request-id mine"
).split()
LORA = "--rank 4 --alpha 8 --rslora --target q_proj --target v_proj --dropout 0".split()
S2FT = (
    "--down-share 0.1 --o-share 0 --score weight-activation --order large --budget global "
    "--disjoint-from legal --disjoint-from poems@2"
).split()


def whole_spec() -> training_pb2.TrainingSpec:
    return training_pb2.TrainingSpec(
        dataset=digest_of(LINES),
        quantization="nf4",
        steps=30,
        batch_size=8,
        micro_batch_size=2,
        max_length=64,
        over_length=training_pb2.OVER_LENGTH_REFUSE,
        seed=7,
        checkpoint_steps=5,
        optimizer=training_pb2.OptimizerSettings(
            learning_rate=1e-4, schedule=training_pb2.LEARNING_RATE_SCHEDULE_COSINE, warmup_steps=0
        ),
        gate=training_pb2.Gate(dataset=digest_of(HELD_OUT), max_loss_ratio=0.9, min_exact_match=0.5),
        publish=training_pb2.PublishSettings(
            adapter_name="mine", aliases=["prod", "new"], labels={"team": "search", "note": "a=b"}
        ),
    )


def test_submit_uploads_the_data_asks_for_what_every_flag_says_and_prints_the_id(
    fake: FakeTrainingService, data: str, held_out: str
) -> None:
    printed = told("submit", data, "--adapter", "mine", "--method", "lora", "--eval", held_out, *LORA, *STEPS)

    wanted = whole_spec()
    wanted.method = training_pb2.TRAINING_METHOD_LORA
    wanted.lora.MergeFrom(
        training_pb2.LoraSettings(rank=4, alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"], dropout=0)
    )
    assert (asked(fake).spec, asked(fake).request_id) == (wanted, "mine")
    assert printed == f"{JOB}\n"
    assert [one.display_name for one in fake.datasets.values()] == ["tickets.jsonl", "held.jsonl"]
    assert fake.files == {digest_of(LINES): LINES, digest_of(HELD_OUT): HELD_OUT}


def test_submit_asks_for_s2ft_as_its_flags_say(fake: FakeTrainingService, data: str, held_out: str) -> None:
    told("submit", data, "--adapter", "mine", "--method", "s2ft", "--eval", held_out, *S2FT, *STEPS)

    wanted = whole_spec()
    wanted.method = training_pb2.TRAINING_METHOD_S2FT
    wanted.s2ft.MergeFrom(
        training_pb2.S2ftSettings(
            down_share=0.1,
            o_share=0,
            score=training_pb2.CHANNEL_SCORE_WEIGHT_ACTIVATION,
            order=training_pb2.CHANNEL_ORDER_LARGE,
            budget=training_pb2.CHANNEL_BUDGET_GLOBAL,
            disjoint_from=["legal", "poems@2"],
        )
    )
    assert asked(fake).spec == wanted


def test_submit_leaves_open_what_no_flag_says(fake: FakeTrainingService, data: str) -> None:
    told("submit", data, "--adapter", "mine", "--method", "s2ft", "--epochs", "0.5")

    assert asked(fake).spec == training_pb2.TrainingSpec(
        method=training_pb2.TRAINING_METHOD_S2FT,
        dataset=digest_of(LINES),
        s2ft={},
        epochs=0.5,
        publish=training_pb2.PublishSettings(adapter_name="mine"),
    )


def test_submit_asks_that_no_alias_moves(fake: FakeTrainingService) -> None:
    told("submit", DIGEST, *USUAL, "lora", "--keep-aliases")

    assert asked(fake).spec.publish == training_pb2.PublishSettings(adapter_name="mine", keep_aliases=True)


def test_submit_takes_data_that_is_there_by_its_digest(fake: FakeTrainingService) -> None:
    told("submit", DIGEST, "--adapter", "mine", "--method", "lora", "--eval", digest_of(HELD_OUT))

    assert (asked(fake).spec.dataset, asked(fake).spec.gate.dataset) == (DIGEST, digest_of(HELD_OUT))
    assert [name for name, _ in fake.calls] == ["CreateTrainingJob"]


def test_the_same_request_id_is_the_same_job(fake: FakeTrainingService, data: str) -> None:
    words = ["submit", data, "--adapter", "mine", "--method", "lora", "--request-id", "mine"]

    assert told(*words) == told(*words)
    assert len(fake.jobs) == 1


@pytest.mark.parametrize("has_data", [True, False])
def test_submit_takes_everything_from_a_file(
    fake: FakeTrainingService, data: str, held_out: str, tmp_path: Path, has_data: bool
) -> None:
    spec: dict[str, Any] = {"lora": {"rank_pattern": {"q_proj": 3}}, "publish": {"adapter_name": "mine"}}
    path = tmp_path / "spec.json"
    if not has_data:
        spec["dataset"] = DIGEST
    path.write_text(json.dumps(spec | {"optimizer": {"beta1": 0.5}, "gate": {"max_loss_ratio": 0.5}}))
    told("submit", *([data] if has_data else []), "--spec", str(path), "--eval", held_out)

    wanted = training_pb2.TrainingSpec(
        method=training_pb2.TRAINING_METHOD_LORA,
        dataset=digest_of(LINES) if has_data else DIGEST,
        lora=training_pb2.LoraSettings(rank_pattern={"q_proj": 3}),
        optimizer=training_pb2.OptimizerSettings(beta1=0.5),
        gate=training_pb2.Gate(dataset=digest_of(HELD_OUT), max_loss_ratio=0.5),
        publish=training_pb2.PublishSettings(adapter_name="mine"),
    )
    assert asked(fake).spec == wanted


def test_a_shown_spec_can_be_submitted_again(fake: FakeTrainingService, tmp_path: Path) -> None:
    fake.add_job(spec_message())
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(json.loads(told("show", JOB, "--json"))["spec"]))
    told("submit", "--spec", str(path))

    assert asked(fake).spec == spec_message()


USUAL = ["--adapter", "mine", "--method"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([DIGEST], "--adapter"),
        ([DIGEST, "--method", "lora"], "--adapter"),
        ([DIGEST, "--adapter", "mine"], "--method"),
        ([*USUAL, "lora"], "DATA.jsonl"),
        ([DIGEST, *USUAL, "loqt"], "loqt"),
        ([DIGEST, *USUAL, "lora", "--steps", "1", "--epochs", "1"], "--steps and --epochs"),
        ([DIGEST, *USUAL, "lora", "--schedule", "zigzag"], "zigzag"),
        ([DIGEST, *USUAL, "lora", "--steps", "many"], "--steps"),
        ([DIGEST, *USUAL, "lora", "--label", "team"], "KEY=VALUE"),
        ([DIGEST, "--spec", "SPEC"], DIGEST),
        (["--spec", "SPEC", "--seed", "0", "--rslora"], "--seed, --rslora"),
        (["--spec", "SPEC", "--adapter", "other"], "--adapter"),
        (["--spec", "SPEC", "--eval", DIGEST], "--eval"),
        *(
            ([DIGEST, *USUAL, "lora", *flag], f"--method lora has no {flag[0]}")
            for flag in (
                ["--down-share", "0"], ["--o-share", "0.1"], ["--score", "random"], ["--order", "small"],
                ["--budget", "layer"], ["--disjoint-from", "a"],
            )
        ),
        *(
            ([DIGEST, *USUAL, "s2ft", *flag], f"--method s2ft has no {flag[0]}")
            for flag in (["--rank", "0"], ["--alpha", "0"], ["--rslora"], ["--target", "a"])
        ),
        ([DIGEST, *USUAL, "s2ft", "--target", "a", "--rank", "3"], "no --rank and no --target"),
        ([DIGEST, *USUAL, "s2ft", "--alias", "a", "--keep-aliases"], "choose one of --alias and --keep-aliases"),
    ],
    ids=lambda value: " ".join(value).replace(DIGEST, "DIGEST") if isinstance(value, list) else "",
)  # fmt: skip
def test_flags_that_fit_nothing_are_refused_by_name_before_anything_is_sent(
    fake: FakeTrainingService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], complaint: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / "spec.json"
    spec = {"dataset": DIGEST, "lora": {}, "gate": {"dataset": DIGEST}, "publish": {"adapter_name": "mine"}}
    path.write_text(json.dumps(spec))
    result = train("submit", *(str(path) if word == "SPEC" else word for word in arguments))

    assert (result.exit_code, result.stdout, fake.calls) == (2, "", [])
    assert complaint in result.stderr


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (b'{"lora": {}, "rate": 1}', "(INVALID_VALUE, field spec)\n"),
        (b"\xff", "(INVALID_VALUE, field spec)\n"),
        (b'{"publish": {"adapter_name": "mine"}}', "(INVALID_VALUE, field spec.method)\n"),
        (None, "No such file or directory (FILE_TROUBLE)\n"),
    ],
)
def test_a_file_that_is_no_spec_is_told_in_one_line(
    fake: FakeTrainingService, data: str, tmp_path: Path, content: bytes | None, ending: str
) -> None:
    path = tmp_path / "spec.json"
    if content is not None:
        path.write_bytes(content)
    result = train("submit", data, "--spec", str(path))

    assert (result.exit_code, result.stdout, fake.calls) == (1, "", [])
    assert result.stderr.endswith(ending)
    assert result.stderr.count("\n") == 1


def test_a_number_that_cannot_be_sent_is_told_before_the_data_is(fake: FakeTrainingService, data: str) -> None:
    result = train("submit", data, *USUAL, "lora", "--rank", str(2**40))

    assert (result.exit_code, fake.calls) == (1, [])
    message = "spec.lora.rank: 1099511627776 is not within -2147483648 and 2147483647"
    assert result.stderr == f"error: {message} (INVALID_VALUE, field spec.lora.rank)\n"


def test_data_that_is_not_there_is_told_in_one_line(fake: FakeTrainingService, tmp_path: Path) -> None:
    for place, ending in (("none", "No such file or directory (FILE_TROUBLE)\n"), ("", "(NOT_A_FILE, field source)\n")):
        result = train("submit", str(tmp_path / place), *USUAL, "lora")
        assert (result.exit_code, result.stdout, fake.calls) == (1, "", [])
        assert result.stderr.endswith(ending)


def test_submit_watches_on_when_told_to(fake: FakeTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    def end_at_once(spec: Any, add: Callable[..., Any] = fake.add_job) -> Any:
        job = add(spec)
        fake.happen(job.id, change(training_pb2.JOB_STATE_REJECTED, "GATE", "no better"))
        return job

    monkeypatch.setattr(fake, "add_job", end_at_once)
    words = ["submit", DIGEST, *USUAL, "lora", "--watch"]

    plain = train(*words)
    assert (plain.exit_code, plain.stderr) == (4, "")
    assert [line.partition("  ")[2] for line in plain.stdout.splitlines()] == [
        "",
        "queued",
        "rejected: no better (GATE)",
    ]
    assert plain.stdout.startswith(f"{JOB}\n")
    first, *events = map(json.loads, train(*words, "--json").stdout.splitlines())
    assert first["id"] == "job-0000000000000002"
    assert [one["state_change"]["state"] for one in events] == ["queued", "rejected"]


def test_the_upload_draws_a_bar_on_a_terminals_stderr_alone(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as caught:
            app(["train", "submit", data, *USUAL, "lora"])
        terminal.flush()
        drawn = read_terminal(ours)

    assert caught.value.code == 0
    assert "sending" in drawn
    assert capsys.readouterr().out == f"{JOB}\n"
