"""docs/publish.md as its reader runs it: PEFT trains, the command publishes, and every answer is the version's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from motley_client.child_server import child_server
from page_runs import blocks, run

PAGE = "publish.md"


def test_the_page_runs_as_it_stands_and_each_answer_is_its_versions(tmp_path: Path) -> None:
    train, from_python = blocks(PAGE, "python")
    (tmp_path / "train.py").write_text(train, encoding="utf-8")
    training, push, ask, try_out, move, roll_back, rest = blocks(PAGE, "bash")

    async def scenario() -> None:
        arguments = ["--base", "tiny", "--data-dir", str(tmp_path / "data"), "--dtype", "float32"]
        async with child_server(arguments, tmp_path) as server:
            trained = await run(training, tmp_path, server.address)
            assert len(trained) == 2
            await run(push, tmp_path, server.address)
            assert await run(ask, tmp_path, server.address) == ["onward"]
            assert (await run(try_out, tmp_path, server.address))[-2:] == ["upward", "onward"]
            moved = await run(move, tmp_path, server.address)
            assert "upward" in moved
            assert (await run(roll_back, tmp_path, server.address))[-1] == "onward"
            await run(rest, tmp_path, server.address)
            fetched = {path.name: path.read_bytes() for path in (tmp_path / "fetched").iterdir()}
            assert fetched == {name: (tmp_path / "second" / name).read_bytes() for name in fetched}
            shown = json.loads((await run("motley adapters show motto --json", tmp_path, server.address))[0])
            assert [one["version"] for one in shown["versions"]] == [1]
            script = from_python.replace("127.0.0.1:8470", server.address)
            (tmp_path / "client.py").write_text(script, encoding="utf-8")
            printed = await run("python client.py", tmp_path, server.address)
            assert (printed[0].split()[0], printed[-1]) == ("3", "upward")

    asyncio.run(scenario())
