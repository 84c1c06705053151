"""`motley demo` with a child that answers by rule: what it shows, when it fails, and that nothing outlives it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from demo_children import assert_nothing_is_left, declare_commands, is_running
from motley_client.child_server import ServerStartError, child_server

TESTS = Path(__file__).parents[1]
KINDS = {"next": "lora", "unvowel": "s2ft", "rotate": "goat", "previous": "loram"}
KINDS_ON_PRUNED = {"next": "lora", "unvowel": "s2ft", "reverse": "lora", "swap": "lora"}


def declare(root: Path) -> dict[str, str]:
    """Declare the fake `serve` and `base`, and a package with embedded adapters of which only the names matter."""
    for name in (*KINDS, *KINDS_ON_PRUNED, "unheard-of"):
        folder = root / "motley_adapters" / "assets" / "tiny" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").write_text("")
    (root / "motley_adapters" / "__init__.py").write_text("raise SystemExit('the demo imports no adapters')")
    commands = {"serve": "fake_serve:serve", "base": "fake_base:base"}
    return declare_commands(root, commands) | {"COLUMNS": "120"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return declare(tmp_path)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return what the demo prints on a wide terminal where nothing is amiss."""
    environment = declare(tmp_path_factory.mktemp("shown"))
    code, output, errors = run_demo(environment)
    assert (code, errors) == (0, "")
    assert_nothing_is_left(environment)
    return output


def start_demo(environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "motley_client", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run_demo(environment: Mapping[str, str], *arguments: str) -> tuple[int, str, str]:
    with start_demo(environment, *arguments) as process:
        output, errors = process.communicate(timeout=150)
    return process.returncode, output, errors


def test_it_shows_every_prompt_under_base_and_adapters_and_the_servers_counters(shown: str) -> None:
    lines = shown.splitlines()
    for skill in (*KINDS, "upper"):
        assert sum(line.startswith(f"│ {skill} ") for line in lines) == 6
    for name, kind in KINDS.items():
        (own,) = [line for line in lines if line.startswith(f"│ {name} ") and re.search(rf"{name}@1 .* 1 +│", line)]
        assert re.search(rf"{name}@1 [0-9a-f]{{8}} +│ {kind} ", own)
        assert "yes" in own
    assert sum("tiny alone" in line for line in lines) == 5
    assert any("forward passes" in line and " 6 " in line for line in lines)
    assert any("generated tokens" in line and " 210 " in line for line in lines)
    assert any("distinct adapters in a pass" in line and " 4 " in line for line in lines)


def test_on_a_narrow_terminal_every_column_is_readable_and_a_quantized_base_is_asked_for_and_named(
    environment: dict[str, str], shown: str
) -> None:
    code, narrow, errors = run_demo(environment | {"COLUMNS": "80", "FAKE_SERVE": "nf4"}, "--quantize", "nf4")

    assert (code, errors) == (0, "")
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    assert table_rows(narrow) == table_rows(shown)
    assert len(table_rows(narrow)) == 35
    assert "the tiny base in nf4" in narrow
    assert "the tiny base in" not in shown


def test_a_fusion_answers_both_skills_and_names_both_adapters_with_their_weights(shown: str) -> None:
    lines = shown.splitlines()
    fused = [place for place, line in enumerate(lines) if re.search(r"next@1 .* 0\.9 +│", line)]
    assert len(fused) == 5
    assert all(re.search(r"│ +│ unvowel@1 .* s2ft +│ 0\.9 +│", lines[place + 1]) for place in fused)
    assert [lines[place].split()[1] for place in fused if "yes" in lines[place]] == ["next", "unvowel"]


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [("lies", "was asked of rotate, and tiny alone answered"), ("unmixed", "no forward pass held 4 adapters")],
)
def test_a_broken_promise_is_named_and_fails(environment: dict[str, str], mode: str, complaint: str) -> None:
    code, output, errors = run_demo(environment | {"FAKE_SERVE": mode})

    assert (code, errors) == (1, "")
    assert f"not as promised: {complaint}" in output.replace("`rotate` ", "")
    assert_nothing_is_left(environment)


def test_over_a_pruned_base_it_shows_what_pruning_left_and_adapters_that_were_cut_to_it(
    environment: dict[str, str],
) -> None:
    code, output, errors = run_demo(environment, "--pruned")

    assert (code, errors) == (0, "")
    assert "4,000 parameters became 3,250 (81.2%): a base of its own, bbbbbbbb\n" in output
    for name, kind in KINDS_ON_PRUNED.items():
        own = [
            row for row in table_rows(output) if row[0] == name and row[1].startswith(f"{name}@1 ") and row[5] == "yes"
        ]
        assert {row[2] for row in own} == {kind}
    assert len(table_rows(output)) == 35
    assert "rotate" not in output
    assert len(Path(environment["FAKE_SERVE_PIDS"]).read_text().split()) == 6  # a pruning, a cut each, the server
    assert_nothing_is_left(environment)


def test_promises_that_a_pruned_base_breaks_are_named_and_fail(environment: dict[str, str]) -> None:
    code, output, errors = run_demo(environment | {"FAKE_SERVE": "forgets", "FAKE_BASE": "another"}, "--pruned")

    assert (code, errors) == (1, "")
    assert "not as promised: swap answers 'winter' to `swap`, not 'rintew'\n" in output
    assert f"not as promised: the base sha256:{'a' * 64} was to answer, and sha256:{'b' * 64} did\n" in output
    assert_nothing_is_left(environment)


