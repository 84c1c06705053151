"""Commands of other roots: listed without being imported, loaded when used, and a missing extra is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKING = """
def serve(base: str = "tiny", fail: bool = False) -> None:
    "Serve for real."
    if fail:
        raise TypedError()
    print("serving", base)

class TypedError(Exception):
    message, reason, field = "no room", "NO_ROOM", "kv_cache_bytes"
"""

NOT_INSTALLED = """
import sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "motley_trainer":
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Gone())
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Make a folder for PYTHONPATH with a distribution that declares `serve` and `worker`."""
    declared = tmp_path / "another_motley-1.0.dist-info"
    declared.mkdir()
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: another-motley\nVersion: 1.0\n")
    (declared / "entry_points.txt").write_text(
        "[motley.commands]\nserve = motley_server.commands:serve\nworker = motley_trainer.commands.base:worker\n"
    )
    return tmp_path


def install_server(site: Path, source: str) -> None:
    (site / "motley_server").mkdir()
    (site / "motley_server" / "__init__.py").touch()
    (site / "motley_server" / "commands.py").write_text(source)


def motley(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "motley_client", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_help_lists_them_without_importing_them(site: Path) -> None:
    install_server(site, "raise SystemExit('imported')")

    result = motley(site, "--help")

    assert result.returncode == 0
    for name in ("generate", "score", "info", "demo", "serve", "worker"):
        assert f" {name} " in result.stdout


def test_a_command_is_loaded_and_reads_its_own_flags(site: Path) -> None:
    install_server(site, WORKING)

    ran = motley(site, "serve", "--base", "mine")
    helped = motley(site, "serve", "--help")
    wrong = motley(site, "serve", "--no-such-flag")

    assert (ran.returncode, ran.stdout) == (0, "serving mine\n")
    assert "Serve for real." in helped.stdout
    assert "motley serve" in helped.stdout
    assert wrong.returncode == 2


def test_its_typed_errors_are_one_line_too(site: Path) -> None:
    install_server(site, WORKING)

    result = motley(site, "serve", "--fail")

    assert (result.returncode, result.stderr) == (1, "error: no room (NO_ROOM, field kv_cache_bytes)\n")


@pytest.mark.parametrize(
    "source",
    ["import a_library_of_the_extra", "def serve() -> None:\n    import a_library_of_the_extra"],
    ids=["when loaded", "when run"],
)
def test_a_missing_library_names_the_extra(site: Path, source: str) -> None:
    install_server(site, source)

    result = motley(site, "serve")

    assert result.returncode == 1
    assert result.stderr == "error: serve needs the server extra: pip install 'motley[server]' (MISSING_EXTRA)\n"


def test_a_missing_root_names_the_extra(site: Path) -> None:
    (site / "sitecustomize.py").write_text(NOT_INSTALLED)

    result = motley(site, "worker")

    assert result.returncode == 1
    assert result.stderr == "error: worker needs the train extra: pip install 'motley[train]' (MISSING_EXTRA)\n"


def test_a_module_missing_inside_a_root_is_a_fault_and_no_missing_extra(site: Path) -> None:
    install_server(site, "import motley_server.forgotten")

    result = motley(site, "serve")

    assert result.returncode == 1
    assert "MISSING_EXTRA" not in result.stderr
    assert "motley_server.forgotten" in result.stderr
