"""The engine itself: schedule, run, sample; request by request, step by step, without threads.

Owns the requests in hand. `engine.py` puts it on a thread of its own; tests call `step` by hand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from motley_adapters.cache import AdapterCache
from motley_adapters.identity import cache_seed, set_identity
from motley_adapters.residency import Residency
from motley_bases.base import Base
from motley_kernels.adapter_delta.pool import UnitPool
from torch import Tensor

from motley_server.engine.adapter_keeper import AdapterKeeper
from motley_server.engine.block_pool import BlockPool
from motley_server.engine.detokenizer import IncrementalDetokenizer
from motley_server.engine.input_batch import wanted_positions
from motley_server.engine.model_runner import ModelRunner
from motley_server.engine.observer import EngineObserver, StepReport
from motley_server.engine.request_adapters import RequestAdapters
from motley_server.engine.request_state import RequestState
from motley_server.engine.sampler import Sampler, SamplingRow, score_rows
from motley_server.engine.scheduler import Scheduled, Scheduler
from motley_server.engine.sequence import Sequence
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import GenerateRequest, RequestEvent
from motley_server.errors import DeadlineExceededError, InternalError, MotleyError

log = logging.getLogger(__name__)


class EngineCore:
    """Answer requests under their own adapters, all of them in the same forward passes."""

    def __init__(
        self,
        base: Base,
        adapters: AdapterCache,
        settings: EngineSettings,
        observer: EngineObserver,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the memory for keys, values and adapters.

        Semantics: `wake` is called on another thread when an adapter that a step waits for may have arrived.
        """
        self.runner = ModelRunner(base, settings)
        self.residency = _make_residency(base, adapters, settings, observer, wake)
        self.keeper = AdapterKeeper(self.residency)
        self.pool = BlockPool(self.runner.num_blocks, settings.block_size)
        self.is_waiting_for_adapters = False  # the last step had nothing to do but to wait
        self._adapters = RequestAdapters(self.residency, adapters)
        self.scheduler = Scheduler(
            self.pool,
            self._adapters,
            observer,
            max_running=settings.max_running,
            token_budget=settings.token_budget,
            prefix_cache=settings.prefix_cache,
        )
        self._base = base
        self._observer = observer
        self._sampler = Sampler()
        self._requests: dict[str, RequestState] = {}
        self._context_length = min(base.spec.context_length, self.pool.num_blocks * settings.block_size)

    @property
    def has_work(self) -> bool:
        """Tell whether any request is unfinished."""
        return self.scheduler.has_work

    @property
    def num_requests(self) -> int:
        """Return the requests in hand."""
        return len(self._requests)

    def add(self, request: GenerateRequest, arrival: float) -> RequestEvent | None:
        """Take a request in hand; it waits until a step has room for it.

        Semantics: a request that cannot be begun fails by itself: its one event is returned, and nobody else notices.
        """
        try:
            self._adapters.add(request)
            identity = set_identity((adapter.digest, adapter.weight) for adapter in request.adapters)
            seed = cache_seed(identity, self._base.spec.identity, request.tenant_id.encode())
            state = RequestState(request, arrival, seed, self._make_detokenizer, self._observer)
            sequence = state.start()
        except MotleyError as error:
            return self._refuse(request, error)
        except Exception:
            log.exception("request %s could not be begun", request.request_id)
            return self._refuse(request, _fault("the request could not be begun"))
        self._requests[request.request_id] = state
        self.scheduler.add(sequence)
        return None

    def cancel(self, request_id: str, error: MotleyError) -> RequestEvent | None:
        """Drop a request for the reason given, and give its blocks back; None if it has ended already."""
        return self._fail(request_id, error) if request_id in self._requests else None

    def expire(self) -> list[RequestEvent]:
        """Drop the requests whose deadline has passed."""
        now = time.monotonic()
        late = [request_id for request_id, state in self._requests.items() if state.is_late(now)]
        message = "the deadline passed before the answer was complete"
        return [self._fail(request_id, DeadlineExceededError(message, reason="DEADLINE")) for request_id in late]

    def fail_all(self, error: MotleyError) -> list[RequestEvent]:
        """Drop every request with the same error."""
        return [self._fail(request_id, error) for request_id in list(self._requests)]

    def step(self) -> list[RequestEvent]:
        """Run one forward pass, if there is anybody who can take part, and return what came of it."""
        started = time.monotonic()
        events = self._fail_unloaded()
        scheduled = self.scheduler.schedule()
        self.residency.fetch_kept()
        events += [self._fail(request_id, error) for request_id, error in self._adapters.take_refusals().items()]
        batch = [entry for entry in scheduled if entry.sequence.request.request_id in self._requests]
        self.is_waiting_for_adapters = self.has_work and not batch
        if not batch:
            return events
        for entry in batch:
            self._state(entry.sequence).note_scheduled()
        try:
            self._postprocess(batch, self.runner.run(batch), events)
        except Exception:
            log.exception("a forward pass failed")
            events += self._fail_batch(batch)
        self._report(batch, time.monotonic() - started)
        return events

    def check_integrity(self) -> None:
        """Raise AssertionError or RuntimeError unless every block, sequence and adapter is accounted for."""
        self.scheduler.check_integrity()
        self.residency.check_integrity()
        if self.residency.num_pins != len(self.scheduler.running):
            raise AssertionError(f"{self.residency.num_pins} pins, {len(self.scheduler.running)} sequences run")
        queued = {id(sequence) for sequence in (*self.scheduler.running, *self.scheduler.waiting)}
        known = {id(sequence) for state in self._requests.values() for sequence in state.sequences}
        if queued != known:
            raise AssertionError("the scheduler's sequences are not those of the requests in hand")

    def close(self) -> None:
        """End the thread that loads adapters."""
        self.residency.close()

    def _fail_unloaded(self) -> list[RequestEvent]:
        """Bind what was loaded; fail exactly the requests that wait for an adapter that could not be."""
        errors = self._adapters.poll()
        if not errors:
            return []
        waiting = dict.fromkeys(sequence.request.request_id for sequence in self.scheduler.waiting)
        events = []
        for request_id in waiting:
            adapters = self._requests[request_id].request.adapters
            error = next((errors[adapter.digest] for adapter in adapters if adapter.digest in errors), None)
            if error is not None:
                events.append(self._fail(request_id, error))
        return events

    def _refuse(self, request: GenerateRequest, error: MotleyError) -> RequestEvent:
        self._adapters.drop(request.request_id)
        return RequestEvent(request.request_id, error=error)

    def _postprocess(self, batch: list[Scheduled], logits: list[Tensor], events: list[RequestEvent]) -> None:
        failures = self._score(batch, logits)
        self.scheduler.complete(batch)
        events += [self._fail(request_id, error) for request_id, error in failures.items()]
        sampling = []
        for entry, rows in zip(batch, logits, strict=True):
            sequence = entry.sequence
            if sequence.num_uncomputed_tokens > 0 or sequence.request.request_id in failures:
                continue
            if sequence.request.prompt_logprobs:
                self._state(sequence).finish_scoring(sequence)
                self.scheduler.remove(sequence)
            else:
                sampling.append((sequence, rows))
        events += self._sample(sampling)
        for request_id in dict.fromkeys(entry.sequence.request.request_id for entry in batch):
            if (event := self._take_event(request_id)) is not None:
                events.append(event)

    def _score(self, batch: list[Scheduled], logits: list[Tensor]) -> dict[str, InternalError]:
        failures = {}
        for entry, rows in zip(batch, logits, strict=True):
            sequence = entry.sequence
            if sequence.request.prompt_logprobs:
                targets = [sequence.token_ids[position + 1] for position in wanted_positions(entry)]
                try:
                    sequence.prompt_logprobs.extend(score_rows(rows, targets, sequence.params.logprobs or 0))
                except InternalError as error:
                    failures[sequence.request.request_id] = error
        return failures

    def _sample(self, sampling: list[tuple[Sequence, Tensor]]) -> list[RequestEvent]:
        if not sampling:
            return []
        rows = [_sampling_row(sequence) for sequence, _ in sampling]
        failed = []
        tokens = self._sampler.sample(torch.cat([logits for _, logits in sampling]), rows)
        for (sequence, _), token in zip(sampling, tokens, strict=True):
            state = self._requests.get(sequence.request.request_id)
            if state is None:  # another candidate of the request has just failed
                continue
            if token.error is not None:
                error = InternalError(token.error, reason="BAD_LOGITS")
                failed.append(self._fail(sequence.request.request_id, error))
                continue
            try:
                is_finished = state.add_token(sequence, token.token_id, token.logprobs, self._context_length)
            except Exception:
                log.exception("a token of request %s could not be turned into text", sequence.request.request_id)
                failed.append(self._fail(sequence.request.request_id, _fault("a token could not be turned into text")))
                continue
            if is_finished:
                self.scheduler.remove(sequence)
            for candidate in reversed(state.fork()):
                self.scheduler.add_first(candidate)
        return failed

    def _take_event(self, request_id: str) -> RequestEvent | None:
        state = self._requests.get(request_id)
        event = state.take_event() if state is not None else None
        if event is not None and event.is_last:
            del self._requests[request_id]
            self._adapters.drop(request_id)
        return event

    def _fail_batch(self, batch: list[Scheduled]) -> list[RequestEvent]:
        error = _fault("the forward pass that this request was part of failed")
        request_ids = {entry.sequence.request.request_id: None for entry in batch}
        return [self._fail(request_id, error) for request_id in request_ids if request_id in self._requests]

    def _report(self, batch: list[Scheduled], seconds: float) -> None:
        adapters = {adapter.digest for entry in batch for adapter in entry.sequence.request.adapters}
        running = {sequence.request.request_id for sequence in self.scheduler.running}
        self._observer.step_finished(
            StepReport(
                seconds=seconds,
                num_tokens=sum(entry.num_tokens for entry in batch),
                num_sequences=len(batch),
                num_distinct_adapters=len(adapters),
                num_running=len(running),
                num_waiting=len(self._requests) - len(running),
                num_used_blocks=self.pool.num_used,
                num_total_blocks=self.pool.num_blocks,
            )
        )

    def _state(self, sequence: Sequence) -> RequestState:
        return self._requests[sequence.request.request_id]

    def _make_detokenizer(self, request: GenerateRequest) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self._base.tokenizer, request.prompt_token_ids, request.sampling.stop)

    def _fail(self, request_id: str, error: MotleyError) -> RequestEvent:
        state = self._requests.pop(request_id)
        self._adapters.drop(request_id)
        for sequence in state.sequences:
            self.scheduler.remove(sequence)
        return state.fail(error)


def _make_residency(
    base: Base, adapters: AdapterCache, settings: EngineSettings, observer: EngineObserver, wake: Callable[[], None]
) -> Residency:
    # A CPU multiplies float32 faster than bfloat16; a GPU reads half the bytes.
    dtype = torch.float32 if base.device.type == "cpu" else base.dtype
    pool = UnitPool(settings.adapter_arena_bytes, device=base.device, dtype=dtype)
    return Residency(base.sites, pool, adapters, observer, wake, poison=settings.poison_adapter_arena)


def _sampling_row(sequence: Sequence) -> SamplingRow:
    return SamplingRow(
        params=sequence.params,
        candidate=sequence.index,
        num_output_tokens=sequence.num_output_tokens,
        edits=sequence.logit_edits,
    )


def _fault(message: str) -> InternalError:
    return InternalError(message, reason="ENGINE_FAULT")
