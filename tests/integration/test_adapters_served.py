"""Adapters of tenants on a real server: uploaded, served, swapped while streams run, kept over restarts, and gone."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from architectures import build_checkpoint
from motley_bases.checkpoint import resolve_base
from motley_client import (
    AdapterKind,
    AdapterResidency,
    AsyncClient,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from motley_server.app import App, StartError, build
from motley_server.config import resolve
from peft_adapters import make_adapter

EMBEDDED = Path(__file__).parents[2] / "adapters" / "motley_adapters" / "assets" / "tiny"
SMALL = {"MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**24)}
PROMPT = "upper: cat ="


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two LoRAs that answer differently."""
    return tuple(  # type: ignore[return-value]
        make_adapter(resolve_base("tiny"), tmp_path_factory.mktemp(f"adapter{seed}"), seed=seed) for seed in (1, 2)
    )


@asynccontextmanager
async def running(
    data_dir: Path, environ: dict[str, str] | None = None, **flags: Any
) -> AsyncIterator[tuple[App, AsyncClient]]:
    flags = {"listen": "127.0.0.1:0", "metrics": "", "data_dir": str(data_dir), "dtype": "float32"} | flags
    app = await build(resolve(SMALL | (environ or {}), flags))
    try:
        async with AsyncClient(f"127.0.0.1:{app.port}", timeout=60) as client:
            yield app, client
    finally:
        await app.stop()


async def answer(client: AsyncClient, *adapters: str, prompt: str = PROMPT) -> tuple[str, list[tuple[str, int]]]:
    """Return a greedy answer, and the names and versions that served it."""
    told = await client.generate(
        prompt, adapters=[(name, 1.0) for name in adapters], max_new_tokens=12, temperature=0, ignore_eos=True
    )
    return told.text, [(one.name, one.version) for one in told.served_by.adapters]


def bundle_files(data_dir: Path) -> set[str]:
    root = data_dir / "adapters"
    return {
        path.name for name in ("staging", "bundles", "trash") for path in (root / name).rglob("*") if path.is_file()
    }


def test_every_kind_is_uploaded_and_answers_as_when_the_server_was_started_with_it(tmp_path: Path) -> None:
    names = sorted(path.name for path in EMBEDDED.iterdir())

    async def scenario() -> None:
        async with running(tmp_path / "a", adapters=[f"{name}={EMBEDDED / name}" for name in names]) as (_, client):
            expected = {name: await answer(client, name, prompt=f"{name}: kettle =") for name in names}
            together = await answer(client, *names[:3])
        async with running(tmp_path / "b") as (_, client):
            kinds = {(await client.upload_adapter(name, EMBEDDED / name)).kind for name in names}
            assert kinds == {AdapterKind.LORA, AdapterKind.S2FT, AdapterKind.GOAT, AdapterKind.LORAM}
            answers = await asyncio.gather(*(answer(client, name, prompt=f"{name}: kettle =") for name in names))
            assert dict(zip(names, answers, strict=True)) == expected
            assert await answer(client, *names[:3]) == together

    asyncio.run(scenario())


