"""Two tenants, one name, one prompt prefix that is hot in the cache: nobody is ever answered by another's adapter.

The markers act through cached values (`value_markers`), so that a prefix taken from the wrong cache is the wrong
answer. `acme` and `blue` each have an adapter `mine` in two versions; `acme` shares one with `blue`, and one is public.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from marker_adapters import KINDS, make_marker_base, marker_of
from motley_bases.loader import load_base
from motley_client import AsyncClient, ServedBy, Usage, Visibility
from motley_server.app import App, build
from motley_server.asked import Role
from motley_server.config import resolve
from value_markers import ValueMarkerMaker

TENANTS = ("acme", "blue")
NUM_PREFIX_TOKENS = 96  # six blocks
NUM_ANSWER_TOKENS = 3
IN_FLIGHT = 24
Served = tuple[str, str, int]  # by tenant, name as it was told, version
Answer = tuple[tuple[int, ...], ServedBy, Usage]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_marker_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def markers(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return six adapters by index, of every kind."""
    maker = ValueMarkerMaker(load_base(checkpoint, dtype="float32", device=torch.device("cpu")), checkpoint)
    root = tmp_path_factory.mktemp("markers")
    return [maker.make(root / str(index), index, KINDS[index % len(KINDS)]) for index in range(6)]


@dataclass
class House:
    """A server, its tenants' clients, and whose adapter makes which marker."""

    clients: dict[str, AsyncClient]
    markers: dict[Served, int] = field(default_factory=dict)
    digests: dict[Served, str] = field(default_factory=dict)

    async def bring(self, tenant: str, name: str, directory: Path, index: int, *seen_as: tuple[str, str]) -> None:
        """Upload a version as a tenant; `seen_as` are others who may use it, and the names that they use."""
        made = await self.clients[tenant].upload_adapter(name, directory, aliases=["default"])
        for who, told in ((tenant, name), *seen_as):
            self.markers[who, told, made.version] = index
            self.digests[who, told, made.version] = made.digest

    async def ask(self, tenant: str, prompt: Sequence[int], name: str = "", *, streamed: bool = False) -> Answer:
        """Ask one question, greedily."""
        client, adapters = self.clients[tenant], [name] if name else []
        sampling = {"max_new_tokens": NUM_ANSWER_TOKENS, "temperature": 0.0, "ignore_eos": True}
        if not streamed:
            told = await client.generate(token_ids=prompt, adapters=adapters, **sampling)  # type: ignore[arg-type]
            return told.token_ids, told.served_by, told.usage
        tokens: list[int] = []
        served_by = usage = None
        async for part in client.stream(token_ids=prompt, adapters=adapters, **sampling):  # type: ignore[arg-type]
            tokens += [token for candidate in part.candidates for token in candidate.token_ids]
            served_by, usage = part.served_by or served_by, part.usage or usage
        assert served_by is not None
        assert usage is not None
        return tuple(tokens), served_by, usage

    def check(self, tenant: str, name: str, answer: Answer, bare: tuple[int, ...]) -> int:
        """Check that an answer is of what a tenant means by a name, and return the version that it was."""
        tokens, served_by, _ = answer
        if not name:
            assert (tokens, served_by.adapters) == (bare, ())
            return 0
        [one] = served_by.adapters
        served = (tenant, one.name, one.version)
        assert one.name == name.partition("@")[0]
        assert "@" not in name or one.version == int(name.partition("@")[2])
        assert one.digest == self.digests[served]
        assert tokens == (marker_of(self.markers[served]),) * NUM_ANSWER_TOKENS
        return one.version


@asynccontextmanager
async def running(checkpoint: Path, data_dir: Path) -> AsyncIterator[House]:
    flags = {
        "base": str(checkpoint), "listen": "127.0.0.1:0", "metrics": "", "data_dir": str(data_dir), "dtype": "float32",
        "auth": True,
    }  # fmt: skip
    app = await build(resolve({"MOTLEY_ENGINE_KV_CACHE_BYTES": str(2**25)}, flags))
    try:
        keys = await app.tenancy.database.run(_make_tenants, app)
        clients = {tenant: AsyncClient(f"127.0.0.1:{app.port}", key, timeout=120) for tenant, key in keys.items()}
        yield House(clients)
        for client in clients.values():
            await client.close()
        assert app.library.cache.num_leases == 0
    finally:
        await app.stop()


