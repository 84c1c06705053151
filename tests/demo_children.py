"""Fake commands for a demo to start as child processes, and a look at what is left of them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent


def declare_commands(folder: Path, commands: Mapping[str, str]) -> dict[str, str]:
    """Declare commands of `motley` in a folder, by name and entry point, and return the environment to see them in.

    Semantics: what makes scratch folders makes them in one of ours; the fakes note their process ids; and a setting is
    there that is meant for other servers.
    """
    declared = folder / "fake_commands-1.0.dist-info"
    declared.mkdir()
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-commands\nVersion: 1.0\n")
    lines = [f"{name} = {entry_point}\n" for name, entry_point in commands.items()]
    (declared / "entry_points.txt").write_text("".join(["[motley.commands]\n", *lines]))
    (folder / "scratch").mkdir()
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(folder / "scratch"),
        "FAKE_SERVE_PIDS": str(folder / "pids"),
        "MOTLEY_LISTEN": "0.0.0.0:1",
    }


def noted_pids(environment: Mapping[str, str]) -> list[int]:
    """Return the process ids that fakes have noted."""
    path = Path(environment["FAKE_SERVE_PIDS"])
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def assert_nothing_is_left(environment: Mapping[str, str]) -> None:
    """Check that fakes were there, and that neither they nor a scratch folder is any more."""
    pids = noted_pids(environment)
    assert pids
    until = time.monotonic() + 5  # a kill is sent, and done a moment later
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert [pid for pid in pids if is_running(pid)] == []
    assert list(Path(environment["TMPDIR"]).iterdir()) == []


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
