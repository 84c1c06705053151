"""Every command, script and configuration in the documents is run here, or named here with whoever runs it.

Clients' commands and scripts run against one server with the embedded base and adapters; `motley serve` is run with
`--print-config`, which resolves everything and starts nothing.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_servers import blocking_forked_server
from motley_client import cli
from motley_client import settings as client_settings
from motley_client.endpoint import DEFAULT_ADDRESS
from motley_server import config as server_config
from typer.testing import CliRunner

HOUSE = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
EMBEDDED = HOUSE / "adapters" / "motley_adapters" / "assets" / "tiny"
DOCUMENTS = sorted([*HOUSE.glob("*.md"), *(HOUSE / "docs").rglob("*.md")])
# Each block stands on those before it: tests/integration/test_docs_publish.py and test_docs_training.py run these.
IN_ORDER = {HOUSE / "docs" / "publish.md", HOUSE / "docs" / "training.md"}

# Commands that no test of this file runs, and why that is enough. `make TARGET` is checked to be a target.
ACCOUNTED = {
    "make install": "this very environment",
    "make demo": "tests/integration/test_cli_demo.py runs `motley demo`, the target's one line",
    "make serve": "`motley serve` is the server of this file",
    "make check": ".ci/run",
    "make test": "this very run",
    "make soak": "minutes",
    "make bench": "minutes",
    "make quality": "minutes; tests/unit/test_quality.py compares its page with the committed results",
    "make gpu": "a machine with a GPU",
    "docker build -t motley .": "`make check` lints the Dockerfile",
}


def _blocks(document: Path) -> list[tuple[str, str]]:
    """List the fenced blocks of a document as (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def _commands(document: Path) -> list[str]:
    """List a document's shell commands, continued lines joined and comments dropped."""
    text = "\n".join(block for language, block in _blocks(document) if language == "bash")
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def _is_serve(command: str) -> bool:
    return "motley serve" in command


COMMANDS = sorted({command for document in DOCUMENTS if document not in IN_ORDER for command in _commands(document)})
RUN = [command for command in COMMANDS if command not in ACCOUNTED and not _is_serve(command)]
SERVE = [command for command in COMMANDS if _is_serve(command)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the embedded base and adapters on a free port, and give its address."""
    folder = tmp_path_factory.mktemp("docs")
    adapters = [f"--adapter={path.name}={path}" for path in sorted(EMBEDDED.iterdir()) if path.is_dir()]
    arguments = ["--base", "tiny", "--metrics", "127.0.0.1:0", "--data-dir", str(folder / "data"), *adapters]
    with blocking_forked_server(arguments, folder) as server:
        yield server.address


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOTLEY_")}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{kept['PATH']}"}


@pytest.mark.parametrize("command", RUN)
def test_a_documented_command_works(server: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shlex.split(command)[0] in {"motley", ".venv/bin/motley"}, "neither a command of ours nor accounted for"
    monkeypatch.chdir(HOUSE)
    for name in [name for name in os.environ if name.startswith("MOTLEY_")]:
        monkeypatch.delenv(name)
    words = shlex.split(command.replace("127.0.0.1:8470", server))
    result = CliRunner().invoke(cli.app, words[1:], prog_name="motley", env={"MOTLEY_SERVER": server})
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.strip()


def test_every_accounted_command_is_in_a_document() -> None:
    assert set(ACCOUNTED) - set(COMMANDS) == set()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_a_documented_target_exists(command: str) -> None:
    result = subprocess.run(["make", "-n", *command.split()[1:]], cwd=HOUSE, capture_output=True, check=False)
    assert result.returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(HOUSE)))
def test_every_block_says_what_it_is(document: Path) -> None:
    assert {language for language, _ in _blocks(document)} <= {"bash", "python", "text", "toml", "yaml"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(HOUSE)))
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [link for link in links if not link.startswith("https://")]
    assert [link for link in local if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(HOUSE)))
def test_every_file_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|proto|md|toml|yml|sh))`", document.read_text())
    assert [path for path in named if not (HOUSE / path).exists()] == []


@pytest.mark.parametrize(
    ("document", "block"),
    [
        (document, block)
        for document in DOCUMENTS
        if document not in IN_ORDER
        for language, block in _blocks(document)
        if language == "python"
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "block",
)
def test_a_documented_script_runs(server: str, document: Path, block: str) -> None:
    source = block.replace("127.0.0.1:8470", server)
    result = subprocess.run(
        [sys.executable, "-c", source], env=_environment(), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", SERVE)
def test_a_documented_server_resolves_its_configuration(command: str) -> None:
    words = [*shlex.split(command), "--print-config"]
    result = subprocess.run(words, cwd=HOUSE, env=_environment(), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "block",
    [block for document in DOCUMENTS for language, block in _blocks(document) if language == "toml"],
    ids=lambda block: block.splitlines()[0],
)
def test_a_documented_configuration_is_read(tmp_path: Path, block: str) -> None:
    file = tmp_path / "motley.toml"
    file.write_text(block)
    if block.startswith("server = "):
        assert client_settings.read_file(file)
    else:
        assert server_config.resolve({}, file=file) != server_config.resolve({})


def test_the_default_addresses_are_the_same_everywhere() -> None:
    defaults = server_config.resolve({})
    assert defaults.metrics is not None
    assert str(defaults.listen) == DEFAULT_ADDRESS
    makefile, dockerfile = (HOUSE / "Makefile").read_text(), (HOUSE / "Dockerfile").read_text()
    assert f"LISTEN ?= {defaults.listen}\nMETRICS ?= {defaults.metrics}\n" in makefile
    assert f"EXPOSE {defaults.listen.port} {defaults.metrics.port}\n" in dockerfile
    assert f"MOTLEY_LISTEN=0.0.0.0:{defaults.listen.port} " in dockerfile
    assert f"MOTLEY_METRICS=0.0.0.0:{defaults.metrics.port} " in dockerfile
    assert f'targets: ["{defaults.metrics}"]' in (HOUSE / "deploy" / "prometheus" / "prometheus.yml").read_text()
