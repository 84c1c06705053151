"""An engine that computes nothing: it plays a script for each request, through the real event streams."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from motley_server.engine.api import DrainReport, EngineStats
from motley_server.engine.event_stream import RequestEventStream
from motley_server.engine.types import (
    CandidateDelta,
    FinishReason,
    GenerateRequest,
    RequestEvent,
    TokenLogprobs,
    Usage,
)
from motley_server.errors import CancelledRequestError, MotleyError, UnavailableError

FIRST_LETTER = ord("a")


def greedy_letter(step: int) -> int:
    """Return the token that every candidate gets at a step: a, b, c, ..."""
    return FIRST_LETTER + step % 26


class ScriptedEngine:
    """Answer every request with the alphabet, one letter a step; score a token id t with -t/100."""

    def __init__(self, *, reader_queue_events: int = 1024) -> None:
        self.submitted: list[GenerateRequest] = []
        self.num_ends: Counter[str] = Counter()
        self.cancelled: list[str] = []
        self.cancel_errors: dict[str, MotleyError] = {}  # by request, what `cancel` ended it with
        self.on_device: set[str] = set()  # digests
        self.kept: list[str] = []  # digests, in the order in which they came to be kept
        self.forgotten: list[str] = []  # digests
        self.keep_refusal: MotleyError | None = None  # raised by keep
        self.may_keep = asyncio.Event()  # keep waits for it
        self.may_keep.set()
        self.refusal: MotleyError | None = None  # raised by submit
        self.failure: MotleyError | None = None  # the second event of every request
        self.fault: Exception | None = None  # raised by submit: no MotleyError
        self.step_seconds = 0.0
        self.heartbeat_age = 0.0
        self.padding = 0  # letters more in the text of each delta
        self.may_step = asyncio.Event()
        self.may_step.set()
        self._reader_queue_events = reader_queue_events
        self._streams: dict[str, RequestEventStream] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_draining = False

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def submit(self, request: GenerateRequest, on_end: Callable[[int], None]) -> RequestEventStream:
        if self._is_draining:
            raise UnavailableError("the server is draining", reason="DRAINING", retry_after_seconds=5.0)
        for error in (self.refusal, self.fault):
            if error is not None:
                raise error

        def end(num_generated_tokens: int) -> None:
            self.num_ends[request.request_id] += 1
            on_end(num_generated_tokens)

        stream = RequestEventStream(request.request_id, end, self._reader_queue_events, self.cancelled.append)
        self.submitted.append(request)
        self._streams[request.request_id] = stream
        task = asyncio.get_running_loop().create_task(self._play(request, stream))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.request_id, None))
        return stream

    def cancel(self, request_id: str, error: MotleyError) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._tasks[request_id].cancel()
            self.cancelled.append(request_id)
            self.cancel_errors[request_id] = error
            stream.push(RequestEvent(request_id, error=error))

    async def keep(self, digest: str) -> None:
        await self.may_keep.wait()
        if self.keep_refusal is not None:
            raise self.keep_refusal
        self.on_device.add(digest)
        if digest not in self.kept:
            self.kept.append(digest)

    def unkeep(self, digest: str) -> None:
        if digest in self.kept:
            self.kept.remove(digest)

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)

    def is_on_device(self, digest: str) -> bool:
        return digest in self.on_device

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._streams),
            num_waiting=3,
            num_used_blocks=25,
            num_total_blocks=100,
            block_size=16,
            kv_bytes_per_block=1000,
            num_waiting_for_adapters=1,
            num_resident_parts=7,
            num_used_arena_bytes=512,
            num_arena_bytes=2048,
        )

    def heartbeat_age_seconds(self) -> float:
        return self.heartbeat_age

    async def drain(self, timeout_seconds: float) -> DrainReport:
        self._is_draining = True
        present = list(self._streams)
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_seconds)
        left = [request_id for request_id in present if request_id in self._streams]
        self.cancelled.extend(left)
        self.may_step.set()
        await self.stop()
        return DrainReport(len(present) - len(left), len(left))

    @property
    def has_ended(self) -> bool:
        return self._is_draining and not self._tasks

    async def wait_ended(self) -> None:
        while not self.has_ended:
            await asyncio.sleep(0.01)

    def hurry(self) -> None:
        self.cancelled.extend(self._streams)
        self.may_step.set()

    async def stop(self) -> None:
        self._is_draining = True
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def _play(self, request: GenerateRequest, stream: RequestEventStream) -> None:
        events = [_scored(request)] if request.prompt_logprobs else _letters(request, self.padding)
        for index, event in enumerate(events):
            await asyncio.sleep(self.step_seconds)
            await self.may_step.wait()
            if request.request_id in self.cancelled:
                event = RequestEvent(request.request_id, error=CancelledRequestError("gone", reason="CANCELLED"))
            elif self.failure is not None and index == 1:
                event = RequestEvent(request.request_id, error=self.failure)
            if event.is_last:
                del self._streams[request.request_id]
            stream.push(event)
            if event.is_last:
                return


def _letters(request: GenerateRequest, padding: int) -> list[RequestEvent]:
    num_steps, params = request.sampling.max_new_tokens, request.sampling
    events = []
    for step in range(num_steps):
        token_id, is_last = greedy_letter(step), step == num_steps - 1
        entry = TokenLogprobs(token_id, -0.5, ((token_id, -0.5),)[: params.logprobs])
        delta = [
            CandidateDelta(
                index,
                chr(token_id) + "." * padding,
                (token_id,),
                () if params.logprobs is None else (entry,),
                FinishReason.LENGTH if is_last else None,
            )
            for index in range(params.n)
        ]
        usage = Usage(len(request.prompt_token_ids), num_steps * params.n, 2) if is_last else None
        events.append(RequestEvent(request.request_id, tuple(delta), usage=usage))
    return events


def _scored(request: GenerateRequest) -> RequestEvent:
    ids = request.prompt_token_ids[request.num_context_tokens :]
    entries = tuple(TokenLogprobs(one, -one / 100, ((min(one, ord("m")), -0.1),)) for one in ids)
    return RequestEvent(request.request_id, prompt_logprobs=entries, usage=Usage(len(request.prompt_token_ids), 0, 1))
