"""Many more adapters than the device has room for: every answer is its own adapter's, nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from counting_observer import CountingObserver
from engine_harness import Answer, Harness, make_harness
from marker_adapters import KINDS, MarkerMaker, draw_prompts, make_marker_base, marker_of
from motley_adapters.cache import AdapterCache, Lease
from motley_adapters.directories import AdapterDirectories
from motley_adapters.spec import Adapter
from motley_bases.loader import load_base
from motley_server.engine.core import EngineCore
from motley_server.engine.engine import Engine
from motley_server.engine.scheduler import MAX_OVERTAKEN
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import GenerateRequest
from motley_server.errors import CancelledRequestError, DeadlineExceededError, MotleyError, ResourceExhaustedError

GONE = CancelledRequestError("the caller is gone", reason="CANCELLED")
FAINT = 0.01  # the weight of an adapter that takes part in a set and must not show


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_marker_base(tmp_path_factory.mktemp("marker-base"))


@pytest.fixture(scope="module")
def maker(checkpoint: Path) -> MarkerMaker:
    return MarkerMaker(load_base(checkpoint, dtype="float32", device=torch.device("cpu")), checkpoint)


def make_markers(maker: MarkerMaker, root: Path, count: int) -> dict[str, Path]:
    """Write adapters m0, m1, ... of all kinds in turn."""
    return {f"m{i}": maker.make(root / f"m{i}", i, KINDS[i % len(KINDS)]) for i in range(count)}


def bytes_of(harness: Harness, name: str) -> int:
    """Return the arena bytes of an adapter's own part."""
    return harness.core.residency.sizes.num_bytes([harness.adapters[name].spec.digest])


def make_cramped(
    checkpoint: Path,
    maker: MarkerMaker,
    adapters: dict[str, Path],
    room: int,
    *,
    host_share: float = 1.0,
    **settings: int,
) -> Harness:
    """Make an engine with room for so many adapters of average size on the device, and a share of all on the host."""
    roomy = make_harness(checkpoint, adapters, base=maker.fresh_base())
    mean = sum(bytes_of(roomy, name) for name in adapters) // len(adapters)
    return make_harness(
        checkpoint,
        adapters,
        base=maker.fresh_base(),
        host_bytes=int(roomy.cache.nbytes * host_share),
        adapter_arena_bytes=room * mean + 8192,
        poison_adapter_arena=True,
        **settings,
    )


@dataclass
class Storm:
    """Requests over many adapters, a few of them cancelled or late, and what was wrong with the answers."""

    harness: Harness
    names: list[str]
    num_requests: int
    seed: int
    in_hand: int = 48
    expected: dict[str, int] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    leases: dict[str, list[Lease]] = field(default_factory=dict)
    num_wrong: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    most_overtaken: int = 0

    def run(self, *, check_every: int) -> None:
        """Keep so many requests in hand until all are answered."""
        rng = random.Random(self.seed)
        prompts = draw_prompts(self.harness.base.spec.vocab_size, 12, self.seed)
        num_submitted = step = 0
        while num_submitted < self.num_requests or self.answers:
            while num_submitted < self.num_requests and len(self.answers) < self.in_hand:
                self._submit(str(num_submitted), rng.choice(prompts), rng)
                num_submitted += 1
            if rng.random() < 0.3:
                self._cancel(rng.choice(sorted(self.answers)))
            for event in self.harness.step():
                self.answers[event.request_id].add(event)
                if event.is_last:
                    self._end(event.request_id)
            waiting = self.harness.core.scheduler.waiting
            self.most_overtaken = max([self.most_overtaken, *(sequence.num_overtaken for sequence in waiting)])
            step += 1
            if step % check_every == 0:
                self.harness.core.check_integrity()
                self.harness.cache.check_integrity()
            assert step < 50 * self.num_requests, "the engine makes no progress"

    def _submit(self, request_id: str, prompt: list[int], rng: random.Random) -> None:
        own, other = rng.sample(self.names, 2)
        pairs = [(own, 1.0), (other, FAINT)] if rng.random() < 0.15 else [(own, 1.0)]
        deadline = time.monotonic() + 0.02 if rng.random() < 0.03 else None
        request = self.harness.request(
            request_id, prompt, *pairs, max_new_tokens=rng.randint(1, 5), stop_token_ids=(), deadline=deadline
        )
        self.expected[request_id] = marker_of(int(own[1:]))
        self.answers[request_id] = Answer()
        self.leases[request_id] = [self.harness.cache.acquire(adapter.digest) for adapter in request.adapters]
        assert self.harness.core.add(request, time.monotonic()) is None

    def _cancel(self, request_id: str) -> None:
        event = self.harness.core.cancel(request_id, GONE)
        assert event is not None
        self.answers[request_id].add(event)
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        answer, marker = self.answers.pop(request_id), self.expected.pop(request_id)
        for lease in self.leases.pop(request_id):
            lease.release()
        self.num_wrong += sum(token != marker for token in answer.token_ids.get(0, ()))
        error = answer.error
        assert error is None or isinstance(error, CancelledRequestError | DeadlineExceededError), error
        self.outcomes["answered" if error is None else type(error).__name__] += 1


