"""Adapters that are kept on the device, and requests that are ended from outside, through the engine's front."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from counting_observer import CountingObserver
from engine_harness import Harness, make_harness
from marker_adapters import MarkerMaker, make_marker_base, marker_of
from motley_adapters.cache import AdapterCache
from motley_bases.loader import load_base
from motley_server.engine.api import EventStream
from motley_server.engine.core import EngineCore
from motley_server.engine.engine import Engine
from motley_server.engine.settings import EngineSettings
from motley_server.errors import (
    AbortedError,
    FailedPreconditionError,
    InternalError,
    MotleyError,
    ResourceExhaustedError,
)

NUM_ADAPTERS = 8
ROOM = 4  # adapters on the device
DELETED = FailedPreconditionError("an adapter of this request was deleted", reason="ADAPTER_DELETED")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_marker_base(tmp_path_factory.mktemp("marker-base"))


@pytest.fixture(scope="module")
def maker(checkpoint: Path) -> MarkerMaker:
    return MarkerMaker(load_base(checkpoint, dtype="float32", device=torch.device("cpu")), checkpoint)


class Stage:
    """An engine on its thread over adapters m0, m1, ... of one size, all on disk, with room for a few of them."""

    def __init__(self, checkpoint: Path, maker: MarkerMaker, root: Path) -> None:
        self.directories = {f"m{i}": maker.make(root / f"m{i}", i, "s2ft", seed=i) for i in range(NUM_ADAPTERS)}
        self.harness: Harness = make_harness(checkpoint, self.directories, base=maker.fresh_base())
        self.digests = [self.harness.adapters[name].spec.digest for name in self.directories]
        part_bytes = max(self.harness.core.residency.sizes.num_bytes([digest]) for digest in self.digests)
        self.cache = AdapterCache(0, self.harness.cache._source)  # nothing is known of sizes, all is read when needed
        for adapter in self.harness.adapters.values():
            self.cache.put(adapter)
        self.observer = CountingObserver()
        self._settings = EngineSettings(
            kv_cache_bytes=2**22, adapter_arena_bytes=ROOM * part_bytes, poison_adapter_arena=True
        )
        self._base = maker.fresh_base()

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        engine = Engine(
            lambda wake: EngineCore(self._base, self.cache, self._settings, self.observer, wake), self._settings
        )
        engine.start()
        try:
            async with asyncio.timeout(60):
                yield engine
        finally:
            await engine.stop()
            engine.core.check_integrity()

    async def ask(self, engine: Engine, index: int, request_id: str = "r") -> None:
        """Generate under an adapter, and see that it was that one."""
        request = self.harness.request(request_id, [20], f"m{index}", stop_token_ids=(), max_new_tokens=2)
        events = [event async for event in engine.submit(request, lambda num_tokens: None)]
        assert [one for event in events for delta in event.deltas for one in delta.token_ids] == [marker_of(index)] * 2


@pytest.fixture
def stage(checkpoint: Path, maker: MarkerMaker, tmp_path: Path) -> Stage:
    return Stage(checkpoint, maker, tmp_path)


async def wait_until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


async def read_on(stream: EventStream) -> None:
    async for event in stream:
        assert not event.is_last


async def refusal_of(engine: Engine, digest: str) -> tuple[type[MotleyError], str]:
    with pytest.raises(MotleyError) as caught:
        await engine.keep(digest)
    return type(caught.value), caught.value.reason


def test_what_is_kept_is_there_before_anybody_asks_and_stays_under_pressure_until_it_is_let_go(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.engine() as engine:
            kept = stage.digests[0]
            assert not engine.is_on_device(kept)
            await engine.keep(kept)
            assert (engine.is_on_device(kept), engine.stats().num_resident_parts) == (True, 1)
            await engine.keep(kept)
            for _ in range(2):
                for index in range(1, NUM_ADAPTERS):
                    await stage.ask(engine, index)
                    assert engine.is_on_device(kept)
            assert stage.observer.num_evictions > ROOM
            num_binds = engine.core.residency.num_binds
            await stage.ask(engine, 0)
            assert engine.core.residency.num_binds == num_binds
            engine.unkeep(kept)
            for index in range(1, NUM_ADAPTERS):
                await stage.ask(engine, index)
            assert not engine.is_on_device(kept)
            await stage.ask(engine, 0)

    asyncio.run(scenario())


def test_what_together_would_take_more_than_half_is_refused_and_what_was_kept_first_stays(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.engine() as engine:
            outcomes = await asyncio.gather(*(engine.keep(one) for one in stage.digests[:4]), return_exceptions=True)
            assert outcomes[:2] == [None, None]
            for refused in outcomes[2:]:
                assert isinstance(refused, ResourceExhaustedError)
                assert refused.reason == "PINS_FULL"
            assert await refusal_of(engine, stage.digests[2]) == (ResourceExhaustedError, "PINS_FULL")
            await asyncio.gather(*(stage.ask(engine, index, f"r{index}") for index in range(NUM_ADAPTERS)))
            assert all(map(engine.is_on_device, stage.digests[:2]))
            engine.unkeep(stage.digests[0])
            await engine.keep(stage.digests[2])

    asyncio.run(scenario())


@pytest.mark.parametrize(("damage", "reason"), [("gone", "ADAPTER_UNREADABLE"), ("changed", "ADAPTER_CHANGED")])
def test_files_that_do_not_hold_it_any_more_are_told_without_their_paths_and_nothing_is_kept(
    stage: Stage, maker: MarkerMaker, tmp_path: Path, damage: str, reason: str
) -> None:
    directory = stage.directories["m1"]
    shutil.move(directory, tmp_path / "aside")
    if damage == "changed":
        maker.make(directory, 9, "lora")

    async def scenario() -> None:
        async with stage.engine() as engine:
            with pytest.raises(FailedPreconditionError) as caught:
                await engine.keep(stage.digests[1])
            assert caught.value.reason == reason
            assert str(tmp_path) not in caught.value.message
            assert stage.digests[1] not in engine.core.residency.kept
            shutil.rmtree(directory, ignore_errors=True)
            shutil.move(tmp_path / "aside", directory)
            await engine.keep(stage.digests[1])
            assert engine.is_on_device(stage.digests[1])

    asyncio.run(scenario())


def test_a_digest_that_the_cache_does_not_know_is_a_fault_and_harms_nobody(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.engine() as engine:
            assert await refusal_of(engine, "sha256:unknown") == (InternalError, "ENGINE_FAULT")
            await engine.keep(stage.digests[0])

    asyncio.run(scenario())


def test_one_that_is_let_go_on_its_way_aborts_who_waits_and_one_whose_caller_left_arrives(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.engine() as engine:
            with stage.cache._lock:  # the engine is held up by it
                keeping = asyncio.ensure_future(engine.keep(stage.digests[0]))
                leaving = asyncio.ensure_future(engine.keep(stage.digests[1]))
                await asyncio.sleep(0.05)
                engine.unkeep(stage.digests[0])
                leaving.cancel()
            with pytest.raises(AbortedError) as caught:
                await keeping
            assert caught.value.reason == "ADAPTER_UNPINNED"
            await wait_until(lambda: engine.is_on_device(stage.digests[1]))
            for index in (0, *range(2, NUM_ADAPTERS)):
                await stage.ask(engine, index)
            assert not engine.is_on_device(stage.digests[0])
            assert engine.is_on_device(stage.digests[1])

    asyncio.run(scenario())


def test_keeping_finds_room_while_others_take_all_of_it_again_and_again(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.engine() as engine:
            is_over = asyncio.Event()

            async def press(first: int) -> None:
                index = first
                while not is_over.is_set():
                    await stage.ask(engine, index, f"{first}")
                    index = 1 + index % (NUM_ADAPTERS - 1)

            pressing = [asyncio.ensure_future(press(first)) for first in range(1, NUM_ADAPTERS)]
            await asyncio.sleep(0.3)
            async with asyncio.timeout(30):
                await engine.keep(stage.digests[0])
            await asyncio.sleep(0.3)
            assert engine.is_on_device(stage.digests[0])
            is_over.set()
            await asyncio.gather(*pressing)

    asyncio.run(scenario())


def test_a_request_that_is_ended_midway_tells_its_reader_why_and_frees_its_blocks_and_pins(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.engine() as engine:
            lease = stage.cache.acquire(stage.digests[0])
            request = stage.harness.request("r", [20], "m0", stop_token_ids=(), max_new_tokens=100_000)
            stream = engine.submit(request, lambda num_tokens: lease.release())
            await anext(stream)
            assert engine.stats().num_used_blocks > 0
            assert engine.core.residency.num_pins == 1
            engine.cancel("r", DELETED)
            engine.cancel("nobody", DELETED)
            with pytest.raises(FailedPreconditionError) as caught:
                await read_on(stream)
            assert caught.value.reason == "ADAPTER_DELETED"
            assert (engine.stats().num_used_blocks, engine.stats().num_running) == (0, 0)
            assert (engine.core.residency.num_pins, stage.cache.num_leases) == (0, 0)
            await stage.ask(engine, 0, "r")

    asyncio.run(scenario())


def test_what_is_forgotten_leaves_no_size_behind_and_is_served_again_when_asked_for(stage: Stage) -> None:
    async def scenario() -> None:
        async with stage.engine() as engine:
            sizes = engine.core.residency.sizes
            for index in range(NUM_ADAPTERS):
                await stage.ask(engine, index)
            assert len(sizes) == NUM_ADAPTERS
            for digest in stage.digests:
                engine.forget(digest)
            assert 0 < engine.stats().num_resident_parts < NUM_ADAPTERS
            await wait_until(lambda: len(sizes) == engine.stats().num_resident_parts)
            await stage.ask(engine, 0)
            assert len(sizes) == engine.stats().num_resident_parts, "what left is forgotten, what came is known"

    asyncio.run(scenario())
