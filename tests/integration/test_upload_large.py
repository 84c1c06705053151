"""An upload over a connection that breaks again and again: it arrives, and the server's memory does not notice."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from adapter_files import tiny_spec
from fake_relay import relaying
from forked_servers import forked_server
from motley_adapters.reader import inspect_adapter
from motley_client import AdapterResidency, AdapterState, AsyncClient
from wide_adapters import BYTES_PER_LAYER, WIDTH, make_wide_base, make_wide_lora, wide_linears

# By connection, bytes until it breaks: in its first words, within the header, in the midst of chunks, at their ends.
FEW_CUTS = [300, 2_000, 20_000_000, 1 << 20, 33_333_333]
CUTS = [300, 2_000, 50_000_000, 20_000_000, 90_000_000, 1 << 20, 70_000_000, 40_000_000, 77_777_777, 25_000_000]
SMALL = "log_level = 'error'\n[engine]\nkv_cache_bytes = 4194304\nadapter_arena_bytes = 4194304\nthreads = 1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Make a folder that is gone after the test: pytest would keep gigabytes of three runs."""
    with TemporaryDirectory(dir=tmp_path) as name:
        yield Path(name)


class Growth:
    """By how much a process's own memory has grown at most since it was first looked at."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._before = self._anonymous_bytes()
        self.most_bytes = 0
        self.num_looks = 0

    def look(self) -> None:
        """Take note of how it is now."""
        self.most_bytes = max(self.most_bytes, self._anonymous_bytes() - self._before)
        self.num_looks += 1

    def _anonymous_bytes(self) -> int:
        lines = self._status.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watching(pid: int) -> Iterator[Growth]:
    """Look at a process's memory all the time while the block runs."""
    growth, done = Growth(pid), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            growth.look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield growth
    finally:
        done.set()
        watcher.join()
    growth.look()


def sha256s(directory: Path) -> dict[str, str]:
    def of(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return {path.name: of(path) for path in sorted(directory.iterdir())}


def digest_of(adapter: Path, num_layers: int) -> str:
    linears = dict.fromkeys(wide_linears(num_layers), (WIDTH, WIDTH))
    return inspect_adapter(adapter, tiny_spec(linears=linears)).spec.digest


@pytest.mark.parametrize(
    ("num_layers", "num_megabytes", "cuts"),
    [(2, 100, FEW_CUTS), pytest.param(9, 500, CUTS, marks=pytest.mark.soak)],
    ids=["100 MB", "500 MB"],
)
def test_an_adapter_arrives_over_every_cut_and_the_server_grows_by_less_than_64_mebibytes(
    folder: Path, num_layers: int, num_megabytes: int, cuts: list[int]
) -> None:
    base, adapter = make_wide_base(folder / "base", num_layers), make_wide_lora(folder / "adapter", num_layers, seed=1)
    assert num_layers * BYTES_PER_LAYER > num_megabytes * 1_000_000 > sum(cuts) > num_megabytes * 500_000
    (folder / "motley.toml").write_text(SMALL)
    arguments = ["--config", str(folder / "motley.toml"), "--base", str(base), "--data-dir", str(folder / "data")]

    async def scenario() -> None:
        async with forked_server(arguments, folder) as server:
            with watching(server.pid) as growth, relaying(server.address, list(cuts)) as relay:
                async with AsyncClient(relay.address, timeout=120) as client:
                    version = await client.upload_adapter("wide", adapter)
            assert relay.num_dropped == len(cuts)
            assert growth.num_looks > 20
            assert growth.most_bytes < 64 << 20, f"{growth.most_bytes / (1 << 20):.0f} MiB"
            assert version.state is AdapterState.READY
            assert version.residency is AdapterResidency.DISK
            assert version.digest == digest_of(adapter, num_layers)
            assert version.size_bytes == sum(path.stat().st_size for path in adapter.iterdir())
            async with AsyncClient(server.address, timeout=120) as client:
                assert (await client.get_adapter("wide@1")).version == version
                await client.download_adapter("wide", folder / "back")

    asyncio.run(scenario())
    assert sha256s(folder / "back") == sha256s(adapter)
    [stored] = (folder / "data" / "adapters" / "bundles").iterdir()
    assert sha256s(stored) == sha256s(adapter)
