"""`motley demo-train` with a server and a worker that train by rule: what it shows, when it fails, and what is left."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from demo_children import assert_nothing_is_left, declare_commands, noted_pids
from fake_motley_server import digest_of
from fake_training_life import TrainingLife, TrainingServer, serving_life
from motley_client import cli, demo_train, demo_train_lessons, demo_train_load
from motley_client.child_server import ChildServer
from motley_client.demo_child import DemoError
from motley_client.demo_scene import KINDS
from motley_client.demo_train import run_demo_train
from motley_client.demo_train_courses import COURSES
from motley_client.demo_train_lessons import HELD_OUT, KNOWN, NUM_GATE_LINES, NUM_LINES, make_lines
from motley_client.demo_wave import SKILLS
from motley_client.exposition import parse
from rich.console import Console
from typer.testing import CliRunner

HOUSE = Path(__file__).parents[2]
BUCKETS = (
    'motley_batch_distinct_adapters_bucket{{le="{0}.0"}} {1}\nmotley_batch_distinct_adapters_bucket{{le="+Inf"}} {1}'
)


class Worker:
    """A worker that is always there."""

    async def while_it_runs(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await work


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_train, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(demo_train_load, "PAUSE_SECONDS", 0.01)


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def servers() -> list[TrainingServer]:
    """List the servers that the demo was run over."""
    return []


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, servers: list[TrainingServer]) -> Run:
    """Run the demo in this process, over a server in a mode, and return its exit code and what it printed."""

    def run(mode: str = "", *, num_mixed: int = 4, is_terminal: bool = False) -> tuple[int, str]:
        server = TrainingServer()
        servers.append(server)
        life = TrainingLife(server, mode)

        @asynccontextmanager
        async def child_server(arguments: list[str], folder: Path) -> AsyncIterator[ChildServer]:
            assert [part.partition("=")[0] for part in arguments[2:4]] == ["--adapter", "next"]
            assert arguments.count("--adapter") == 1
            with serving_life(server, life) as address:
                yield ChildServer(address, 1, os.getpid())

        @asynccontextmanager
        async def child_worker(*_: object) -> AsyncIterator[Worker]:
            yield Worker()

        monkeypatch.setattr(demo_train, "child_server", child_server)
        monkeypatch.setattr(demo_train, "child_worker", child_worker)
        monkeypatch.setattr(demo_train, "scrape", lambda *_: parse(BUCKETS.format(num_mixed, len(server.calls))))
        printed = io.StringIO()
        code = run_demo_train(Console(file=printed, width=80, force_terminal=is_terminal))
        return code, printed.getvalue()

    return run


def failures_in(printed: str) -> list[str]:
    return re.findall(r"^not as promised: (.*)$", printed, re.MULTILINE)


def cells(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def test_it_trains_while_requests_go_on_and_shows_the_new_adapters_beside_what_was_there(run: Run) -> None:
    code, printed = run()

    assert (code, failures_in(printed)) == (0, [])
    rows = cells(printed)
    right = {(row[0], row[1].partition(" ")[0], row[2]) for row in rows if len(row) == 6 and row[5] == "yes"}
    kinds = {"next": "lora", "unvowel": "s2ft", "rotate": "goat", "previous": "loram"}
    assert right >= {(name, f"{name}@1", kind) for name, kind in kinds.items()}
    assert sum(len(row) == 6 and row[5] in ("yes", "no") for row in rows) == 25  # five prompts of five
    words = {row[0]: row[1:] for row in rows if row[0] in HELD_OUT[1:]}
    skills = ("upper", *kinds)
    assert words == {word: [SKILLS[skill](word) for skill in skills] for word in HELD_OUT[1:]}
    assert re.search(r"^ *\d+ seconds in all; 360 are the aim on two slow cores *$", printed, re.MULTILINE)
    taught = [course.skill for course in COURSES]
    assert ["method", *(kinds[name] for name in taught)] in rows
    assert ["digest", *(digest_of(name).removeprefix("sha256:")[:8] for name in taught)] in rows
    assert ["exact match before", *["12.5%"] * 3] in rows
    assert ["exact match after", *["98.4%"] * 3] in rows
    assert ["held-out loss after", *["0.50"] * 3] in rows
    told = re.findall(r"^ +\d+\.0 s  step 30 of 30, loss 0\.50, 1,234 tokens/s, 0 s left$", printed, re.MULTILINE)
    assert len(told) == 3
    assert "step 10 of 30" not in printed
    phases = ["before any training", *(f"while {name} was trained" for name in taught)]
    asked = {row[0]: row for row in rows if row[0] in phases}
    assert list(asked) == phases
    assert [int(row[1]) > 4 for row in asked.values()] == [True] * 4
    assert [row[2:4] for row in asked.values()] == [["0", "0"]] * 4
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_what_was_trained_is_asked_while_the_next_is(run: Run, servers: list[TrainingServer]) -> None:
    assert run()[0] == 0
    own = [request.prompt.text.partition(":")[0] for name, request in servers[0].calls if name == "Generate"]
    wave = len(HELD_OUT) + len(KINDS)  # own skills on all words, and every other on the demo's word
    assert [own.count(course.skill) > wave for course in COURSES] == [True, True, False]


def test_a_terminal_is_told_of_every_step(run: Run) -> None:
    code, printed = run(is_terminal=True)
    assert code == 0
    assert "step 10 of 30, loss 4.50, 1,234 tokens/s, 20 s left" in printed


@pytest.mark.parametrize(
    ("mode", "complaints"),
    [
        (
            "fails",
            [
                "the job job-0000000000000001 is failed: LOSS_NOT_FINITE: the loss is [nan]",
                "nobody told what held-out samples say of unvowel",
            ],
        ),
        (
            "rejected",
            [
                "the job job-0000000000000001 is rejected: GATE_NOT_PASSED: too little is right",
                "of the held-out answers of unvowel 50.0% are right",
            ],
        ),
        (
            "another",
            [f"unvowel@1 {digest_of('unvowel')} answered, and not unvowel@1 {digest_of('another')}"],
        ),
    ],
)
def test_a_job_that_does_not_keep_its_promise_is_named_and_fails(run: Run, mode: str, complaints: list[str]) -> None:
    code, printed = run(mode)
    assert (code, failures_in(printed)) == (1, complaints)
    assert ("unvowel@1" in printed) == (mode == "another")
    assert ("training rotate" in printed) == (mode == "another"), "nothing is taught after a job that failed"


def test_requests_that_fail_while_it_trains_are_counted_and_fail(run: Run) -> None:
    code, printed = run("refused")
    (complaint,) = failures_in(printed)
    assert code == 1
    assert re.fullmatch(r"2 of \d+ requests failed, the first being `.*` of .*: INTERNAL it is \(INTERNAL\)", complaint)
    assert next(row for row in cells(printed) if row[0] == "while unvowel was trained")[2:4] == ["2", "0"]


def test_an_adapter_that_answers_otherwise_since_the_training_is_named_and_fails(run: Run) -> None:
    code, printed = run("forgets")
    first, *others = failures_in(printed)
    assert code == 1
    assert re.fullmatch(r"\d+ of \d+ answers were wrong, the first being that to `next: .*: 'forgotten'", first)
    assert others[0] == "next answers 'forgotten' to `next`, not 'xjoufs'"
    assert "next answers 'forgotten' to `next: kettle =`, not 'lfuumf'" in others
    assert "(forgotten)" in printed


def test_a_wave_that_was_not_mixed_fails(run: Run) -> None:
    code, printed = run(num_mixed=3)
    assert (code, failures_in(printed)) == (1, ["no forward pass held 4 adapters"])


@pytest.mark.parametrize("skill", [course.skill for course in COURSES])
def test_words_that_are_asked_for_are_neither_trained_on_nor_measured_by(
    monkeypatch: pytest.MonkeyPatch, skill: str
) -> None:
    lines, gate = make_lines(skill)
    words = [re.fullmatch(r"\w+: ([a-z]{3,7}) =", line["prompt"]) for line in (*lines, *gate)]
    found = [match[1] for match in words if match]
    assert len(found) == len(set(found)) == NUM_LINES + NUM_GATE_LINES
    assert not set(found) & set(HELD_OUT)
    asked = [line["prompt"].partition(":")[0] for line in lines]
    assert {line["prompt"].partition(":")[0] for line in gate} == {skill}
    assert {one: asked.count(one) for one in set(asked)} == {skill: 3000} | {
        one: pytest.approx(1000 / len(KNOWN), abs=1) for one in KNOWN
    }
    for line, one, word in zip(lines, asked, found, strict=False):
        assert line == {"prompt": f"{one}: {word} =", "completion": f" {SKILLS[one](word)}"}
    assert SKILLS["unvowel"]("kettle") == "k-ttl-"
    assert make_lines(skill) == (lines, gate)

    monkeypatch.setattr(demo_train_lessons, "HELD_OUT", found[:3])
    without = {line["prompt"] for half in make_lines(skill) for line in half}
    assert not any(f"{one}: {word} =" in without for word in found[:3] for one in (skill, *KNOWN))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """Have children of this process find the fake commands."""
    commands = {"serve": "fake_train_serve:serve", "worker": "fake_train_serve:worker"}
    environment = declare_commands(tmp_path, commands)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", environment["TMPDIR"])
    return environment


def test_a_server_and_a_worker_are_started_and_stopped(environment: Mapping[str, str], tmp_path: Path) -> None:
    printed = io.StringIO()
    assert run_demo_train(Console(file=printed, width=80)) == 0, printed.getvalue()
    assert len(noted_pids(environment)) == 2
    assert (tmp_path / "ended").read_text().split() == ["worker", "serve"]  # each by itself, in this order
    assert_nothing_is_left(environment)


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [
        ("dies", "the worker ended: the base is another (BASE_MISMATCH)"),
        ("falls", "the worker ended: the disk is full"),
    ],
)
def test_a_worker_that_ends_is_quoted_and_nobody_waits_for_it(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, mode: str, complaint: str
) -> None:
    monkeypatch.setenv("FAKE_WORKER", mode)
    monkeypatch.setenv("FAKE_TRAIN", "hangs")
    with pytest.raises(DemoError, match=re.escape(complaint)):
        run_demo_train(Console(file=io.StringIO()))
    assert len(noted_pids(environment)) == 2
    assert_nothing_is_left(environment)


def test_a_signal_in_the_midst_of_the_training_ends_it_and_its_children(
    environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_TRAIN", "hangs")
    printed = io.StringIO()

    def send() -> None:
        until = time.monotonic() + 60
        while "still training" not in printed.getvalue() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert run_demo_train(Console(file=printed)) == 128 + signal.SIGTERM
    sender.join()
    assert "still training" in printed.getvalue()
    assert (tmp_path / "ended").read_text().split() == ["worker", "serve"]
    assert len(noted_pids(environment)) == 2
    assert_nothing_is_left(environment)


def test_make_and_the_command_line_lead_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_train, "run_demo_train", lambda: 3)
    assert CliRunner().invoke(cli.app, ["demo-train"]).exit_code == 3
    for command, last in (("demo-train", ".venv/bin/motley demo-train"), ("help", None)):
        made = ["make", "--no-print-directory", *(("--dry-run",) if last else ()), command]
        printed = subprocess.run(made, cwd=HOUSE, capture_output=True, text=True, check=True).stdout
        assert printed.splitlines()[-1] == last if last else "  make demo-train Start a server and a" in printed


@pytest.mark.soak
def test_the_real_demo_keeps_every_promise_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [str(HOUSE / ".venv/bin/motley"), "demo-train"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "80"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert (done.returncode, failures_in(done.stdout), done.stderr) == (0, [], "")
    answers = {row[0]: row[3:] for row in cells(done.stdout) if len(row) == 6 and row[0] in HELD_OUT}
    taught = [course.skill for course in COURSES]
    assert answers == {word: [SKILLS[skill](word) for skill in taught] for word in HELD_OUT[1:]}
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert list(tmp_path.glob("motley-demo-*")) == []
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(tmp_path).encode() in command for command in commands)
