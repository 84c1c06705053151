"""The engine's front and thread over a scripted core: what becomes of callers when the engine is slow or stuck."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from motley_server.engine import engine as engine_module
from motley_server.engine.engine import Engine
from motley_server.engine.event_stream import RequestEventStream
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import (
    CandidateDelta,
    GenerateRequest,
    KeepOutcome,
    RequestEvent,
    SamplingParams,
    Usage,
)
from motley_server.errors import (
    AbortedError,
    FailedPreconditionError,
    MotleyError,
    ResourceExhaustedError,
    UnavailableError,
)
from motley_server.lifecycle import Lifecycle


class ScriptedKeeper:
    """Give the outcomes that it was told to give, and note what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.outcomes: queue.SimpleQueue[KeepOutcome] = queue.SimpleQueue()

    def keep(self, ticket: int, digest: str) -> None:
        self.asked.append(("keep", ticket, digest))

    def unkeep(self, digest: str) -> None:
        self.asked.append(("unkeep", digest))

    def forget(self, digest: str) -> None:
        self.asked.append(("forget", digest))

    def take_outcomes(self) -> list[KeepOutcome]:
        return [self.outcomes.get() for _ in range(self.outcomes.qsize())]


class ScriptedCore:
    """Answer every request with one token a step, `num_steps` steps; `stuck` blocks a step, `deadly` makes it raise."""

    def __init__(self, num_steps: int = 10**6) -> None:
        self.runner = SimpleNamespace(warm_up=lambda: None)
        self.keeper = ScriptedKeeper()
        self.stuck = threading.Event()
        self.release = threading.Event()
        self.deadly = threading.Event()
        self.is_waiting_for_adapters = False
        self._num_steps = num_steps
        self._left: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add(self, request: GenerateRequest, arrival: float) -> None:
        self._left[request.request_id] = self._num_steps

    def cancel(self, request_id: str, error: MotleyError) -> RequestEvent | None:
        return RequestEvent(request_id, error=error) if self._left.pop(request_id, None) is not None else None

    def expire(self) -> list[RequestEvent]:
        return []

    def step(self) -> list[RequestEvent]:
        if self.deadly.is_set():
            raise RuntimeError("planted")
        if self.stuck.is_set():
            self.release.wait(30)
        time.sleep(0.002)
        return [self._advance(request_id) for request_id in list(self._left)]

    def close(self) -> None:
        self.is_closed = True

    def fail_all(self, error: MotleyError) -> list[RequestEvent]:
        return [event for request_id in list(self._left) if (event := self.cancel(request_id, error)) is not None]

    def _advance(self, request_id: str) -> RequestEvent:
        self._left[request_id] -= 1
        usage = None
        if self._left[request_id] == 0:
            del self._left[request_id]
            usage = Usage(1, self._num_steps, 0)
        return RequestEvent(request_id, (CandidateDelta(0, "x", (1,)),), usage=usage)


