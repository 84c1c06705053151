"""`motley serve` up to the moment a base would be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from motley_server import app
from motley_server.commands import serve
from motley_server.config import ServerConfig, resolve
from typer.testing import CliRunner

ISSUE_FLAGS = {
    "--config", "--base", "--listen", "--metrics", "--data-dir", "--dtype", "--adapter", "--print-config", "--help",
    "--auth", "--tls-cert", "--tls-key", "--require-declared-base", "--quantize",
}  # fmt: skip


def run(*arguments: str, environ: dict[str, str] | None = None) -> tuple[int, str, str]:
    root = typer.Typer(add_completion=False)
    root.command()(serve)
    result = CliRunner().invoke(root, arguments, env=environ)
    return result.exit_code, result.stdout, result.stderr


def test_serve_takes_the_flags_that_scripts_rely_on() -> None:
    root = typer.Typer(add_completion=False)
    root.command()(serve)
    command = typer.main.get_command(root)
    options = {option for parameter in command.params for option in parameter.opts}
    assert options | {"--help"} == ISSUE_FLAGS


def test_print_config_shows_what_would_be_served(tmp_path: Path) -> None:
    adapters = ["--adapter", "one=/a", "--adapter", "two=/b"]
    status, out, _ = run("--listen", "127.0.0.1:0", "--dtype", "float32", *adapters, "--print-config")
    file = tmp_path / "printed.toml"
    file.write_text(out, encoding="utf-8")
    config = resolve({}, file=file)
    assert (status, str(config.listen), config.dtype) == (0, "127.0.0.1:0", "float32")
    assert dict(config.adapters) == {"one": Path("/a"), "two": Path("/b")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "int4"], "dtype: 'int4' is none of"),
        (["--listen", "0.0.0.0:1"], "that takes auth = true and tls.cert with tls.key"),
        (["--auth", "--tls-cert", "/c"], "tls.key: not set, though tls.cert is"),
        (["--adapter", "x"], "not NAME=DIR"),
        (["--config", "/nowhere.toml"], "cannot be read"),
    ],
)
def test_a_bad_setting_ends_with_one_line_and_status_2(arguments: list[str], words: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("motley serve: ")
    assert err.count("\n") == 1


def test_auth_is_turned_on_and_off_by_flags() -> None:
    assert "auth = true\n" in run("--auth", "--print-config")[1]
    assert "auth = false\n" in run("--no-auth", "--print-config", environ={"MOTLEY_AUTH": "true"})[1]
    assert "auth = true\n" in run("--print-config", environ={"MOTLEY_AUTH": "true"})[1]


def test_the_environment_is_read_when_serve_runs_and_not_before() -> None:
    assert 'dtype = "bfloat16"' in run("--print-config", environ={"MOTLEY_DTYPE": "bfloat16"})[1]


def test_the_shell_imports_without_torch() -> None:
    code = "import motley_server.app, motley_server.commands, sys; print({'torch', 'transformers'} & set(sys.modules))"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


@pytest.mark.parametrize("error", [app.StartError("base x: y"), OSError("cannot listen on z")], ids=["base", "port"])
def test_a_server_that_cannot_start_ends_with_one_line_and_status_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(config: ServerConfig) -> int:
        raise error

    monkeypatch.setattr(app, "run", fail)
    assert run() == (2, "", f"motley serve: {error}\n")


def test_the_process_is_prepared_before_torch_may_be_loaded() -> None:
    environ = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "7", "HF_HUB_OFFLINE": "0"}
    app.prepare_process(environ, "info")
    assert environ == {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "7", "HF_HUB_OFFLINE": "1"}
    app.prepare_process(unset := dict[str, str](), "info")
    assert unset == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000", "HF_HUB_OFFLINE": "1"}
