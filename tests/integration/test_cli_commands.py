"""`motley generate`, `score` and `info` against a server that answers by rule: what is printed, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fake_motley_server import BASE_FINGERPRINT, FakeServer, digest_of, rich_status, serving
from google.rpc import error_details_pb2
from motley_client.cli import app
from typer.testing import CliRunner, Result


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def address(fake: FakeServer) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("MOTLEY_SERVER", raising=False)
    monkeypatch.delenv("MOTLEY_KEY", raising=False)


def motley(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def motley_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "motley_client", *arguments], capture_output=True, text=True)


def test_generate_prints_the_text_and_a_newline(address: str) -> None:
    result = motley_process("generate", "reverse: stone =", "--server", address, "--adapter", "reverse")

    assert (result.returncode, result.stdout, result.stderr) == (0, " enots\n", "")


def test_generate_prints_text_before_the_answer_is_complete(fake: FakeServer, address: str) -> None:
    fake.hold = True
    command = [sys.executable, "-m", "motley_client", "generate", "upper: stone =", "--server", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b" "
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)

    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert fake.was_cancelled.is_set()


def test_generate_json_has_exactly_these_keys(address: str) -> None:
    result = motley_process("generate", "reverse: ab =", "--server", address, "--adapter", "reverse=0.5", "--json")

    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "text": " ba",
        "token_ids": [32, 98, 97],
        "logprobs": [-0.5, -0.5, -0.5],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "cached_prompt_tokens": 2},
        "served_by": {
            "base_model": "tiny",
            "base_fingerprint": BASE_FINGERPRINT,
            "adapters": [
                {
                    "name": "reverse",
                    "version": 1,
                    "digest": digest_of("reverse"),
                    "weight": 0.5,
                    "trained_on": "undeclared",
                    "kind": "lora",
                    "overlapping_channels": 0,
                }
            ],
        },
    }


def test_channels_that_adapters_share_are_noted_on_stderr_and_in_json(address: str) -> None:
    sets = ["--server", address, "--adapter", "s2ft-a", "--adapter", "reverse", "--adapter", "s2ft-b"]
    note = "note: s2ft-{}@1 (s2ft) shares 3 channels with the others\n"

    generated, scored = motley("generate", "reverse: ab =", *sets), motley("score", "is it? ", "yes", *sets)
    assert (generated.exit_code, generated.stdout) == (0, " ba\n")
    assert (scored.exit_code, scored.stdout) == (0, "-1.5000\tyes\n")
    assert generated.stderr == scored.stderr == note.format("a") + note.format("b")

    for command in (("generate", "reverse: ab ="), ("score", "is it? ", "yes")):
        result = motley(*command, *sets, "--json")
        served = json.loads(result.stdout)["served_by"]["adapters"]
        assert [(one["kind"], one["overlapping_channels"]) for one in served] == [("s2ft", 3), ("lora", 0), ("s2ft", 3)]
        assert result.stderr == ""


def test_generate_sends_every_flag(fake: FakeServer, address: str) -> None:
    flags = ["--max-new-tokens", "5", "--temperature", "0.7", "--seed", "11", "--ignore-eos", "--chat", "--key", "mk_a"]
    result = motley("generate", "hi", "--server", address, "--adapter", "a=2", "--adapter", "b@prod", *flags)

    assert result.exit_code == 0, result.output
    ((_, sent),) = fake.calls
    assert [(one.name, one.weight) for one in sent.adapters] == [("a", 2.0), ("b@prod", 1.0)]
    assert (sent.sampling.max_new_tokens, sent.sampling.temperature, sent.sampling.seed) == (5, 0.7, 11)
    assert sent.sampling.ignore_eos
    assert [(turn.role, turn.content) for turn in sent.prompt.chat.messages] == [("user", "hi")]
    assert fake.metadata[0]["authorization"] == "Bearer mk_a"


def test_generate_leaves_unsaid_flags_unset(fake: FakeServer, address: str) -> None:
    assert motley("generate", "hi", "--server", address).exit_code == 0

    ((_, sent),) = fake.calls
    assert sent.prompt.text == "hi"
    assert sent.sampling.ByteSize() == 0


def test_score_prints_a_line_for_each_continuation(address: str) -> None:
    result = motley("score", "is it? ", "yes", "perhaps", "--server", address)

    assert (result.exit_code, result.stdout) == (0, "-1.5000\tyes\n-3.5000\tperhaps\n")


def test_score_json_keeps_tokens_and_what_served(address: str) -> None:
    result = motley("score", "is it? ", "yes", "no", "--server", address, "--adapter", "reverse", "--json")

    found = json.loads(result.stdout)
    assert set(found) == {"scores", "usage", "served_by"}
    assert found["scores"][0] == {
        "continuation": "yes",
        "logprob": -1.5,
        "is_greedy": True,
        "token_ids": [121, 101, 115],
        "logprobs": [-0.5, -0.5, -0.5],
    }
    assert found["served_by"]["adapters"][0]["name"] == "reverse"


def test_info_names_base_kinds_and_limits(address: str) -> None:
    plain = dict(
        line.split(maxsplit=1) for line in motley("info", "--server", address).stdout.splitlines() if line[26:]
    )
    found = json.loads(motley("info", "--server", address, "--json").stdout)

    assert (plain["base_fingerprint"], plain["adapter_kinds"]) == (BASE_FINGERPRINT, "lora")
    assert (found["base_model"], found["limits"]["context_length"]) == ("tiny", 256)
    assert "adapters" not in found


def test_a_refusal_is_one_line_on_stderr_and_exit_code_1(fake: FakeServer, address: str) -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sampling.max_new_tokens", description="must be at least 1")
    info = error_details_pb2.ErrorInfo(reason="OUT_OF_RANGE", domain="motley.dev")
    fake.failures.append(rich_status(grpc.StatusCode.INVALID_ARGUMENT, "at least 1,\nnot 0", info, bad))

    result = motley_process("generate", "x", "--server", address, "--max-new-tokens", "0")

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: at least 1, not 0 (OUT_OF_RANGE, field sampling.max_new_tokens)\n"


def test_a_failure_in_midstream_leaves_the_text_on_a_line_of_its_own(fake: FakeServer, address: str) -> None:
    info = error_details_pb2.ErrorInfo(reason="SLOW_READER", domain="motley.dev")
    fake.fails_in_stream = rich_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow", info)

    result = motley("generate", "upper: stone =", "--server", address)

    assert (result.exit_code, result.stdout, result.stderr) == (1, " \n", "error: too slow (SLOW_READER)\n")


def test_a_server_that_goes_away_in_midstream_is_one_line_and_exit_code_3(fake: FakeServer) -> None:
    fake.hold = True
    with serving(fake) as address:
        command = [sys.executable, "-m", "motley_client", "generate", "upper: stone =", "--server", address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stdout is not None
        assert process.stdout.read(1) == b" "
    with process:
        output, errors = process.communicate(timeout=20)

    assert (process.returncode, output) == (3, b"\n")
    assert errors.startswith(f"error: no server answers at {address}".encode())
    assert errors.count(b"\n") == 1


def test_a_number_that_no_field_holds_is_a_typed_error(address: str) -> None:
    result = motley("generate", "x", "--server", address, "--max-new-tokens", str(2**40))

    assert result.exit_code == 1
    assert result.stderr.startswith("error: sampling.max_new_tokens: ")
    assert result.stderr.endswith("(INVALID_VALUE, field sampling.max_new_tokens)\n")


def test_bytes_that_are_no_text_are_a_typed_error(address: str) -> None:
    command = [sys.executable.encode(), b"-m", b"motley_client", b"generate", b"\xff", b"--server", address.encode()]
    result = subprocess.run(command, capture_output=True, text=True)

    assert result.returncode == 1
    assert result.stderr.endswith("(INVALID_VALUE, field prompt.text)\n")


@pytest.mark.parametrize("command", [["generate", "x"], ["generate", "x", "--json"], ["score", "x", "y"], ["info"]])
def test_no_server_is_exit_code_3(command: list[str]) -> None:
    result = motley(*command, "--server", "127.0.0.1:1")

    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("error: no server answers at 127.0.0.1:1")
    assert result.stderr.endswith("(UNREACHABLE)\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x", "--no-such-flag"],
        ["generate", "x", "--adapter", "a=heavy"],
        ["generate", "x", "--seed", "now"],
        ["generate", "x", "--server", "nowhere"],
        ["generate", "x", "--ca-file", "/no/such/file.pem"],
        ["score", "x"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = motley(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr


def test_server_and_key_come_from_flags_then_environment_then_the_file(
    fake: FakeServer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "motley").mkdir()
    (tmp_path / "motley" / "config.toml").write_text(f'server = "{address}"\nkey = "of-file"\n')

    assert motley("info").exit_code == 0
    monkeypatch.setenv("MOTLEY_KEY", "of-environment")
    assert motley("info").exit_code == 0
    assert motley("info", "--key", "of-flag").exit_code == 0
    monkeypatch.setenv("MOTLEY_SERVER", "127.0.0.1:1")
    assert motley("info").exit_code == 3
    assert motley("info", "--server", address).exit_code == 0

    keys = [sent["authorization"].removeprefix("Bearer ") for sent in fake.metadata]
    assert keys == ["of-file", "of-environment", "of-flag", "of-environment"]


def test_a_bad_config_file_is_exit_code_2_and_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "motley").mkdir()
    (tmp_path / "motley" / "config.toml").write_text('sever = "x:1"\n')

    result = motley("info")

    assert result.exit_code == 2
    assert result.stderr.endswith("unknown key, the nearest is 'server' (BAD_SETTING, field sever)\n")


def test_a_closed_pipe_ends_quietly(address: str) -> None:
    command = [sys.executable, "-m", "motley_client", "info", "--server", address]
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write_end)

    assert result.returncode == 1
    assert "Traceback" not in result.stderr
