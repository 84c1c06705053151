"""The reader's end of a request: order, ends, cancellation, and what a slow reader costs."""

from __future__ import annotations

import asyncio

import pytest
from motley_server.engine.event_stream import RequestEventStream
from motley_server.engine.types import CandidateDelta, RequestEvent, Usage
from motley_server.errors import CancelledRequestError, InternalError, ResourceExhaustedError


class Recorder:
    """Count what the stream asks of the engine and of the lease holder."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.num_ended = 0
        self.num_generated_tokens = 0

    def end(self, num_generated_tokens: int) -> None:
        self.num_ended += 1
        self.num_generated_tokens = num_generated_tokens


def make_stream(max_events: int = 8) -> tuple[RequestEventStream, Recorder]:
    recorder = Recorder()
    return RequestEventStream("r", recorder.end, max_events, recorder.cancelled.append), recorder


def token(number: int) -> RequestEvent:
    return RequestEvent("r", (CandidateDelta(0, "x", (number,)),))


LAST = RequestEvent("r", usage=Usage(1, 1, 0))


def test_events_come_in_order_and_end_after_the_last() -> None:
    async def body() -> list[RequestEvent]:
        stream, recorder = make_stream()
        for event in (token(1), token(2), LAST):
            stream.push(event)
        assert recorder.num_ended == 1
        return [event async for event in stream]

    assert asyncio.run(body()) == [token(1), token(2), LAST]


def test_what_is_ready_can_be_taken_as_one() -> None:
    async def body() -> list[RequestEvent]:
        stream, _ = make_stream()
        stream.push(token(1))
        stream.push(token(2))
        return stream.take_ready()

    assert asyncio.run(body()) == [token(1), token(2)]


def test_an_error_is_raised_after_the_events_before_it() -> None:
    async def body() -> None:
        stream, recorder = make_stream()
        stream.push(token(1))
        stream.push(RequestEvent("r", error=InternalError("broken", reason="ENGINE_FAULT")))
        assert await anext(stream) == token(1)
        with pytest.raises(InternalError, match="broken"):
            await anext(stream)
        assert recorder.num_ended == 1

    asyncio.run(body())


def test_closing_early_cancels_once_and_the_lease_ends_with_the_engine_s_last_event() -> None:
    async def body() -> None:
        stream, recorder = make_stream()
        stream.push(token(1))
        await stream.aclose()
        await stream.aclose()
        assert recorder.cancelled == ["r"]
        assert recorder.num_ended == 0
        stream.push(RequestEvent("r", error=CancelledRequestError("gone", reason="CANCELLED")))
        assert recorder.num_ended == 1

    asyncio.run(body())


def test_whoever_is_told_of_the_end_hears_of_every_token_read_or_not() -> None:
    async def body() -> None:
        stream, recorder = make_stream(max_events=3)
        stream.push(RequestEvent("r", (CandidateDelta(0, "x", (1, 2)), CandidateDelta(1, "y", (3,)))))
        await anext(stream)
        for number in range(4):
            stream.push(token(number))
        await stream.aclose()
        stream.push(token(4))
        stream.push(RequestEvent("r", error=CancelledRequestError("gone", reason="CANCELLED")))
        assert recorder.num_generated_tokens == 8

    asyncio.run(body())


def test_closing_after_the_end_cancels_nothing() -> None:
    async def body() -> None:
        stream, recorder = make_stream()
        stream.push(LAST)
        await stream.aclose()
        assert recorder.cancelled == []

    asyncio.run(body())


def test_a_cancelled_reader_cancels_its_request() -> None:
    async def body() -> None:
        stream, recorder = make_stream()
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert recorder.cancelled == ["r"]

    asyncio.run(body())


def test_a_reader_that_falls_behind_loses_its_request_and_hears_why() -> None:
    async def body() -> None:
        stream, recorder = make_stream(max_events=3)
        for number in range(6):
            stream.push(token(number))
        await stream.aclose()
        assert recorder.cancelled == ["r"], "cancelled once, whoever closes besides"
        stream.push(RequestEvent("r", error=CancelledRequestError("gone", reason="CANCELLED")))
        with pytest.raises(ResourceExhaustedError) as caught:
            await anext(stream)
        assert caught.value.reason == "SLOW_READER"
        assert recorder.num_ended == 1

    asyncio.run(body())
