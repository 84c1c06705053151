"""Both clients against a server that answers by rule: the same calls, the same results, the same errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from typing import Any

import grpc
import pytest
from fake_motley_server import BASE_FINGERPRINT, FakeServer, digest_of, rich_status, serving
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from motley_client import (
    AsyncClient,
    ChatMessage,
    Client,
    DeadlineExceededError,
    FinishReason,
    NotFoundError,
    ResourceExhaustedError,
    ServedAdapter,
    StreamPart,
    UnavailableError,
)

Ask = Callable[..., Any]


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def address(fake: FakeServer) -> Iterator[str]:
    with serving(fake) as address:
        yield address


def ask_blocking(address: str, call: str, *args: Any, key: str | None = None, **kwargs: Any) -> Any:
    with Client(address, key) as client:
        result = getattr(client, call)(*args, **kwargs)
        return list(result) if call == "stream" else result


def ask_asyncio(address: str, call: str, *args: Any, key: str | None = None, **kwargs: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(address, key) as client:
            result = getattr(client, call)(*args, **kwargs)
            return [part async for part in result] if call == "stream" else await result

    return asyncio.run(run())


@pytest.fixture(params=[ask_blocking, ask_asyncio], ids=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


def test_generate_sends_what_was_asked_and_returns_what_answered(ask: Ask, fake: FakeServer, address: str) -> None:
    answer = ask(
        address, "generate", "reverse: stone =", adapters=("reverse", ("next", 0.5)), temperature=0.0, n=2, logprobs=0
    )

    ((_, sent),) = fake.calls
    assert [(one.name, one.weight) for one in sent.adapters] == [("reverse", 0.0), ("next", 0.5)]
    assert (sent.sampling.HasField("temperature"), sent.sampling.n) == (True, 2)
    assert (answer.text, answer.finish_reason, answer.request_id) == (" enots", FinishReason.STOP, "req-1")
    assert answer.token_ids == tuple(map(ord, " enots"))
    assert answer.logprobs == (-0.5,) * 6
    assert [candidate.index for candidate in answer.candidates] == [0, 1]
    assert answer.served_by.base_fingerprint == BASE_FINGERPRINT
    assert answer.served_by.adapters == (
        ServedAdapter("reverse", 1, digest_of("reverse"), 1.0, "undeclared", "lora", 0),
        ServedAdapter("next", 1, digest_of("next"), 0.5, "undeclared", "lora", 0),
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.cached_prompt_tokens) == (7, 6, 2)


def test_messages_and_token_ids_are_prompts_too(ask: Ask, fake: FakeServer, address: str) -> None:
    ask(address, "generate", messages=[ChatMessage("user", "hi")])
    ask(address, "generate", token_ids=[1, 2])

    assert [sent.prompt.WhichOneof("content") for _, sent in fake.calls] == ["chat", "tokens"]


def test_stream_yields_served_by_first_text_in_pieces_and_usage_last(ask: Ask, address: str) -> None:
    parts: list[StreamPart] = ask(address, "stream", "upper: stone =")

    assert [part.text for part in parts] == ["", " ", "S", "T", "O", "N", "E", ""]
    assert [part.served_by is not None for part in parts] == [True] + [False] * 7
    assert [part.usage is not None for part in parts] == [False] * 7 + [True]
    assert parts[6].candidates[0].finish_reason is FinishReason.STOP


def test_score_keeps_the_order_of_the_continuations(ask: Ask, address: str) -> None:
    scored = ask(address, "score", "is it? ", ["yes", "perhaps"], adapters=["reverse"])

    assert [one.logprob for one in scored.scores] == [-1.5, -3.5]
    assert [one.is_greedy for one in scored.scores] == [True, False]
    assert [token.chosen.token_id for token in scored.scores[0].tokens] == list(map(ord, "yes"))
    assert scored.served_by.adapters[0].name == "reverse"


def test_tokenize_detokenize_info_capacity_and_drain(ask: Ask, fake: FakeServer, address: str) -> None:
    assert ask(address, "tokenize", "ab") == (97, 98)
    assert ask(address, "detokenize", (97, 98)) == "ab"
    info = ask(address, "info")
    assert (info.version, info.limits.context_length, info.adapter_kinds) == ("9.9", 256, ("lora",))
    assert ask(address, "capacity").kv_tokens_free == 60
    drained = ask(address, "drain", 2.0)
    assert (drained.finished_requests, drained.cancelled_requests) == (3, 1)
    assert fake.calls[-1][1].timeout == Duration(seconds=2)


def test_the_key_goes_with_unary_and_streaming_calls(ask: Ask, fake: FakeServer, address: str) -> None:
    ask(address, "generate", "x", key="mk_a_b")
    ask(address, "stream", "x", key="mk_a_b")
    ask(address, "generate", "x")

    assert [sent.get("authorization") for sent in fake.metadata] == ["Bearer mk_a_b", "Bearer mk_a_b", None]


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_a_refusal_becomes_its_typed_error(ask: Ask, fake: FakeServer, address: str, call: str) -> None:
    fake.failures.append(
        rich_status(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the queue is full",
            error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="motley.dev"),
            error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2)),
        )
    )

    with pytest.raises(ResourceExhaustedError) as caught:
        ask(address, call, "x")

    assert (caught.value.reason, caught.value.retry_after_seconds) == ("QUEUE_FULL", 2.0)


def test_a_stream_that_fails_midway_keeps_what_came_before(fake: FakeServer, address: str) -> None:
    fake.fails_in_stream = rich_status(
        grpc.StatusCode.NOT_FOUND, "gone", error_details_pb2.ErrorInfo(reason="GONE", domain="motley.dev")
    )
    with Client(address) as client:
        parts = client.stream("upper: stone =")

        assert [next(parts).text, next(parts).text] == ["", " "]
        with pytest.raises(NotFoundError):
            next(parts)


def test_closing_a_stream_cancels_the_request(fake: FakeServer, address: str) -> None:
    fake.hold = True
    with Client(address) as client:
        with closing(client.stream("upper: stone =")) as parts:
            assert [next(parts).text, next(parts).text] == ["", " "]

        assert fake.was_cancelled.wait(timeout=10)


def test_closing_an_asyncio_stream_cancels_the_request(fake: FakeServer, address: str) -> None:
    async def run() -> bool:
        async with AsyncClient(address) as client:
            async with aclosing(client.stream("upper: stone =")) as parts:
                assert [(await anext(parts)).text, (await anext(parts)).text] == ["", " "]
            return await asyncio.to_thread(fake.was_cancelled.wait, 10)

    fake.hold = True
    assert asyncio.run(run())


@pytest.mark.parametrize(("of_client", "of_call"), [(600.0, 0.3), (0.3, None)])
def test_the_timeout_of_a_call_stands_in_for_the_clients(
    fake: FakeServer, address: str, of_client: float, of_call: float | None
) -> None:
    fake.hold = True
    with Client(address, timeout=of_client) as client, pytest.raises(DeadlineExceededError):
        list(client.stream("upper: stone =", timeout=of_call))


def test_reads_are_tried_again_while_unavailable_and_generate_is_not(ask: Ask, fake: FakeServer, address: str) -> None:
    draining = rich_status(
        grpc.StatusCode.UNAVAILABLE, "draining", error_details_pb2.ErrorInfo(reason="DRAINING", domain="motley.dev")
    )
    fake.failures.extend([draining, draining])
    assert ask(address, "info").version == "9.9"
    assert len(fake.calls) == 3

    fake.failures.append(draining)
    with pytest.raises(UnavailableError) as caught:
        ask(address, "generate", "x")
    assert caught.value.reason == "DRAINING"
    assert len(fake.calls) == 4


def test_no_server_is_unreachable_by_address(ask: Ask) -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1") as caught:
        ask("127.0.0.1:1", "generate", "x")

    assert caught.value.is_unreachable


def test_one_asyncio_client_carries_many_requests_at_once(fake: FakeServer, address: str) -> None:
    async def run() -> list[str]:
        async with AsyncClient(address) as client:
            answers = await asyncio.gather(*(client.generate(f"upper: w{number} =") for number in range(50)))
            return [answer.text for answer in answers]

    assert asyncio.run(run()) == [f" W{number}" for number in range(50)]