def test_versions_aliases_and_pins_are_there_after_a_restart(tmp_path: Path, two: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (_, client):
            for directory in two:
                await client.upload_adapter("mine", directory)
            await client.set_alias("mine", "old", 1)
            pinned = await client.pin_adapter("mine@old")
            assert (pinned.residency, pinned.pinned) == (AdapterResidency.DEVICE, True)
            before = [await answer(client, name) for name in ("mine", "mine@old")]
            assert before[0][0] != before[1][0]
        async with running(tmp_path) as (app, client):
            found = {one.version: one.residency async for one in client.list_adapter_versions("mine")}
            assert found == {1: AdapterResidency.DEVICE, 2: AdapterResidency.DISK}
            assert [await answer(client, name) for name in ("mine", "mine@old")] == before
            assert len(app.library.cache) == 2

    asyncio.run(scenario())


def test_no_stream_changes_its_version_and_what_comes_after_the_alias_moved_is_all_new(
    tmp_path: Path, two: tuple[Path, Path]
) -> None:
    async def stream(client: AsyncClient, begun: asyncio.Event) -> tuple[str, list[int]]:
        text, versions = "", []
        async for part in client.stream(
            PROMPT, adapters=[("mine", 1.0)], max_new_tokens=96, temperature=0, ignore_eos=True
        ):
            if part.served_by is not None:
                versions += [one.version for one in part.served_by.adapters]
            text += part.text
            begun.set()
        return text, versions

    async def scenario() -> None:
        async with running(tmp_path) as (_, client):
            await client.upload_adapter("mine", two[0])
            await client.upload_adapter("mine", two[1], aliases=["next"])
            alone = await stream(client, asyncio.Event())
            begun = [asyncio.Event() for _ in range(4)]
            streams = [asyncio.create_task(stream(client, event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            await client.set_alias("mine", "default", 2)
            late = await asyncio.gather(*(answer(client, "mine") for _ in range(8)))
            assert all(versions == [("mine", 2)] for _, versions in late)
            assert not all(task.done() for task in streams), "the streams ended before the alias moved"
            assert await asyncio.gather(*streams) == [alone] * 4
            assert alone[1] == [1]
            await client.rollback_alias("mine", "default")
            assert (await answer(client, "mine"))[1] == [("mine", 1)]

    asyncio.run(scenario())


def test_a_deleted_version_leaves_no_bytes_on_disk_or_in_memory(tmp_path: Path, two: tuple[Path, Path]) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (app, client):
            await client.upload_adapter("mine", two[0])
            await client.upload_adapter("mine", two[1])
            await client.upload_adapter("twin", two[1])
            for name in ("mine@1", "mine@2"):
                await answer(client, name)
            await client.delete_adapter_version("mine", 1)
            with pytest.raises(NotFoundError):
                await answer(client, "mine@1")
            freed = [await app.library.housekeeping.collect() for _ in range(3)]
            assert sum(freed) == sum(path.stat().st_size for path in two[0].iterdir() if path.suffix != ".md")
            assert len(app.library.cache) == 1
            await client.remove_alias("mine", "default")
            await client.delete_adapter_version("mine", 2)
            assert [await app.library.housekeeping.collect() for _ in range(3)] == [0, 0, 0]
            assert (await answer(client, "twin"))[1] == [("twin", 1)]
            await client.remove_alias("twin", "default")
            await client.delete_adapter_version("twin", 1)
            for _ in range(3):
                await app.library.housekeeping.collect()
            assert (bundle_files(tmp_path), len(app.library.cache), app.library.cache.nbytes) == (set(), 0, 0)
            app.library.cache.check_integrity()
            collected = app.metrics.registry.get_sample_value("motley_collected_bytes_total")
            assert collected == sum(
                path.stat().st_size for one in two for path in one.iterdir() if path.suffix != ".md"
            )

    asyncio.run(scenario())


def test_a_named_directory_is_a_version_of_the_local_tenant(tmp_path: Path, two: tuple[Path, Path]) -> None:
    directory, data_dir = tmp_path / "adapter", tmp_path / "data"
    named = [f"mine={directory}"]

    async def scenario() -> None:
        shutil.copytree(two[0], directory)
        async with running(data_dir, adapters=named) as (_, client):
            first = await answer(client, "mine")
            assert first[1] == [("mine", 1)]
        shutil.rmtree(directory)
        shutil.copytree(two[1], directory)
        async with running(data_dir, adapters=named) as (_, client):
            second = await answer(client, "mine")
            assert (second[1], second[0] != first[0]) == ([("mine", 2)], True)
            shutil.rmtree(directory)  # what was read stays what it was
            assert await answer(client, "mine@1") == first
            await client.rollback_alias("mine", "default")
        shutil.copytree(two[1], directory)
        async with running(data_dir, adapters=named) as (_, client):
            assert await answer(client, "mine") == first, "a restart undid a rollback"
            assert [one.version async for one in client.list_adapter_versions("mine")] == [2, 1]

    asyncio.run(scenario())


def test_two_servers_do_not_share_a_data_directory(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path):
            with pytest.raises(StartError, match=r"data_dir: DATA_DIR_IN_USE"):
                async with running(tmp_path):
                    pass
        async with running(tmp_path):
            pass

    asyncio.run(scenario())


def test_an_adapter_of_another_base_is_refused_and_one_of_an_earlier_base_is_not_served(
    tmp_path: Path, two: tuple[Path, Path]
) -> None:
    async def scenario() -> None:
        other = tmp_path / "other"
        build_checkpoint("llama", other)
        foreign = make_adapter(other, tmp_path / "foreign", seed=3)
        async with running(tmp_path / "data") as (_, client):
            await client.upload_adapter("mine", two[0])
            with pytest.raises((FailedPreconditionError, InvalidArgumentError)):
                await client.upload_adapter("foreign", foreign)
            with pytest.raises(NotFoundError):
                await client.get_adapter("foreign")
            assert len(bundle_files(tmp_path / "data")) == 2
        async with running(tmp_path / "data", base=str(other)) as (_, client):
            with pytest.raises(FailedPreconditionError):
                await answer(client, "mine")
            assert [one.name async for one in client.list_adapters()] == ["mine"]

    asyncio.run(scenario())


def test_an_adapter_that_declares_no_base_is_refused_where_one_is_demanded(
    tmp_path: Path, two: tuple[Path, Path]
) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (_, client):
            await client.upload_adapter("plain", two[0])
        async with running(tmp_path, require_declared_base=True) as (_, client):
            with pytest.raises(FailedPreconditionError) as caught:
                await client.upload_adapter("other", two[1])
            assert caught.value.reason == "BASE_UNDECLARED"
            with pytest.raises(FailedPreconditionError) as caught:
                await answer(client, "plain")
            assert caught.value.reason == "BASE_UNDECLARED"
            await client.upload_adapter("declared", EMBEDDED / "unvowel")
            await answer(client, "declared")

    asyncio.run(scenario())