def weather(harness: Harness, names: list[str], num_requests: int, *, seed: int, check_every: int) -> Storm:
    storm = Storm(harness, names, num_requests, seed)
    storm.run(check_every=check_every)
    assert storm.num_wrong == 0
    assert harness.observer.num_evictions > 100
    assert harness.observer.num_failed_loads == 0
    assert storm.most_overtaken <= MAX_OVERTAKEN
    assert storm.outcomes["CancelledRequestError"] > num_requests // 50
    assert storm.outcomes["answered"] > num_requests // 2
    assert (harness.cache.num_leases, harness.core.residency.num_pins, harness.core.num_requests) == (0, 0, 0)
    assert harness.core.pool.num_used == 0
    harness.core.check_integrity()
    harness.cache.check_integrity()
    return storm


def test_ten_times_more_adapters_than_fit_answer_each_with_its_own_marker(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path
) -> None:
    adapters = make_markers(maker, tmp_path, 40)
    harness = make_cramped(checkpoint, maker, adapters, 4, host_share=0.5, max_running=12)
    weather(harness, list(adapters), 400, seed=1, check_every=1)


@pytest.mark.soak
def test_ten_thousand_requests_over_two_hundred_adapters_with_room_for_twenty(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path
) -> None:
    adapters = make_markers(maker, tmp_path, 200)
    harness = make_cramped(checkpoint, maker, adapters, 20, host_share=0.3, max_running=24)
    weather(harness, list(adapters), 10_000, seed=2, check_every=20)


def test_a_request_for_a_whole_arena_gets_its_turn_while_others_keep_coming(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path
) -> None:
    adapters = {f"m{i}": maker.make(tmp_path / f"m{i}", i, "s2ft", seed=i) for i in range(8)}
    harness = make_cramped(checkpoint, maker, adapters, 4, max_running=8)
    whole = harness.request("whole", [30, 31], *((f"m{i}", 1.0) for i in range(3)), stop_token_ids=(), max_new_tokens=2)
    num_after = -1
    for index in range(400):
        name = f"m{3 + index % 2}"  # both always in use: the three would not fit beside them
        request = harness.request(f"{index}", [20, index % 9 + 20], name, stop_token_ids=(), max_new_tokens=6)
        assert harness.core.add(request, time.monotonic()) is None
        if index == 10:
            assert harness.core.add(whole, time.monotonic()) is None
        events = harness.step()
        num_after += num_after >= 0 or index >= 10
        if any(event.request_id == "whole" and event.usage is not None for event in events):
            break
    else:
        raise AssertionError("it starved")
    assert MAX_OVERTAKEN < num_after <= 3 * MAX_OVERTAKEN
    assert harness.core.scheduler.waiting, "nobody was there to starve it"


def test_what_came_for_those_in_the_line_is_pinned_before_what_shall_be_kept_is_fetched(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path
) -> None:
    adapters = {f"m{i}": maker.make(tmp_path / f"m{i}", i, "s2ft", seed=i) for i in range(3)}
    harness = make_cramped(checkpoint, maker, adapters, 2)
    core = harness.core
    for name in ("m0", "m1"):
        request = harness.request(name, [20], name, stop_token_ids=(), max_new_tokens=2)
        assert core.add(request, time.monotonic()) is None
    core.step()
    deadline = time.monotonic() + 10
    while core.residency._loader._results.qsize() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    core.residency.keep(harness.adapters["m2"].spec.digest)
    core.step()
    assert len(core.scheduler.running) == 2


def test_what_cannot_fit_is_refused_when_it_comes_and_nobody_else_notices(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path
) -> None:
    adapters = make_markers(maker, tmp_path, 8)
    harness = make_cramped(checkpoint, maker, adapters, 2)
    request = harness.request("much", [20], *((name, 0.1) for name in adapters))
    event = harness.core.add(request, time.monotonic())
    assert event is not None
    assert isinstance(event.error, ResourceExhaustedError)
    assert (event.error.reason, event.error.field) == ("ADAPTER_TOO_LARGE", "adapters")
    assert harness.core.num_requests == 0
    answers = harness.run([harness.request("one", [20], "m1", max_new_tokens=2, stop_token_ids=())])
    assert answers["one"].token_ids[0] == [marker_of(1)] * 2


def test_what_turns_out_not_to_fit_after_it_was_measured_is_refused_then(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path
) -> None:
    adapters = make_markers(maker, tmp_path, 4)
    harness = make_harness(checkpoint, adapters, base=maker.fresh_base(), host_bytes=0, adapter_arena_bytes=1024)
    answers = harness.run([harness.request("large", [20], "m0"), harness.request("base", [20], max_new_tokens=2)])
    assert isinstance(answers["large"].error, ResourceExhaustedError)
    assert answers["base"].error is None


