"""Messages as large as the wire takes, made to be dear to read: refused at once, while health answers."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from motley.v1 import inference_pb2
from motley_server.admission import Admission
from motley_server.errors import ResourceExhaustedError
from motley_server.rpc import inference
from rpc_harness import CONTEXT, MIB, Shell, read_refusal, serving, text_request

Code = grpc.StatusCode
SERVICE = "/motley.v1.InferenceService/"
ROOM = 16 * MIB - 64  # for the heads of the messages around it


def part(number: int, content: bytes) -> bytes:
    """Return the bytes of a field that has a length."""
    head, length = bytearray([number << 3 | 2]), len(content)
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    return bytes([*head, length]) + content


def many(number: int, content: bytes = b"") -> bytes:
    """Return as many small items of a repeated field as a message has room for."""
    item = part(number, content)
    return item * (ROOM // len(item))


PROMPT = part(1, part(1, b"hello"))
TURNS = part(1, part(2, many(1)))
IDS = part(1, part(3, part(1, bytes([5]) * ROOM)))
HOSTILE: dict[str, tuple[str, bytes, str, str]] = {
    "turns to generate": ("Generate", TURNS, "OUT_OF_RANGE", "prompt.chat.messages"),
    "turns to stream": ("GenerateStream", TURNS, "OUT_OF_RANGE", "prompt.chat.messages"),
    "turns to tokenize": ("Tokenize", TURNS, "OUT_OF_RANGE", "prompt.chat.messages"),
    "ids to generate": ("Generate", IDS, "CONTEXT_EXCEEDED", "prompt"),
    "ids to score": ("Score", IDS, "CONTEXT_EXCEEDED", "prompt"),
    "ids to tokenize": ("Tokenize", IDS, "CONTEXT_EXCEEDED", "prompt"),
    "ids to detokenize": ("Detokenize", part(1, bytes([5]) * ROOM), "OUT_OF_RANGE", "ids"),
    "adapters to generate": ("Generate", PROMPT + many(2), "TOO_MANY_ADAPTERS", "adapters"),
    "adapters to score": ("Score", PROMPT + many(3), "TOO_MANY_ADAPTERS", "adapters"),
    "continuations": ("Score", PROMPT + many(2), "OUT_OF_RANGE", "continuations"),
    "stop strings": ("Generate", PROMPT + part(3, many(12)), "OUT_OF_RANGE", "sampling.stop"),
    "stop ids": ("Generate", PROMPT + part(3, part(13, bytes([5]) * ROOM)), "OUT_OF_RANGE", "sampling.stop_token_ids"),
    "biases": (
        "Generate",
        PROMPT + part(3, b"".join(part(9, bytes([8, i & 127 | 128, i >> 7])) for i in range(128, 1300))),
        "OUT_OF_RANGE",
        "sampling.logit_bias",
    ),
    "a long name": ("Generate", PROMPT + part(2, part(1, b"x" * ROOM)), "INVALID_ADAPTER_NAME", "adapters[0].name"),
}


async def send(shell: Shell, method: str, data: bytes) -> None:
    """Send bytes as they are, so that only the server's work takes time."""
    if method == "GenerateStream":
        await shell.channel.unary_stream(SERVICE + method)(data).read()
    else:
        await shell.channel.unary_unary(SERVICE + method)(data)


def refuse_to_read(*arguments: object) -> None:
    """Stand for what makes an object of every item: a hostile message must never come so far."""
    raise AssertionError("the items were read before they were counted")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_dear_message_is_refused_before_its_items_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, data, reason, field = HOSTILE[name]
    assert len(data) <= 16 * MIB

    async def scenario() -> None:
        async with serving() as shell:
            if name != "a long name":  # one item, however long, is read and then refused
                for reader in ("generation_from", "scoring_from", "prompt_from"):
                    monkeypatch.setattr(inference, reader, refuse_to_read)
                monkeypatch.setattr(Admission, "detokenize", refuse_to_read)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send(shell, method, data)
            refusal = read_refusal(caught.value)
            assert (refusal.code, refusal.reason, refusal.field) == (Code.INVALID_ARGUMENT, reason, field)
            refused = float(method in ("Generate", "GenerateStream", "Score"))
            assert shell.count("motley_requests_total", outcome="rejected") == refused

    asyncio.run(scenario())


def test_lists_of_the_largest_length_are_taken() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            request = text_request(
                max_new_tokens=1, stop=["#"] * 16, stop_token_ids=[3] * 1024, logit_bias=dict.fromkeys(range(128), 0.0)
            )
            assert (await shell.inference.Generate(request)).usage.completion_tokens == 1
            chat = inference_pb2.Prompt(chat={"messages": [{"role": "u"}] * 4096})
            assert len((await shell.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=chat))).ids) == 1 + 3 * 4096
            tokens = inference_pb2.Prompt(tokens={"ids": [5] * CONTEXT})
            assert len((await shell.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=tokens))).ids) == CONTEXT
            ids = inference_pb2.DetokenizeRequest(ids=[97] * MIB)
            assert (await shell.inference.Detokenize(ids)).text == "a" * MIB

    asyncio.run(scenario())


def test_health_answers_while_many_ids_become_text() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            decode, has_begun, may_go_on = shell.tokenizer.decode, threading.Event(), threading.Event()

            def linger(ids: object) -> str:
                has_begun.set()
                may_go_on.wait(20)
                return decode(ids)  # type: ignore[arg-type]

            shell.tokenizer.decode = linger  # type: ignore[method-assign, assignment]
            request = inference_pb2.DetokenizeRequest(ids=[97] * 100_000)
            answer = asyncio.ensure_future(shell.inference.Detokenize(request))
            while not has_begun.is_set():
                await asyncio.sleep(0.01)
            await health_pb2_grpc.HealthStub(shell.channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert not answer.done()
            may_go_on.set()
            assert (await answer).text == "a" * 100_000

    asyncio.run(scenario())


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
def test_an_answer_over_the_wires_bound_is_a_typed_refusal(streaming: bool) -> None:
    async def scenario() -> None:
        async with serving(max_message_bytes=64 * 1024) as shell:
            shell.engine.padding = 100_000
            method = "GenerateStream" if streaming else "Generate"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send(shell, method, text_request(max_new_tokens=2, logprobs=1).SerializeToString())
            refusal = read_refusal(caught.value)
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE")
            assert shell.leases.held == []

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["n" * 100_000, "\N{GRINNING FACE}" * 10_000])
def test_a_refusal_that_quotes_much_still_fits_trailers(name: str) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.refusal = ResourceExhaustedError(f"{name} is full", reason="QUEUE_FULL")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await shell.inference.Generate(text_request())
            refusal = read_refusal(caught.value)
            assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert refusal.message == name.encode()[:1000].decode() + "..."

    asyncio.run(scenario())
