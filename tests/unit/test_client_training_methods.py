"""`motley train submit` by GOAT and LoRAM: what their flags ask for, what is refused, and the page that shows them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
from fake_training_service import FakeTrainingService, digest_of, serving_training
from google.protobuf.message import Message
from motley.v1 import training_pb2 as pb
from motley_client import Client
from motley_client.cli_train_flags import FACTORS, GOAT, LOQT, LORA, LORAM, RANK, S2FT, START, TrainingFlags
from page_runs import blocks
from training_words import DIGEST, told, train

JOB = "job-0000000000000001"
LINES = b'{"prompt": "a", "completion": "b"}\n' * 3
TEXT = b'{"text": "c"}\n' * 3
USUAL = ["--adapter", "mine", "--method"]
GOAT_FLAGS = (
    "--rank 16 --experts 4 --top-k 1 --rho 5 --segments minor --scale theoretical --eta 0.1 --rank-for-scale total "
    "--alpha 3 --balance-loss 0 --dropout 0 --target q_proj --target up_proj"
).split()
LORAM_FLAGS = (
    "--rank 4 --alpha 8 --rslora --dropout 0.1 --target q_proj --pruning semi-structured --ratio 0.65 --layers 4:6 "
    "--pattern 2:4 --same-cut-as legal@2 --align-steps 7 --align-learning-rate 1e-5 --align-batch-size 2 "
    "--align-by-loqt --align-rank 3"
).split()
LOQT_FLAGS = (
    "--factor-scale 0.25 --merge-interval 9 --merge-schedule linear --growth 3 --compensation-steps 0 "
    "--decomposition eigh --optimizer adamw-8bit --keep-moments"
).split()


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeTrainingService]:
    """Serve training at the address that the environment names, from a folder with data and text."""
    fake = FakeTrainingService()
    (tmp_path / "motto.jsonl").write_bytes(LINES)
    (tmp_path / "plain.jsonl").write_bytes(TEXT)
    monkeypatch.setattr(Client, "info", lambda self: SimpleNamespace(base_model="tiny"))
    with serving_training(fake) as address:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("MOTLEY_SERVER", address)
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.delenv("MOTLEY_KEY", raising=False)
        yield fake


def asked(fake: FakeTrainingService) -> pb.TrainingSpec:
    (request,) = (request for name, request in fake.calls if name == "CreateTrainingJob")
    assert isinstance(request, pb.CreateTrainingJobRequest)
    return request.spec


def spec_with(**settings: Any) -> pb.TrainingSpec:
    (method,) = settings
    number = pb.TrainingMethod.Value(f"TRAINING_METHOD_{method.upper()}")
    publish = pb.PublishSettings(adapter_name="mine")
    return pb.TrainingSpec(method=number, dataset=digest_of(LINES), publish=publish, **settings)


def goat_settings() -> pb.GoatSettings:
    return pb.GoatSettings(
        rank=16,
        experts=4,
        top_k=1,
        rho=5,
        segments=pb.GOAT_SEGMENTS_MINOR,
        scale=pb.GOAT_SCALE_THEORETICAL,
        eta=0.1,
        rank_for_scale=pb.GOAT_SCALE_RANK_TOTAL,
        alpha=3,
        balance_loss=0,
        dropout=0,
        target_modules=["q_proj", "up_proj"],
    )


def loram_settings() -> pb.LoramSettings:
    return pb.LoramSettings(
        lora=pb.LoraSettings(rank=4, alpha=8, use_rslora=True, dropout=0.1, target_modules=["q_proj"]),
        pruning=pb.LORAM_PRUNING_SEMI_STRUCTURED,
        ratio="0.65",
        layers="4:6",
        pattern="2:4",
        same_cut_as="legal@2",
        alignment=pb.LoramAlignment(
            dataset=digest_of(TEXT), steps=7, learning_rate=1e-5, batch_size=2, loqt=loqt_settings(rank=3)
        ),
    )


def loqt_settings(**other: Any) -> pb.LoqtSettings:
    """Return what LOQT_FLAGS say."""
    return pb.LoqtSettings(
        scale=0.25,
        merge_interval=9,
        schedule=pb.LOQT_SCHEDULE_LINEAR,
        growth=3,
        compensation_steps=0,
        decomposition=pb.LOQT_DECOMPOSITION_EIGH,
        optimizer=pb.LOQT_OPTIMIZER_ADAMW_8BIT,
        keep_moments=True,
        **other,
    )


def test_goat_is_asked_for_as_its_flags_say(fake: FakeTrainingService) -> None:
    told("submit", "motto.jsonl", *USUAL, "goat", *GOAT_FLAGS)
    assert asked(fake) == spec_with(goat=goat_settings())


@pytest.mark.parametrize("by_digest", [False, True], ids=["file", "digest"])
def test_loram_is_asked_for_as_its_flags_say(fake: FakeTrainingService, by_digest: bool) -> None:
    text = digest_of(TEXT) if by_digest else "plain.jsonl"
    told("submit", "motto.jsonl", *USUAL, "loram", *LORAM_FLAGS, *LOQT_FLAGS, "--align-with", text)
    assert asked(fake) == spec_with(loram=loram_settings())
    names = [one.display_name for one in fake.datasets.values()]
    assert names == (["motto.jsonl"] if by_digest else ["motto.jsonl", "plain.jsonl"])


@pytest.mark.parametrize(
    ("method", "settings"), [("goat", pb.GoatSettings()), ("loram", pb.LoramSettings(lora=pb.LoraSettings()))]
)
def test_what_no_flag_says_is_left_open(fake: FakeTrainingService, method: str, settings: Message) -> None:
    told("submit", "motto.jsonl", *USUAL, method)
    assert asked(fake) == spec_with(**{method: settings})


def test_every_setting_has_a_flag_but_for_patterns_and_samples() -> None:
    words = [*GOAT_FLAGS, *LORAM_FLAGS, *LOQT_FLAGS, "--align-with", "--from"]
    said = {word for word in words if word.startswith("--")}
    hints = get_type_hints(TrainingFlags, include_extras=True)
    ours = {
        "--from" if one.name == "start" else "--" + one.name.replace("_", "-")
        for one in fields(TrainingFlags)
        if hints[one.name].__metadata__[0].rich_help_panel in (RANK, FACTORS, LORA, GOAT, LORAM, START, LOQT)
    }
    assert said == ours
    without = {"start", "rank"}
    assert {one.name for one, _ in loqt_settings().ListFields()} == set(fields_of(pb.LoqtSettings)) - without
    assert {one.name for one, _ in goat_settings().ListFields()} == set(fields_of(pb.GoatSettings))
    left = set(fields_of(pb.LoramSettings)) - {one.name for one, _ in loram_settings().ListFields()}
    assert left == {"calibration_samples"}


def fields_of(kind: type[Message]) -> list[str]:
    return [field.name for field in kind.DESCRIPTOR.fields]


def test_each_methods_flags_have_a_panel_of_their_own_in_the_help() -> None:
    shown = train("submit", "--help").stdout
    panels = {GOAT: "--experts", LORAM: "--pruning", S2FT: "--o-share", LORA: "--rslora", RANK: "--rank"}
    for panel, flag in (panels | {START: "--from", LOQT: "--keep-moments"}).items():
        begin = shown.index(f" {panel} ─")
        assert flag in shown[begin : shown.index("╰", begin)]
    assert "goat|loram|loqt" in re.sub(r"[\s│]+", "", shown)


SPEC = {"dataset": DIGEST, "publish": {"adapter_name": "mine"}}
THERE = SPEC | {"loram": {"alignment": {"dataset": DIGEST}}}


@pytest.mark.parametrize(
    ("method", "flags", "complaint"),
    [
        *(
            (method, flag, f"--method {method} has no {flag[0]}")
            for methods, flags in (
                (("lora", "s2ft", "loram"), (["--experts", "0"], ["--top-k", "0"], ["--rho", "0"],
                    ["--segments", "head"], ["--scale", "alpha"], ["--eta", "0"], ["--rank-for-scale", "total"],
                    ["--balance-loss", "0"])),
                (("lora", "s2ft", "goat"), (["--pruning", "random"], ["--ratio", "0"], ["--layers", "0:1"],
                    ["--pattern", "4:8"], ["--same-cut-as", "a"], ["--align-with", DIGEST], ["--align-steps", "0"],
                    ["--align-learning-rate", "0"], ["--align-batch-size", "0"], ["--align-by-loqt"],
                    ["--align-rank", "0"])),
                (("lora", "s2ft", "goat"), (["--factor-scale", "0"], ["--merge-interval", "0"],
                    ["--merge-schedule", "never"], ["--growth", "0"], ["--compensation-steps", "0"],
                    ["--decomposition", "svd"], ["--optimizer", "adamw"], ["--keep-moments"])),
                (("lora", "s2ft", "goat", "loram"), (["--from", "scratch"],)),
                (("goat", "loram"), (["--o-share", "0"], ["--disjoint-from", "a"])),
                (("goat", "s2ft"), (["--rslora"],)),
                (("s2ft",), (["--dropout", "0"], ["--rank", "0"])),
            )
            for method in methods
            for flag in flags
        ),
        ("goat", ["--segments", "tail"], "tail"),
        ("loram", ["--pruning", "most"], "most"),
        ("loram", ["--align-steps", "1", "--align-batch-size", "2"],
         "--align-with, or leave out --align-steps and --align-batch-size"),
        ("loram", ["--align-by-loqt"], "--align-with, or leave out --align-by-loqt"),
        ("loram", ["--growth", "2"], "--align-by-loqt too, or leave out --growth"),
        ("loram", ["--align-with", DIGEST, "--merge-interval", "2", "--keep-moments"],
         "--align-by-loqt too, or leave out --merge-interval and --keep-moments"),
        ("loram", ["--align-with", DIGEST, "--align-rank", "2"], "--align-by-loqt too, or leave out --align-rank"),
    ],
    ids=lambda value: " ".join(value).replace(DIGEST, "DIGEST") if isinstance(value, list) else "",
)  # fmt: skip
def test_flags_that_fit_nothing_are_refused_by_name_before_anything_is_sent(
    fake: FakeTrainingService, method: str, flags: list[str], complaint: str
) -> None:
    result = train("submit", DIGEST, *USUAL, method, *flags)

    assert (result.exit_code, result.stdout, fake.calls) == (2, "", [])
    assert complaint in result.stderr


@pytest.mark.parametrize(
    ("spec", "flags", "complaint"),
    [
        (SPEC | {"lora": {}}, ["--align-with", DIGEST], "not of the method loram: leave out --align-with"),
        (THERE, ["--align-with", DIGEST], "to align on: leave out --align-with"),
        (THERE, ["--align-steps", "3"], "write --align-steps into"),
        (SPEC | {"goat": {}}, ["--experts", "4"], "write --experts into"),
    ],
    ids=["another method", "text that is there", "steps", "experts"],
)
def test_flags_beside_a_file_that_says_everything_are_refused(
    fake: FakeTrainingService, tmp_path: Path, spec: dict[str, Any], flags: list[str], complaint: str
) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    result = train("submit", "--spec", "spec.json", *flags)

    assert (result.exit_code, result.stdout, fake.calls) == (2, "", [])
    assert complaint in result.stderr


@pytest.mark.parametrize("alignment", [{}, {"alignment": {"steps": 3}}], ids=["nothing of it", "its steps"])
def test_the_text_to_align_on_may_come_beside_a_file(
    fake: FakeTrainingService, tmp_path: Path, alignment: dict[str, Any]
) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(SPEC | {"loram": {"ratio": "1/4"} | alignment}))
    told("submit", "--spec", "spec.json", "--align-with", "plain.jsonl")

    wanted = pb.LoramAlignment(dataset=digest_of(TEXT), steps=3 if alignment else None)
    assert asked(fake).loram == pb.LoramSettings(ratio="1/4", alignment=wanted)


@pytest.mark.parametrize("spec", [spec_with(goat=goat_settings()), spec_with(loram=loram_settings())], ids=str)
def test_a_shown_spec_can_be_submitted_again(fake: FakeTrainingService, tmp_path: Path, spec: pb.TrainingSpec) -> None:
    fake.add_job(spec)
    (tmp_path / "spec.json").write_text(json.dumps(json.loads(told("show", JOB, "--json"))["spec"]))
    told("submit", "--spec", "spec.json")

    assert asked(fake) == spec


def test_the_page_shows_commands_that_are_taken(fake: FakeTrainingService) -> None:
    blocks_shown = (*blocks("training.md", "bash"), *blocks("training.md", "text"))
    shown = [line for block in blocks_shown for line in block.splitlines()]
    commands = [shlex.split(line)[2:] for line in shown if line.startswith("motley train submit ")]
    for number, command in enumerate(commands, 1):
        assert told(*(word for word in command if word != "--watch")) == f"job-{number:016x}\n"
    jobs = [job.spec for job in fake.jobs.values()]
    assert {one.method for one in jobs} >= set(pb.TrainingMethod.values()) - {0, pb.TRAINING_METHOD_S2FT}
    assert any(one.method == pb.TRAINING_METHOD_LORAM and one.quantization == "nf4" for one in jobs)


@pytest.mark.parametrize("flag", ["--ratio", "--layers", "--pattern", "--same-cut-as"])
def test_a_flag_that_says_nothing_is_refused_by_its_name(fake: FakeTrainingService, flag: str) -> None:
    result = train("submit", "motto.jsonl", *USUAL, "loram", flag, "")
    assert (result.exit_code, fake.calls) == (2, [])
    assert f"{flag} says nothing" in result.stderr
