"""docs/publish.md as its reader runs it: PEFT trains, the command publishes, and every answer is the version's."""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from forked_servers import blocking_forked_server
from page_runs import blocks, run, run_here

PAGE = "publish.md"
# PEFT takes seconds to import, and is in this process already: what `python train.py` is given is told instead.
TELLING = 'python() { if [ "$1" = train.py ]; then echo "$@"; else command python "$@"; fi; }\n'


def train(training: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the page's training, its script in this process, and return how often."""
    commands = asyncio.run(run(TELLING + training, folder, ""))
    monkeypatch.chdir(folder)
    for command in commands:
        monkeypatch.setattr(sys, "argv", command.split())
        runpy.run_path("train.py", run_name="__main__")
    return len(commands)


def test_the_page_runs_as_it_stands_and_each_answer_is_its_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, from_python = blocks(PAGE, "python")
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    training, push, ask, try_out, move, roll_back, rest = blocks(PAGE, "bash")
    arguments = ["--base", "tiny", "--data-dir", str(tmp_path / "data"), "--dtype", "float32"]
    with blocking_forked_server(arguments, tmp_path) as server:
        told = partial(run_here, folder=tmp_path, address=server.address)
        assert train(training, tmp_path, monkeypatch) == 2
        told(push)
        assert told(ask) == ["onward"]
        assert told(try_out)[-2:] == ["upward", "onward"]
        assert "upward" in told(move)
        assert told(roll_back)[-1] == "onward"
        told(rest)
        fetched = {path.name: path.read_bytes() for path in (tmp_path / "fetched").iterdir()}
        assert fetched == {name: (tmp_path / "second" / name).read_bytes() for name in fetched}
        shown = json.loads(told("motley adapters show motto --json")[0])
        assert [one["version"] for one in shown["versions"]] == [1]
        (tmp_path / "client.py").write_text(from_python.replace("127.0.0.1:8470", server.address), encoding="utf-8")
        printed = asyncio.run(run("python client.py", tmp_path, server.address))
        assert (printed[0].split()[0], printed[-1]) == ("3", "upward")