class Callers:
    """Requests in flight, how they ended, and how many gave their leases back."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.num_ended = 0
        sampling = SamplingParams(max_new_tokens=1)
        streams = [engine.submit(GenerateRequest(f"r{i}", "local", (1,), sampling), self._end) for i in range(count)]
        self._readers = [asyncio.ensure_future(self._read(stream)) for stream in streams]

    async def outcomes(self) -> list[str]:
        return [await reader for reader in self._readers]

    def _end(self, num_generated_tokens: int) -> None:
        self.num_ended += 1

    async def _read(self, stream: Any) -> str:
        try:
            async for event in stream:
                if event.usage is not None:
                    return "finished"
        except UnavailableError as error:
            return error.reason if error.retry_after_seconds else "no time to come back"
        return "ended without usage"


def start(core: ScriptedCore) -> Engine:
    make_core: Any = lambda wake: core  # noqa: E731
    engine = Engine(make_core, EngineSettings(max_running=4, max_waiting=4))
    engine.start()
    return engine


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CANCEL_SECONDS", 0.5)
    monkeypatch.setattr(engine_module, "STOP_SECONDS", 0.5)


def test_a_drain_waits_for_what_runs() -> None:
    async def scenario() -> None:
        engine = start(ScriptedCore(num_steps=30))
        callers = Callers(engine, 3)
        report = await engine.drain(20)
        assert (report.num_finished, report.num_cancelled) == (3, 0)
        assert await callers.outcomes() == ["finished"] * 3
        await engine.stop()
        assert engine.has_ended
        assert callers.num_ended == 3

    asyncio.run(scenario())


def test_what_outlives_a_drain_hears_that_the_server_drains() -> None:
    async def scenario() -> None:
        engine = start(ScriptedCore())
        callers = Callers(engine, 3)
        report = await engine.drain(0.1)
        assert (report.num_finished, report.num_cancelled) == (0, 3)
        assert await callers.outcomes() == ["DRAINING"] * 3
        assert callers.num_ended == 3
        await engine.stop()

    asyncio.run(scenario())


def test_a_stuck_engine_keeps_neither_drain_nor_stop_nor_callers() -> None:
    async def scenario() -> None:
        core = ScriptedCore()
        engine = start(core)
        core.stuck.set()
        callers = Callers(engine, 2)
        async with asyncio.timeout(20):  # the step is stuck for 30
            await engine.drain(0.1)
            assert await callers.outcomes() == ["DRAINING"] * 2
            await engine.stop()
        assert not engine.has_ended
        core.release.set()  # what it still says of those requests is nobody's business any more
        await asyncio.sleep(0.1)

    asyncio.run(scenario())


def test_a_second_signal_ends_the_patience_of_a_drain() -> None:
    async def scenario() -> None:
        engine = start(ScriptedCore())

        async def announce() -> None:
            return None

        lifecycle = Lifecycle(engine, 60, announce)
        callers = Callers(engine, 2)
        lifecycle.interrupt()
        await asyncio.sleep(0.1)
        lifecycle.interrupt()
        async with asyncio.timeout(20):  # the first signal gave a minute
            await lifecycle.wait_drained()
        assert await callers.outcomes() == ["DRAINING"] * 2
        await engine.stop()

    asyncio.run(scenario())


def test_an_engine_that_dies_fails_its_callers_and_says_so() -> None:
    async def scenario() -> None:
        core = ScriptedCore()
        engine = start(core)
        callers = Callers(engine, 2)
        core.deadly.set()
        async with asyncio.timeout(5):
            await engine.wait_ended()
        assert await callers.outcomes() == ["ENGINE_STOPPED"] * 2
        assert callers.num_ended == 2
        with pytest.raises(UnavailableError, match="has stopped"):
            Callers(engine, 1)

    asyncio.run(scenario())


def test_requests_beyond_the_bound_are_refused_and_those_within_are_not() -> None:
    async def scenario() -> None:
        engine = start(ScriptedCore())
        Callers(engine, 8)
        with pytest.raises(ResourceExhaustedError) as caught:
            Callers(engine, 1)
        assert caught.value.reason == "QUEUE_FULL"
        await engine.drain(0)
        await engine.stop()

    asyncio.run(scenario())


def test_a_cancelled_request_ends_with_the_error_given_and_one_that_is_unknown_is_nothing() -> None:
    async def scenario() -> None:
        engine = start(ScriptedCore())
        num_tokens: list[int] = []
        request = GenerateRequest("r", "local", (1,), SamplingParams(max_new_tokens=1))
        stream = engine.submit(request, num_tokens.append)
        await anext(stream)
        engine.cancel("another", FailedPreconditionError("no", reason="WRONG"))
        engine.cancel("r", FailedPreconditionError("its adapter was deleted", reason="ADAPTER_DELETED"))
        engine.cancel("r", FailedPreconditionError("too late", reason="WRONG"))
        with pytest.raises(FailedPreconditionError) as caught:
            await asyncio.wait_for(read_all(stream), 10)
        assert caught.value.reason == "ADAPTER_DELETED"
        assert len(num_tokens) == 1
        await engine.stop()

    asyncio.run(scenario())


def test_every_keeper_hears_of_its_own_ticket_alone() -> None:
    async def scenario() -> None:
        core = ScriptedCore()
        engine = start(core)
        one, same = (asyncio.ensure_future(engine.keep("a")) for _ in range(2))
        gone = asyncio.ensure_future(engine.keep("b"))
        await wait_until(lambda: len(core.keeper.asked) == 3)
        gone.cancel()
        engine._deliver_kept([KeepOutcome(2)])  # before the task has seen that it is cancelled
        for outcome in (KeepOutcome(7), KeepOutcome(2), KeepOutcome(1, AbortedError("no", reason="NO"))):
            core.keeper.outcomes.put(outcome)
        with pytest.raises(AbortedError):
            await same
        assert not one.done()
        core.keeper.outcomes.put(KeepOutcome(0))
        await one
        engine.unkeep("a")
        engine.forget("a")
        await wait_until(lambda: core.keeper.asked[3:] == [("unkeep", "a"), ("forget", "a")])
        await engine.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("ending", ["stopped", "stuck", "dead"])
def test_keepers_do_not_outlive_the_engine(ending: str) -> None:
    async def scenario() -> None:
        core = ScriptedCore()
        engine = start(core)
        callers = Callers(engine, 1)  # so that it steps
        keeper = asyncio.ensure_future(engine.keep("a"))
        await wait_until(lambda: bool(core.keeper.asked))
        {"stopped": threading.Event(), "stuck": core.stuck, "dead": core.deadly}[ending].set()
        await asyncio.sleep(0.1)
        async with asyncio.timeout(20):
            await (engine.wait_ended() if ending == "dead" else engine.stop())
            with pytest.raises(UnavailableError) as caught:
                await keeper
            assert await callers.outcomes() == ["ENGINE_STOPPED"]
        assert caught.value.reason == "ENGINE_STOPPED"
        with pytest.raises(UnavailableError):
            await engine.keep("a")
        core.release.set()

    asyncio.run(scenario())


async def read_all(stream: Any) -> None:
    async for _ in stream:
        pass


async def wait_until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)


def test_a_tenant_that_fills_the_line_leaves_others_their_part_of_it() -> None:
    async def scenario() -> None:
        engine = start(ScriptedCore(num_steps=10**6))  # 8 places
        names = itertools.count()

        def num_let_in(tenant: str, count: int) -> int:
            num = 0
            for _ in range(count):
                request = GenerateRequest(f"{next(names)}", tenant, (1,), SamplingParams(max_new_tokens=1))
                with contextlib.suppress(ResourceExhaustedError):
                    streams.append(engine.submit(request, lambda _: None))
                    num += 1
            return num

        streams: list[RequestEventStream] = []
        assert num_let_in("loud", 20) == 8
        assert [num_let_in("quiet", 20), num_let_in("third", 20)] == [4, 2]
        assert num_let_in("loud", 1) == 0
        for stream in streams[1:8]:  # loud keeps one, of fourteen
            await stream.aclose()
        while len(engine._streams) > 7:
            await asyncio.sleep(0.01)
        assert [num_let_in("quiet", 20), num_let_in("loud", 20)] == [1, 1]
        await engine.stop()

    asyncio.run(scenario())
