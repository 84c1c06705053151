"""The whole server, ended by SIGKILL five times in the midst of its work: promises hold, and nothing is half there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path

from mortal_server import PROMPT, MortalServer, Promised
from motley_bases.checkpoint import resolve_base
from motley_client import (
    AdapterState,
    AdapterVersion,
    AsyncClient,
    UnavailableError,
    UploadPhase,
    UploadProgress,
    Visibility,
)
from peft_adapters import make_adapter

MIB = 1 << 20
COLLECT_SECONDS = 0.1
DRAW = random.Random(4)
Settle = Callable[[AsyncClient], Awaitable[Promised]]
"""Ask the next life what came of what the last one left in doubt, have it done, and return what is promised now."""


async def furnish(server: MortalServer, client: AsyncClient, adapters: list[Path]) -> Promised:
    """Have the server promise some of everything."""
    promised = Promised()
    for version, directory in enumerate(adapters[:3], 1):
        assert (await client.upload_adapter("mine", directory)).version == version
        promised = promised.with_version("mine", version, directory, "default")
    await client.upload_adapter("twin", adapters[0], aliases=["stable"])
    promised = promised.with_version("twin", 1, adapters[0], "stable")
    await client.share_adapter("twin", Visibility.PUBLIC)
    await client.pin_adapter("mine@1")
    return replace(promised, shared=frozenset({"twin"}), pinned=frozenset({("mine", 1)}))


async def push(server: MortalServer, directory: Path, told: Callable[[UploadProgress], None]) -> AdapterVersion:
    """Push an adapter by one call, which outlives the server."""
    async with AsyncClient(server.address, timeout=120) as client:
        return await client.upload_adapter("mine", directory, progress=told)


def finishing(server: MortalServer, pushing: asyncio.Task[AdapterVersion], before: Promised, after: Promised) -> Settle:
    """Settle a push: it goes on by itself, and whatever it had brought before is not another version."""
    is_acknowledged = pushing.done()

    async def settle(client: AsyncClient) -> Promised:
        await server.check(client, *((after,) if is_acknowledged else (before, after)))
        assert ("mine", (await pushing).version) == max(after.versions.keys() - before.versions.keys())
        return after

    return settle


async def kill_in_the_midst_of_a_stream(
    server: MortalServer, client: AsyncClient, before: Promised, directory: Path
) -> Settle:
    def tell(progress: UploadProgress) -> None:
        if progress.phase is UploadPhase.SENDING and progress.done_bytes >= 2 * MIB and not begun:
            begun.append(progress.done_bytes)
            server.kill_when(lambda: sum(server.files_in("staging").values()) >= MIB)

    begun: list[int] = []
    pushing = asyncio.create_task(push(server, directory, tell))
    await server.killed.wait()
    assert 0 < sum(server.files_in("staging").values()) < sum(path.stat().st_size for path in directory.iterdir())
    return finishing(server, pushing, before, before.with_version("mine", 4, directory, "default"))


async def kill_when_the_bundle_is_there(
    server: MortalServer, client: AsyncClient, before: Promised, directory: Path
) -> Settle:
    present = set(server.files_in("bundles"))
    killing = asyncio.to_thread(server.kill_when, lambda: bool(server.files_in("bundles").keys() - present))
    pushing = asyncio.create_task(push(server, directory, lambda progress: None))
    await killing
    await asyncio.sleep(0.2)  # what was answered before arrives
    return finishing(server, pushing, before, before.with_version("mine", 5, directory, "default"))


async def kill_while_aliases_move(server: MortalServer, client: AsyncClient, before: Promised, _: Path) -> Settle:
    case = asked = before
    targets = zip(count(), cycle(("stable", "next", "spare")), cycle((1, 4, 5, 1)))
    try:
        for place, alias, version in targets:
            if place == 20:
                asyncio.get_running_loop().call_later(DRAW.uniform(0, 0.02), server.kill)
            asked, move = case.with_alias("mine", alias, version), ("mine", alias, version)
            await client.set_alias(*move, request_id=f"move-{place}")
            case = asked
    except UnavailableError:
        assert place >= 20

    async def settle(client: AsyncClient) -> Promised:
        await server.check(client, case, asked)
        assert (await client.set_alias(*move, request_id=f"move-{place}")).version == move[2]
        return asked

    return settle


async def kill_while_versions_are_deleted(
    server: MortalServer, client: AsyncClient, before: Promised, _: Path
) -> Settle:
    deletions = [("mine", 2), ("mine", 3)]

    async def delete(client: AsyncClient, version: int) -> None:
        await client.delete_adapter_version("mine", version, request_id=f"delete-{version}")

    async def is_going(version: int) -> bool:
        return (await client.get_adapter(f"mine@{version}")).version.state is AdapterState.DELETING

    stream = client.stream(PROMPT, adapters=["mine@2"], max_new_tokens=400, ignore_eos=True)
    async with aclosing(stream):
        await anext(stream)
        waiting = asyncio.create_task(delete(client, 2))
        while not await is_going(2):
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(DRAW.uniform(0, 0.01), server.kill)
        other, held = await asyncio.gather(delete(client, 3), waiting, return_exceptions=True)
    assert isinstance(held, UnavailableError), "nobody waited for the request that held the version"
    possible = [before.without(("mine", 3))] + [before] * (other is not None)

    async def settle(client: AsyncClient) -> Promised:
        await server.check(client, *possible)
        for _, version in deletions:
            await delete(client, version)
        return before.without(*deletions)

    return settle


async def kill_while_bytes_are_collected(
    server: MortalServer, client: AsyncClient, before: Promised, _: Path
) -> Settle:
    for name in ("next", "spare", "stable"):
        await client.set_alias("mine", name, 5)
    promised = replace(before, aliases={key: 5 if key[0] == "mine" else 1 for key in before.aliases})
    await server.until_nothing_is_left_but(promised.versions.values())
    bundles = set(server.files_in("bundles"))
    killing = asyncio.to_thread(server.kill_when, lambda: bool(bundles - server.files_in("bundles").keys()))
    deleting = asyncio.create_task(client.delete_adapter_version("mine", 4))
    await killing
    await deleting
    promised = promised.without(("mine", 4))

    async def settle(client: AsyncClient) -> Promised:
        return await server.check(client, promised)

    return settle


DISASTERS = (
    kill_in_the_midst_of_a_stream,
    kill_when_the_bundle_is_there,
    kill_while_aliases_move,
    kill_while_versions_are_deleted,
    kill_while_bytes_are_collected,
)


def test_what_was_promised_is_whole_after_each_of_five_kills_and_no_other_byte_stays(tmp_path: Path) -> None:
    adapters = [make_adapter(resolve_base("tiny"), tmp_path / f"{seed}", seed=seed, r=32) for seed in range(5)]

    async def scenario() -> None:
        server = MortalServer(tmp_path, COLLECT_SECONDS)
        settle: Settle = lambda client: furnish(server, client, adapters)  # noqa: E731
        for place, disaster in enumerate(DISASTERS):
            async with server.life() as client:
                promised = await server.check(client, await settle(client))
                settle = await disaster(server, client, promised, adapters[3 + place % 2])
                assert server.killed.is_set()
        async with server.life() as client:
            promised = await settle(client)
            assert set(promised.versions) == {("mine", 1), ("mine", 5), ("twin", 1)}
            await client.unpin_adapter("mine@1")
            await client.delete_adapter_version("mine", 1)  # its bytes are the twin's too
            await server.check(client, promised.without(("mine", 1)))
            await server.until_nothing_is_left_but([adapters[0], adapters[4]])
            await server.check(client, promised.without(("mine", 1)))

    asyncio.run(scenario())