def _make_tenants(app: App) -> dict[str, str]:
    for tenant in TENANTS:
        app.tenancy.tenants.create(tenant)
    keys = {tenant: app.tenancy.keys.create(tenant, Role.PUBLISHER)[1] for tenant in TENANTS}
    return keys | {"local": app.tenancy.keys.create("local", Role.ADMIN)[1]}


async def furnish(house: House, markers: list[Path]) -> dict[str, list[str]]:
    """Bring the adapters, and return the names that each tenant can use, the base alone (no name) among them."""
    for version in range(2):
        for place, tenant in enumerate(TENANTS):
            index = 2 * version + place
            await house.bring(tenant, "mine", markers[index], index)
    await house.bring("acme", "lent", markers[4], 4, ("blue", "acme/lent"))
    await house.clients["acme"].share_adapter("lent", Visibility.TENANTS, ["blue"])
    await house.bring("local", "public/tool", markers[5], 5, ("acme", "public/tool"), ("blue", "public/tool"))
    await house.clients["local"].share_adapter("public/tool", Visibility.PUBLIC)
    both = ["", "mine@1", "mine@2", "public/tool"]
    return {"acme": [*both, "lent"], "blue": [*both, "acme/lent"]}


async def warm(house: House, names: dict[str, list[str]], prompt: Sequence[int], bare: tuple[int, ...]) -> None:
    """Ask under every name twice, and check that what is cached came from the tenant itself, under this very set."""
    for place in range(max(map(len, names.values()))):
        for tenant in TENANTS:  # taking turns, so that the other's prefix is hot
            name = names[tenant][place]
            for num_cached in (0, NUM_PREFIX_TOKENS):
                answer = await house.ask(tenant, prompt, name)
                house.check(tenant, name, answer, bare)
                assert answer[2].cached_prompt_tokens == num_cached, f"{tenant} under {name or 'the base'}"


async def swap(house: House, tenant: str) -> None:
    """Move a tenant's default alias to and fro, until cancelled."""
    while True:
        for version in (1, 2):
            await house.clients[tenant].set_alias("mine", "default", version)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("num_requests", [400, pytest.param(10_000, marks=pytest.mark.soak)])
def test_two_tenants_with_one_name_and_one_hot_prefix_are_never_answered_by_each_others_adapter(
    num_requests: int, checkpoint: Path, markers: list[Path], tmp_path: Path
) -> None:
    draw = random.Random(5)
    prefix = [draw.randrange(30, 300) for _ in range(NUM_PREFIX_TOKENS)]
    prompts = [prefix + [draw.randrange(30, 300) for _ in range(length)] for length in range(1, 9)]

    async def ask_all(house: House, names: dict[str, list[str]], bare: list[tuple[int, ...]]) -> Counter[Served]:
        counts: Counter[Served] = Counter()
        questions: Iterator[int] = iter(range(num_requests))

        async def keep_asking() -> None:
            for number in questions:
                tenant, place = TENANTS[number % 2], draw.randrange(len(prompts))
                name = draw.choice([*names[tenant], "mine", "mine"])
                answer = await house.ask(tenant, prompts[place], name, streamed=draw.random() < 0.5)
                version = house.check(tenant, name, answer, bare[place])
                assert answer[2].cached_prompt_tokens == NUM_PREFIX_TOKENS
                counts[tenant, name, version] += 1

        await asyncio.gather(*(keep_asking() for _ in range(IN_FLIGHT)))
        return counts

    async def scenario() -> None:
        async with running(checkpoint, tmp_path) as house:
            names = await furnish(house, markers)
            bare = [(await house.ask("local", prompt))[0] for prompt in prompts]
            assert not {token for tokens in bare for token in tokens} & {marker_of(index) for index in range(6)}
            await warm(house, names, prompts[0], bare[0])
            swapping = [asyncio.create_task(swap(house, tenant)) for tenant in TENANTS]
            counts = await ask_all(house, names, bare)
            for task in swapping:
                task.cancel()
            assert counts.total() == num_requests
            assert all(counts[tenant, "mine", version] > 10 for tenant in TENANTS for version in (1, 2))
            assert all(counts[tenant, "", 0] > 10 for tenant in TENANTS)

    asyncio.run(scenario())
