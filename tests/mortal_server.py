"""A server process that is killed again and again over one data directory, and what it has promised by then.

A promise is what a call has answered. What was asked for and not answered is in doubt: after a restart it has happened
whole or not at all. Runs on the test's event loop; the server is another process.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from forked_servers import forked_server
from motley_client import AdapterState, AsyncClient, UnavailableError, Visibility

CONFIG = "log_level = 'error'\n[engine]\nkv_cache_bytes = 16777216\nthreads = 1\n[limits]\ncollect_seconds = {}\n"
PROMPT = "upper: cat ="
PATIENCE_SECONDS = 30.0
Key = tuple[str, int]  # name, version


@dataclass(frozen=True)
class Promised:
    """What is the case: versions by the directories that they were made of, and what names, shares and pins say."""

    versions: dict[Key, Path] = field(default_factory=dict)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    pinned: frozenset[Key] = frozenset()

    def with_version(self, name: str, version: int, directory: Path, *aliases: str) -> Promised:
        """Return the case after an upload."""
        moved = {(name, alias): version for alias in aliases}
        return replace(self, versions=self.versions | {(name, version): directory}, aliases=self.aliases | moved)

    def with_alias(self, name: str, alias: str, version: int) -> Promised:
        """Return the case after an alias moved."""
        return replace(self, aliases=self.aliases | {(name, alias): version})

    def without(self, *keys: Key) -> Promised:
        """Return the case after deletions."""
        left = {key: directory for key, directory in self.versions.items() if key not in keys}
        return replace(self, versions=left, pinned=self.pinned - {*keys})


class MortalServer:
    """A data directory, and the server over it while there is one."""

    def __init__(self, folder: Path, collect_seconds: float) -> None:
        self.adapters = folder / "data" / "adapters"
        self.killed = asyncio.Event()
        self._folder = folder
        self._pid = 0
        self._answers: dict[Path, str] = {}  # that each directory's adapter gave when it was first asked
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"  # the same after every restart
        (folder / "motley.toml").write_text(CONFIG.format(collect_seconds))

    @asynccontextmanager
    async def life(self) -> AsyncIterator[AsyncClient]:
        """Run the server while the block runs, unless it is killed before."""
        arguments = ["--listen", self.address, "--config", str(self._folder / "motley.toml")]
        arguments += ["--base", "tiny", "--dtype", "float32", "--data-dir", str(self._folder / "data")]
        async with forked_server(arguments, self._folder) as server:
            self._pid = server.pid
            self.killed.clear()
            async with AsyncClient(server.address, timeout=60) as client:
                await _reach(client)
                yield client

    def kill(self) -> None:
        """End the server at once; nothing of it runs any more."""
        os.kill(self._pid, signal.SIGKILL)
        self.killed.set()

    def kill_when(self, is_time: Callable[[], bool]) -> None:
        """Kill the server at a moment that is looked for all the time; blocks until then."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not is_time():
            assert time.monotonic() < until, "the moment never came"
            time.sleep(0.0002)
        self.kill()

    def files_in(self, *places: str) -> dict[str, int]:
        """Return the files in places of the store, and their sizes; what goes meanwhile may be missing."""
        sizes = {}
        for folder, _, names in (step for place in places for step in os.walk(self.adapters / place)):
            for name in names:
                with suppress(FileNotFoundError):
                    sizes[str(Path(folder, name))] = Path(folder, name).stat().st_size
        return sizes

    async def until_nothing_is_left_but(self, directories: Iterable[Path]) -> None:
        """Wait until the store has the files of these adapters, and no other byte."""
        wanted = sorted(path.stat().st_size for directory in {*directories} for path in adapter_files(directory))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while sorted(self.files_in("staging", "bundles", "trash").values()) != wanted:
                await asyncio.sleep(0.02)

    async def check(self, client: AsyncClient, *possible: Promised) -> Promised:
        """Return which of the possible cases holds, after every version of it was fetched and has answered."""
        seen = await self._see(client)
        while (again := await self._see(client)) != seen:  # a push that outlived the server may go on meanwhile
            seen = again
        holding = [one for one in possible if _as_seen(one) == seen]
        assert holding, f"{seen} is none of {[_as_seen(one) for one in possible]}"
        await asyncio.gather(*(self._check_version(client, *version) for version in holding[0].versions.items()))
        return holding[0]

    async def _see(self, client: AsyncClient) -> tuple[object, ...]:
        aliases: dict[tuple[str, str], int] = {}
        versions, shared, pinned = set(), set(), set()
        async for adapter in client.list_adapters():
            aliases |= {(adapter.name, alias.name): alias.version for alias in adapter.aliases}
            if adapter.visibility is Visibility.PUBLIC:
                shared.add(adapter.name)
            async for one in client.list_adapter_versions(adapter.name):
                assert one.state is AdapterState.READY
                versions.add((one.name, one.version))
                if one.pinned:
                    pinned.add((one.name, one.version))
        return versions, aliases, shared, pinned

    async def _check_version(self, client: AsyncClient, key: Key, directory: Path) -> None:
        name = f"{key[0]}@{key[1]}"
        with TemporaryDirectory(dir=self._folder) as back:
            await client.download_adapter(name, back)
            assert sha256s(Path(back)) == sha256s(directory), f"{name} is not what was uploaded"
        answer = await client.generate(PROMPT, adapters=[name], max_new_tokens=8, temperature=0, ignore_eos=True)
        assert [(one.name, one.version) for one in answer.served_by.adapters] == [key]
        assert answer.text == self._answers.setdefault(directory, answer.text)


async def _reach(client: AsyncClient) -> None:
    """Wait until gRPC tries the address again: all channels to one of this process share its pause after failures."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                await client.info()
            except UnavailableError:
                await asyncio.sleep(0.05)
            else:
                return


def _as_seen(promised: Promised) -> tuple[object, ...]:
    return set(promised.versions), promised.aliases, set(promised.shared), set(promised.pinned)


def adapter_files(directory: Path) -> list[Path]:
    """Return the files of a directory that travel."""
    return [path for path in directory.iterdir() if path.suffix in (".json", ".safetensors")]


def sha256s(directory: Path) -> dict[str, str]:
    """Return the checksums of an adapter's files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in adapter_files(directory)}
