"""The whole server, killed by SIGKILL five times in the midst of its work: what it promised holds, the rest is not half there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from mortal_server import PATIENCE_SECONDS, PROMPT, Key, MortalServer, Promised
from motley_bases.checkpoint import resolve_base
from motley_client import (
    AdapterVersion,
    AsyncClient,
    MotleyClientError,
    UnavailableError,
    UploadPhase,
    UploadProgress,
    Visibility,
)
from peft_adapters import make_adapter

MIB = 1 << 20
COLLECT_SECONDS = 0.1
Check = Callable[[AsyncClient], Awaitable[Promised]]
"""What the next life begins with: settles what was in doubt, and returns what is the case."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return LoRAs of 7 MB, each of which answers in its own way."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(resolve_base("tiny"), root / f"{seed}", seed=seed, r=64, lora_alpha=128) for seed in range(6)]


async def furnish(server: MortalServer, client: AsyncClient, adapters: list[Path]) -> Promised:
    """Have the server promise some of everything."""
    promised = Promised()
    for version, directory in enumerate(adapters[:3], 1):
        assert (await client.upload_adapter("mine", directory)).version == version
        promised = promised.with_version("mine", version, directory, "default")
    await client.upload_adapter("twin", adapters[0], aliases=["stable"])
    promised = promised.with_version("twin", 1, adapters[0], "stable")
    await client.set_alias("mine", "stable", 1)
    promised = promised.with_alias("mine", "stable", 1)
    await client.share_adapter("twin", Visibility.PUBLIC)
    await client.pin_adapter("mine@1")
    promised = replace(promised, shared=frozenset({"twin"}), pinned=frozenset({("mine", 1)}))
    return await server.check(client, promised)


async def push(server: MortalServer, directory: Path, progress: Callable[[UploadProgress], None]) -> AdapterVersion:
    """Push as one call that outlives the server."""
    async with AsyncClient(server.address, timeout=120) as client:
        return await client.upload_adapter("mine", directory, progress=progress)


def killed_in_the_midst_of_a_stream(
    server: MortalServer, before: Promised, directory: Path
) -> tuple[Check, asyncio.Task]: ...
