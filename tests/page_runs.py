"""Pages of the documentation as their readers run them: the blocks that a page shows, and what a shell prints."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

from motley_client import cli
from typer.testing import CliRunner

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """Return a page's blocks in a language, in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [block for found, block in BLOCK.findall(text) if found == language]


async def run(script: str, folder: Path, address: str, *, status: int = 0) -> list[str]:
    """Run shell as a reader would whose server is at an address, and return what it printed, line by line."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOTLEY_SERVER": address,
        "HF_HUB_OFFLINE": "1",
    }
    process = await asyncio.create_subprocess_exec(
        "bash", "-euc", script, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == status, err.decode() or out.decode()
    return [line.strip() for line in out.decode().splitlines()]


def run_here(script: str, folder: Path, address: str) -> list[str]:
    """Run a block of nothing but `motley` commands as `run` does, in this process, which has imported it already."""
    printed = []
    for words in map(shlex.split, script.splitlines()):
        assert words[0] == "motley"
        with chdir(folder):
            result = CliRunner().invoke(cli.app, words[1:], prog_name="motley", env={"MOTLEY_SERVER": address})
        assert result.exit_code == 0, result.output
        printed += [line.strip() for line in result.stdout.splitlines()]
    return printed