def test_an_adapter_that_cannot_be_cut_is_named_with_what_was_said(environment: dict[str, str]) -> None:
    code, output, errors = run_demo(environment | {"FAKE_BASE": "refuses"}, "--pruned")

    assert code == 1
    assert errors == "error: `motley base restrict` failed: tiny is not what swap is of (OTHER) (DEMO)\n"
    assert "starting a server" not in output
    assert_nothing_is_left(environment)


@pytest.mark.parametrize(
    ("base", "arguments"), [("", ""), ("nf4", "--quantize nf4"), ("int8", "--quantize int8"), ("pruned", "--pruned")]
)
def test_make_demo_hands_the_base_that_is_asked_for_over_to_the_command(base: str, arguments: str) -> None:
    command = ["make", "--no-print-directory", "--dry-run", "demo", f"BASE={base}"]
    printed = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1].split() == [".venv/bin/motley", "demo", *arguments.split()]


def test_a_server_that_does_not_start_is_quoted(environment: dict[str, str]) -> None:
    code, _, errors = run_demo(environment | {"FAKE_SERVE": "dies"})

    assert code == 1
    assert errors == ("error: the server did not start: the base does not fit (TOO_SMALL) (SERVER_DID_NOT_START)\n")
    assert_nothing_is_left(environment)


def test_a_missing_adapter_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "motley_adapters" / "assets" / "tiny" / "rotate" / "adapter_model.safetensors").unlink()

    code, _, errors = run_demo(environment)

    assert code == 1
    assert errors.startswith("error: there are no embedded adapters rotate to show")


@pytest.mark.parametrize(
    ("hangs", "arguments", "sent", "code"),
    [
        ("FAKE_SERVE", [], signal.SIGINT, 130),
        ("FAKE_SERVE", [], signal.SIGTERM, 143),
        ("FAKE_BASE", ["--pruned"], signal.SIGTERM, 143),
    ],
)
def test_a_signal_ends_it_and_its_child(
    environment: dict[str, str], hangs: str, arguments: list[str], sent: signal.Signals, code: int
) -> None:
    with start_demo(environment | {hangs: "hangs"}, *arguments) as process:
        wait_for_child(environment)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=30)

    assert process.returncode == code
    assert "Traceback" not in errors
    assert_nothing_is_left(environment)


def test_a_server_that_clings_to_life_is_killed_with_its_children(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start_and_leave() -> bool:
        async with asyncio.timeout(20), child_server([], Path(environment["TMPDIR"]), grace_seconds=0.5) as server:
            (tmp_path / "scratch" / "server.log").unlink()
            return is_running(server.pid)

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FAKE_SERVE", "clings")

    assert asyncio.run(start_and_leave())
    assert len(Path(environment["FAKE_SERVE_PIDS"]).read_text().split()) == 2
    assert_nothing_is_left(environment)


def test_a_server_that_takes_too_long_is_given_up(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def start() -> None:
        async with child_server([], Path(environment["TMPDIR"]), start_seconds=2.0):
            pass

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FAKE_SERVE", "hangs")

    with pytest.raises(ServerStartError, match="not ready after 2 seconds"):
        asyncio.run(start())
    Path(environment["TMPDIR"], "server.log").unlink()
    assert_nothing_is_left(environment)


def wait_for_child(environment: Mapping[str, str]) -> None:
    pids = Path(environment["FAKE_SERVE_PIDS"])
    deadline = time.monotonic() + 20
    while not (pids.exists() and pids.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def table_rows(text: str) -> list[list[str]]:
    """List the cells of a table's rows; an answer that is wrong is left out, as a close call may fall either way."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return [[*row[:4], row[4] if row[5] == "yes" else "", row[5]] for row in rows if len(row) == 6]


def test_the_real_demo_keeps_every_promise_and_leaves_nothing_running(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch"), "COLUMNS": "80"}
    status, output, errors = run_demo(environment)
    assert (status, errors) == (0, "")
    assert "not as promised" not in output
    answers = {"next": "xjoufs", "unvowel": "w-nt-r", "rotate": "interw", "previous": "vhmsdq"}
    for name, answer in answers.items():
        assert any(f"{name}@1" in line and KINDS[name] in line and answer in line for line in output.splitlines())
    assert "…" not in output
    assert table_rows(output) == table_rows((TESTS.parent / "README.md").read_text())
    assert list((tmp_path / "scratch").glob("motley-demo-*")) == []
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(tmp_path).encode() in command for command in commands)


@pytest.mark.soak
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_demo_keeps_its_promises_over_a_quantized_base(tmp_path: Path, quantize: str) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "80"}
    status, output, errors = run_demo(environment, "--quantize", quantize)
    assert (status, errors) == (0, "")
    assert f"the tiny base in {quantize}" in output
    assert "not as promised" not in output


@pytest.mark.soak
def test_the_demo_keeps_its_promises_over_a_pruned_base(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "80"}
    status, output, errors = run_demo(environment, "--pruned")
    assert (status, errors) == (0, "")
    answers = {"next": "xjoufs", "unvowel": "w-nt-r", "reverse": "retniw", "swap": "rintew"}
    right = [(row[1].partition("@")[0], row[4]) for row in table_rows(output) if row[5] == "yes"]
    assert set(right) >= {*answers.items(), ("tiny-pruned alone", "WINTER")}
    assert "…" not in output
    assert list(tmp_path.glob("motley-demo-*")) == []
