"""The clients' uploads, downloads and changes of adapters against the server itself, over connections that drop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from fake_relay import relaying
from motley_client import (
    AbortedError,
    AdapterKind,
    AdapterResidency,
    AsyncClient,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UploadPhase,
    UploadProgress,
    Visibility,
)
from rpc_harness import serving

MIB = 1 << 20
FILES = {"adapter_config.json": b"lora", "adapter_model.safetensors": random.Random(5).randbytes(3 * MIB + 9)}

Ask = Callable[..., Coroutine[Any, Any, Any]]


async def ask_asyncio(address: str, call: str, *args: Any, **kwargs: Any) -> Any:
    async with AsyncClient(address) as client:
        return await getattr(client, call)(*args, **kwargs)


async def ask_blocking(address: str, call: str, *args: Any, **kwargs: Any) -> Any:
    def run() -> Any:
        with Client(address) as client:
            return getattr(client, call)(*args, **kwargs)

    return await asyncio.to_thread(run)  # the server has this loop


@pytest.fixture(params=[ask_blocking, ask_asyncio], ids=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def found_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_adapter_goes_up_and_comes_back_over_connections_that_drop(ask: Ask, folder: Path) -> None:
    async def run() -> None:
        async with serving() as shell:
            address, told = f"127.0.0.1:{shell.port}", list[UploadProgress]()
            with relaying(address, [MIB, 2 * MIB]) as up:
                made = await ask(up.address, "upload_adapter", "legal", folder, progress=told.append)
            with relaying(address, [MIB, MIB]) as down:
                back = await ask(down.address, "download_adapter", "legal", folder / "back")

            assert (up.num_dropped, down.num_dropped) == (2, 2)
            assert (made.name, made.version, made.kind, back.digest) == ("legal", 1, AdapterKind.LORA, made.digest)
            assert found_in(folder / "back") == FILES
            assert told[-1] == UploadProgress(UploadPhase.SENDING, made.size_bytes, made.size_bytes)

    asyncio.run(run())


def test_pushes_of_the_same_content_are_one_version_until_another_came_between(ask: Ask, folder: Path) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            versions = []
            for kind in ("lora", "lora", "s2ft", "lora"):
                (folder / "adapter_config.json").write_text(kind)
                versions.append((await ask(address, "upload_adapter", "legal", folder)).version)

            assert versions == [1, 1, 2, 3]
            assert (await ask(address, "get_adapter", "legal")).version.version == 3

    asyncio.run(run())


def test_a_push_after_a_rollback_or_a_removal_does_what_it_says_again(ask: Ask, folder: Path) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            for kind in ("lora", "s2ft"):
                (folder / "adapter_config.json").write_text(kind)
                made = await ask(address, "upload_adapter", "legal", folder)
            for call in ("rollback_alias", "rollback_alias", "get_adapter"):
                await ask(address, call, "legal")
                assert (await ask(address, "upload_adapter", "legal", folder)).version == made.version == 2
                assert (await ask(address, "get_adapter", "legal")).version.version == 2
            for _ in range(3):
                assert (await ask(address, "upload_adapter", "legal", folder, aliases=["prod"])).version == 2
                assert (await ask(address, "get_adapter", "legal@prod")).version.version == 2
                await ask(address, "remove_alias", "legal", "prod")

    asyncio.run(run())


def test_a_push_after_a_deletion_is_a_version_again(ask: Ask, folder: Path) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            for number in (1, 2, 3):
                assert (await ask(address, "upload_adapter", "legal", folder)).version == number
                assert (await ask(address, "get_adapter", "legal")).version.version == number
                await ask(address, "remove_alias", "legal", "default")
                await ask(address, "delete_adapter_version", "legal", number)

    asyncio.run(run())


def test_pushes_of_the_same_at_once_are_one_version(ask: Ask, folder: Path) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            pushes = (ask(address, "upload_adapter", "legal", folder) for _ in range(4))
            assert {made.version for made in await asyncio.gather(*pushes)} == {1}
            assert (await ask(address, "get_adapter", "legal")).version.version == 1

    asyncio.run(run())


def test_what_the_server_refuses_is_raised_and_leaves_no_upload(ask: Ask, folder: Path) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            with pytest.raises(InvalidArgumentError) as caught:
                await ask(address, "upload_adapter", "legal", folder, kind=AdapterKind.GOAT, upload_id="mine")
            assert caught.value.reason == "KIND_MISMATCH"
            with pytest.raises(NotFoundError):
                await ask(address, "get_upload", "mine")
            with pytest.raises(NotFoundError):
                await ask(address, "get_adapter", "legal")

    asyncio.run(run())


def test_a_version_lives_from_its_alias_to_its_deletion(ask: Ask, folder: Path) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            await ask(address, "upload_adapter", "legal", folder, labels={"team": "search"})
            (folder / "adapter_config.json").write_text("s2ft")
            await ask(address, "upload_adapter", "legal", folder, aliases=["next"])
            before = await ask(address, "get_adapter", "legal")
            assert (before.version.version, before.version.labels) == (1, {"team": "search"})

            moved = await ask(address, "set_alias", "legal", "default", 2, etag=before.adapter.aliases[0].etag)
            with pytest.raises(AbortedError):
                await ask(address, "set_alias", "legal", "default", 1, etag=before.adapter.aliases[0].etag)
            assert (moved.version, moved.previous_version) == (2, 1)
            assert (await ask(address, "rollback_alias", "legal")).version == 1
            shared = await ask(address, "share_adapter", "legal", Visibility.PUBLIC)
            assert shared.visibility is Visibility.PUBLIC
            assert (await ask(address, "pin_adapter", "legal@1")).residency is AdapterResidency.DEVICE
            assert not (await ask(address, "unpin_adapter", "legal@1")).pinned

            with pytest.raises(FailedPreconditionError):
                await ask(address, "delete_adapter_version", "legal", 2)
            await ask(address, "remove_alias", "legal", "next")
            freed = await ask(address, "delete_adapter_version", "legal", 2, wait_seconds=1)
            assert freed == sum(map(len, FILES.values()))

    asyncio.run(run())
