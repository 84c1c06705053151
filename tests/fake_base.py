"""A `motley base` that makes nothing but names, to be run as a child process: `prune` and `restrict` by rule.

Insists on what it is given, as the real one does, and notes its process id where the fake server does. FAKE_BASE in the
environment makes it misbehave: `refuses` to restrict, `hangs` in a prune, tells of `another` base than is served.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from fake_motley_server import BASE_FINGERPRINT

base = typer.Typer()
MODE = os.environ.get("FAKE_BASE", "")


@base.callback()
def note() -> None:
    """Note who runs."""
    with open(os.environ["FAKE_SERVE_PIDS"], "a") as pids:
        print(os.getpid(), file=pids)


@base.command()
def prune(
    name: str,
    ratio: Annotated[str, typer.Option()],
    layers: Annotated[str, typer.Option()],
    windows: Annotated[int, typer.Option()],
    calibration: Annotated[Path, typer.Option(exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option()],
    json_output: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Make a directory, and tell of it."""
    if MODE == "hangs":
        time.sleep(60)
    assert (name, json_output) == ("tiny", True)
    out.mkdir()
    fingerprint = "sha256:" + "a" * 64 if MODE == "another" else BASE_FINGERPRINT
    told = {"num_parameters_before": 4000, "num_parameters_after": 3250, "fingerprint": fingerprint}
    print(json.dumps(told))


@base.command()
def restrict(
    adapter: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    original: Annotated[str, typer.Option()],
    pruned: Annotated[Path, typer.Option(exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option()],
) -> None:
    """Make a directory."""
    if MODE == "refuses" and adapter.name == "swap":
        print(f"Loading 0%\rLoading 100%\nerror: {original} is not what {adapter.name} is of (OTHER)", file=sys.stderr)
        raise typer.Exit(1)
    out.mkdir()