@pytest.mark.parametrize(("damage", "reason"), [("gone", "ADAPTER_UNREADABLE"), ("changed", "ADAPTER_CHANGED")])
def test_a_load_that_fails_fails_those_who_wait_for_it_and_no_others(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path, damage: str, reason: str
) -> None:
    adapters = make_markers(maker, tmp_path, 5)
    harness = make_harness(checkpoint, adapters, base=maker.fresh_base(), host_bytes=0)
    shutil.rmtree(adapters["m2"])
    if damage == "changed":
        maker.make(adapters["m2"], 9, "lora")
    sets = {"0": ("m0",), "1": ("m1",), "2": ("m2",), "set": ("m1", "m2"), "base": ()}
    requests = [harness.request(i, [20], *names, max_new_tokens=2, stop_token_ids=()) for i, names in sets.items()]
    answers = harness.run(requests)
    failed = {request_id: answer.error for request_id, answer in answers.items() if answer.error is not None}
    assert set(failed) == {"2", "set"}
    for error in failed.values():
        assert isinstance(error, MotleyError)
        assert (error.reason, error.field) == (reason, "adapters")
        assert str(tmp_path) not in error.message
    assert answers["1"].token_ids[0] == [marker_of(1)] * 2
    assert harness.core.residency.num_loads == 0


def test_a_name_that_is_loaded_anew_answers_with_its_new_content_whatever_the_prefix_cache_holds(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path
) -> None:
    directory = maker.make(tmp_path / "name", 1, "lora")
    harness = make_harness(checkpoint, {"name": directory}, base=maker.fresh_base())
    prefix = draw_prompts(harness.base.spec.vocab_size, 1, 5)[0] * 8

    def ask(request_id: str) -> tuple[list[int], int]:
        answer = harness.run([harness.request(request_id, prefix[:64], "name", max_new_tokens=3, stop_token_ids=())])
        usage = answer[request_id].usage
        assert usage is not None
        return answer[request_id].token_ids[0], usage.cached_prompt_tokens

    assert ask("first") == ([marker_of(1)] * 3, 0)
    assert ask("again") == ([marker_of(1)] * 3, 48)
    shutil.rmtree(directory)
    maker.make(directory, 2, "lora")
    adapter = AdapterDirectories(harness.base.spec).read(directory)
    harness.cache.put(adapter)
    harness.adapters["name"] = adapter
    assert ask("new") == ([marker_of(2)] * 3, 0)


class SlowSource:
    """Hold every load back until it is let go."""

    def __init__(self, adapter: Adapter) -> None:
        self.open = threading.Event()
        self._adapter = adapter

    def load(self, digest: str) -> Adapter:
        assert self.open.wait(20)
        return self._adapter


def test_the_engine_sleeps_while_all_wait_for_adapters_and_wakes_when_one_arrives(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = maker.fresh_base()
    adapter = AdapterDirectories(base.spec).read(maker.make(tmp_path / "a", 3, "goat"))
    source = SlowSource(adapter)
    cache, settings = AdapterCache(0, source), EngineSettings(kv_cache_bytes=2**22)
    cache.put(adapter)
    harness = make_harness(checkpoint, {}, base=base)
    harness.adapters["a"] = adapter
    steps: list[float] = []
    step = EngineCore.step
    monkeypatch.setattr(EngineCore, "step", lambda core: [steps.append(time.monotonic()), step(core)][1])

    async def scenario() -> tuple[list[int], float, int]:
        engine = Engine(lambda wake: EngineCore(base, cache, settings, CountingObserver(), wake), settings)
        engine.start()
        request = harness.request("slow", [20], "a", max_new_tokens=3, stop_token_ids=())
        stream = engine.submit(request, lambda num_generated_tokens: None)
        await asyncio.sleep(0.6)
        num_steps, waiting = len(steps), engine.stats().num_waiting_for_adapters
        assert waiting == 1
        assert engine.heartbeat_age_seconds() < 0.5
        source.open.set()
        opened = time.monotonic()
        tokens = [token async for event in stream for delta in event.deltas for token in delta.token_ids]
        seconds = time.monotonic() - opened
        await engine.stop()
        return tokens, seconds, num_steps

    tokens, seconds, num_steps = asyncio.run(scenario())
    assert tokens == [marker_of(3)] * 3
    assert num_steps <= 8, "it steps without anything to do"
    assert seconds < 5


def test_candidates_and_scores_run_under_pins_of_their_own(
    checkpoint: Path, maker: MarkerMaker, tmp_path: Path
) -> None:
    adapters = make_markers(maker, tmp_path, 6)
    harness = make_cramped(checkpoint, maker, adapters, 2, max_running=4)
    requests: list[GenerateRequest] = []
    for index in range(6):
        requests.append(
            harness.request(f"n{index}", [20, 21], f"m{index}", n=3, seed=1, max_new_tokens=2, stop_token_ids=())
        )
        scored = [20, marker_of(index), marker_of(index)]
        requests.append(
            harness.request(
                f"s{index}",
                scored,
                f"m{index}",
                prompt_logprobs=True,
                num_context_tokens=1,
                logprobs=1,
                max_new_tokens=1,
            )
        )
    answers = harness.run(requests)
    for index in range(6):
        assert answers[f"n{index}"].token_ids == {candidate: [marker_of(index)] * 2 for candidate in range(3)}
        assert all(entry.logprob > -0.01 for entry in answers[f"s{index}"].prompt_logprobs)
