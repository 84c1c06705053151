"""Drive an engine by hand, step by step, without threads or gRPC, and gather what it answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from counting_observer import CountingObserver
from motley_adapters.cache import AdapterCache
from motley_adapters.directories import AdapterDirectories
from motley_adapters.spec import Adapter
from motley_bases.base import Base
from motley_bases.loader import load_base
from motley_server.engine.core import EngineCore
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import (
    FinishReason,
    GenerateRequest,
    RequestEvent,
    SamplingParams,
    ServedAdapter,
    TokenLogprobs,
    Usage,
)


@dataclass
class Answer:
    """Everything an engine said of one request."""

    text: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    finish_reason: dict[int, FinishReason] = field(default_factory=dict)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    usage: Usage | None = None
    error: Exception | None = None
    num_events: int = 0

    def add(self, event: RequestEvent) -> None:
        """Take the next event."""
        assert self.usage is None, "an event after the last"
        assert self.error is None, "an event after the error"
        self.num_events += 1
        for delta in event.deltas:
            self.text[delta.index] = self.text.get(delta.index, "") + delta.text
            self.token_ids.setdefault(delta.index, []).extend(delta.token_ids)
            self.logprobs.setdefault(delta.index, []).extend(delta.logprobs)
            if delta.finish_reason is not None:
                self.finish_reason[delta.index] = delta.finish_reason
        self.prompt_logprobs += event.prompt_logprobs
        self.usage, self.error = event.usage, event.error


@dataclass
class Harness:
    """An engine, its watcher, and its adapters by name."""

    core: EngineCore
    base: Base
    observer: CountingObserver
    adapters: dict[str, Adapter]
    cache: AdapterCache
    woken: threading.Event = field(default_factory=threading.Event)

    def step(self) -> list[RequestEvent]:
        """Step as the engine's thread does: where there is nothing to do but to wait for adapters, wait."""
        self.woken.clear()
        events = [*self.core.expire(), *self.core.step()]
        if self.core.is_waiting_for_adapters:
            assert self.woken.wait(10), "nobody can go on, and nothing arrives"
        return events

    def request(
        self,
        request_id: str,
        prompt: Iterable[int],
        *adapters: str | tuple[str, float],
        prompt_logprobs: bool = False,
        num_context_tokens: int = 0,
        deadline: float | None = None,
        tenant_id: str = "local",
        **sampling: Any,
    ) -> GenerateRequest:
        """Make a request; eos ids of the base stop it unless `stop_token_ids` says otherwise."""
        sampling.setdefault("max_new_tokens", 8)
        sampling.setdefault("stop_token_ids", self.base.spec.generation.eos_token_ids)
        sampling.setdefault("eos_token_ids", self.base.spec.generation.eos_token_ids)
        named = (item if isinstance(item, tuple) else (item, 1.0) for item in adapters)
        served = [self._served(name, weight) for name, weight in named]
        return GenerateRequest(
            request_id=request_id,
            tenant_id=tenant_id,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**sampling),
            adapters=tuple(sorted(served, key=lambda adapter: adapter.digest)),
            deadline=deadline,
            prompt_logprobs=prompt_logprobs,
            num_context_tokens=num_context_tokens,
        )

    def run(
        self, requests: Iterable[GenerateRequest], *, before_step: Callable[[int], None] | None = None
    ) -> dict[str, Answer]:
        """Submit all requests at once, step until nothing is left, check that nothing leaked."""
        answers: dict[str, Answer] = {}
        for request in requests:
            answers[request.request_id] = Answer()
            assert self.core.add(request, time.monotonic()) is None
        step = 0
        while self.core.has_work:
            if before_step is not None:
                before_step(step)
            for event in self.step():
                answers[event.request_id].add(event)
            self.core.check_integrity()
            step += 1
            assert step < 20_000, "the engine makes no progress"
        assert self.core.pool.num_used == 0
        assert self.core.num_requests == 0
        assert self.core.residency.num_pins == 0
        return answers

    def _served(self, name: str, weight: float) -> ServedAdapter:
        spec = self.adapters[name].spec
        return ServedAdapter(name, 1, spec.digest, weight, spec.trained_on, spec.kind)


def make_harness(
    directory: Path,
    adapters: dict[str, Path] | None = None,
    *,
    base: Base | None = None,
    host_bytes: int = 2**30,
    **settings: Any,
) -> Harness:
    """Load a base in fp32 on CPU and an engine over it; `base` reuses one that is loaded already."""
    base = base or load_base(directory, dtype="float32", device=torch.device("cpu"))
    source = AdapterDirectories(base.spec, base_tensor=base.tensor)
    cache = AdapterCache(host_bytes, source)
    loaded = {}
    for name, path in (adapters or {}).items():
        loaded[name] = source.read(path)
        cache.put(loaded[name])
    settings.setdefault("kv_cache_bytes", 32 * 2**20)
    observer = CountingObserver()
    settings.setdefault("adapter_arena_bytes", 32 * 2**20)
    woken = threading.Event()
    core = EngineCore(base, cache, EngineSettings(**settings), observer, woken.set)
    return Harness(core, base, observer, loaded, cache, woken)
