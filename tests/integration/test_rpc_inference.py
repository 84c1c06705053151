"""The inference service over a real wire: what messages carry, in which order, and what a caller's leaving does."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import pytest
from motley.v1 import common_pb2, inference_pb2
from paper_library import digest_of
from rpc_harness import eventually, read_refusal, serving, text_request
from scripted_engine import greedy_letter

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def stream_request(text: str = "hello", *adapters: str, **sampling: object) -> inference_pb2.GenerateStreamRequest:
    return inference_pb2.GenerateStreamRequest(
        prompt=inference_pb2.Prompt(text=text),
        adapters=[common_pb2.AdapterRef(name=name) for name in adapters],
        sampling=inference_pb2.SamplingParams(**sampling),  # type: ignore[arg-type]
    )


async def read_to_the_end(call: grpc.aio.UnaryStreamCall[Any, Any]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def test_generate_answers_every_candidate_and_says_what_served_it() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            request = text_request("hello", max_new_tokens=3, n=2, logprobs=1)
            request.adapters.add(name="zeta", weight=0.5)
            request.adapters.add(name="alpha")
            request.adapters.add(name="public/shared", weight=0)
            answer = await shell.inference.Generate(request)
            assert [(one.index, one.text, list(one.token_ids)) for one in answer.candidates] == [
                (0, "abc", [97, 98, 99]),
                (1, "abc", [97, 98, 99]),
            ]
            assert {one.finish_reason for one in answer.candidates} == {common_pb2.FINISH_REASON_LENGTH}
            assert [entry.chosen.token_id for entry in answer.candidates[0].logprobs] == [97, 98, 99]
            assert [[top.token_id for top in entry.top] for entry in answer.candidates[1].logprobs] == [
                [97],
                [98],
                [99],
            ]
            assert answer.usage == common_pb2.Usage(prompt_tokens=6, completion_tokens=6, cached_prompt_tokens=2)
            assert answer.served_by.base_model == "paper"
            assert [(one.name, one.version, one.digest, one.weight) for one in answer.served_by.adapters] == [
                ("zeta", 2, digest_of("2"), 0.5),
                ("alpha", 1, digest_of("9"), 1.0),
            ]
            assert shell.leases.held == []

    asyncio.run(scenario())


def test_generate_stream_and_score_say_each_adapter_s_kind_and_which_channels_overlap() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            request, stream = text_request("hello", max_new_tokens=2), stream_request("hello", max_new_tokens=2)
            scoring = inference_pb2.ScoreRequest(prompt=request.prompt, continuations=["a"])
            for message in (request, stream, scoring):
                message.adapters.extend(common_pb2.AdapterRef(name=name) for name in ("rows", "alpha", "columns"))
            first, *_ = [message async for message in shell.inference.GenerateStream(stream)]
            for answer in (await shell.inference.Generate(request), first, await shell.inference.Score(scoring)):
                assert [(one.name, one.kind, one.overlapping_channels) for one in answer.served_by.adapters] == [
                    ("alpha", "lora", 0),
                    ("columns", "s2ft", 2),
                    ("rows", "s2ft", 2),
                ]

    asyncio.run(scenario())


def test_logprobs_zero_is_the_chosen_token_alone_and_unset_is_none() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            chosen = await shell.inference.Generate(text_request(logprobs=0))
            none = await shell.inference.Generate(text_request())
            assert [len(entry.top) for entry in chosen.candidates[0].logprobs] == [0] * 8
            assert len(none.candidates[0].logprobs) == 0

    asyncio.run(scenario())


def test_a_stream_begins_with_what_serves_it_and_ends_with_its_usage() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.step_seconds = 0.002
            call = shell.inference.GenerateStream(
                stream_request("hello", "alpha", max_new_tokens=26), metadata=(("x-request-id", "call-7"),)
            )
            messages = [message async for message in call]
            assert messages[0].request_id == "call-7"
            assert [one.name for one in messages[0].served_by.adapters] == ["alpha"]
            assert len(messages[0].candidates) == 1
            assert not any(message.request_id or message.HasField("served_by") for message in messages[1:])
            assert not any(message.HasField("usage") for message in messages[:-1])
            assert messages[-1].usage.completion_tokens == 26
            assert "".join(one.text for message in messages for one in message.candidates) == ALPHABET
            reasons = [one.finish_reason for message in messages for one in message.candidates]
            assert reasons == [common_pb2.FINISH_REASON_UNSPECIFIED] * (len(reasons) - 1) + [
                common_pb2.FINISH_REASON_LENGTH
            ]
            assert dict(await call.trailing_metadata())["x-request-id"] == "call-7"

    asyncio.run(scenario())


def test_a_stream_is_sent_while_it_is_made() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.step_seconds = 0.01
            call = shell.inference.GenerateStream(stream_request(max_new_tokens=64))
            loop = asyncio.get_running_loop()
            began = loop.time()
            times = [loop.time() - began async for _ in call]
            assert len(times) >= 32
            assert times[0] < times[-1] / 4

    asyncio.run(scenario())


def test_events_that_are_ready_together_travel_together() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            request = stream_request(max_new_tokens=200)
            messages = [message async for message in shell.inference.GenerateStream(request)]
            text = "".join(one.text for message in messages for one in message.candidates)
            assert text == "".join(chr(greedy_letter(step)) for step in range(200))
            assert all(len(message.candidates) <= 1 for message in messages)
            assert len(messages) < 200

    asyncio.run(scenario())


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "unary"])
def test_a_caller_that_goes_away_cancels_its_request_and_returns_its_leases(streaming: bool) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.step_seconds = 0.01
            request = stream_request("hello", "alpha", "zeta", max_new_tokens=200)
            if streaming:
                call = shell.inference.GenerateStream(request)
                await call.read()
            else:
                unary = inference_pb2.GenerateRequest.FromString(request.SerializeToString())
                call = shell.inference.Generate(unary)
                await eventually(lambda: len(shell.engine.submitted) == 1)
            assert len(shell.leases.held) == 2
            call.cancel()
            await eventually(lambda: len(shell.engine.cancelled) == 1)
            await eventually(lambda: shell.leases.held == [])
            assert list(shell.engine.num_ends.values()) == [1]
            method = "/motley.v1.InferenceService/" + ("GenerateStream" if streaming else "Generate")
            await eventually(
                lambda: shell.count("motley_grpc_server_handled_total", method=method, code="CANCELLED") == 1
            )

    asyncio.run(scenario())


def test_a_reader_that_stops_reading_is_cut_off_when_its_queue_is_full() -> None:
    async def scenario() -> None:
        async with serving(reader_queue_events=20) as shell:
            # 19 MB, more than the wire's own windows grow to, so that the unread rest stays with the server.
            request = stream_request("hello", "alpha", max_new_tokens=240, n=16, logprobs=1)
            shell.engine.padding = 5_000
            call = shell.inference.GenerateStream(request)
            await call.read()
            await eventually(lambda: len(shell.engine.cancelled) == 1)
            await eventually(lambda: shell.leases.held == [])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_the_end(call)
            refusal = read_refusal(caught.value)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")

    asyncio.run(scenario())


def test_the_callers_deadline_reaches_the_engine_and_ends_the_call() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.may_step.clear()
            loop = asyncio.get_running_loop()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await shell.inference.Generate(text_request(), timeout=0.3)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            [request] = shell.engine.submitted
            assert request.deadline is not None
            assert abs(request.deadline - loop.time()) < 0.3  # the loop's clock is time.monotonic
            await eventually(lambda: len(shell.engine.cancelled) == 1)
            unlimited = asyncio.ensure_future(shell.inference.Generate(text_request()))
            await eventually(lambda: len(shell.engine.submitted) == 2)
            assert shell.engine.submitted[1].deadline is None
            shell.engine.may_step.set()
            await unlimited

    asyncio.run(scenario())


@pytest.mark.parametrize("given", ["", "has space", "x" * 129])
def test_a_request_id_that_cannot_be_used_is_replaced(given: str) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            call = shell.inference.Generate(text_request(), metadata=(("x-request-id", given),))
            answer = await call
            assert len(answer.request_id) == 32
            assert dict(await call.trailing_metadata())["x-request-id"] == answer.request_id

    asyncio.run(scenario())


def test_calls_that_share_a_request_id_do_not_meet_in_the_engine() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            calls = [
                shell.inference.Generate(text_request(max_new_tokens=length), metadata=(("x-request-id", "same"),))
                for length in (3, 5)
            ]
            answers = [await call for call in calls]
            assert [one.candidates[0].text for one in answers] == ["abc", "abcde"]
            assert [one.request_id for one in answers] == ["same", "same"]
            assert len({request.request_id for request in shell.engine.submitted}) == 2

    asyncio.run(scenario())


def test_score_gives_each_continuation_its_own_sum_in_order() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            request = inference_pb2.ScoreRequest(
                prompt=inference_pb2.Prompt(text="ab"), continuations=["xy", "c"], adapters=[{"name": "alpha"}]
            )
            answer = await shell.inference.Score(request)
            sums = [-(ord("x") + ord("y")) / 100, -ord("c") / 100]
            assert [math.isclose(one.logprob, wanted) for one, wanted in zip(answer.scores, sums, strict=True)]
            assert [[token.chosen.token_id for token in one.tokens] for one in answer.scores] == [
                [ord("x"), ord("y")],
                [ord("c")],
            ]
            assert [one.is_greedy for one in answer.scores] == [False, True]
            assert answer.usage == common_pb2.Usage(prompt_tokens=5 + 4, cached_prompt_tokens=2)
            assert [one.name for one in answer.served_by.adapters] == ["alpha"]
            first, second = shell.engine.submitted
            assert first.prompt_token_ids == (1, ord("a"), ord("b"), ord("x"), ord("y"))
            assert (first.prompt_logprobs, first.num_context_tokens, second.num_context_tokens) == (True, 3, 3)
            assert shell.leases.held == []

    asyncio.run(scenario())


def test_a_score_that_fails_midway_cancels_its_other_continuations() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            shell.engine.may_step.clear()
            request = inference_pb2.ScoreRequest(
                prompt=inference_pb2.Prompt(text="ab"), continuations=["x", "y", "z"], adapters=[{"name": "alpha"}]
            )
            call = shell.inference.Score(request)
            await eventually(lambda: len(shell.engine.submitted) == 3)
            call.cancel()
            await eventually(lambda: len(shell.engine.cancelled) == 3)
            shell.engine.may_step.set()
            await eventually(lambda: shell.leases.held == [])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        (inference_pb2.Prompt(text="ab"), [1, 97, 98]),
        (inference_pb2.Prompt(tokens={"ids": [5, 6]}), [5, 6]),
        (inference_pb2.Prompt(chat={"messages": [{"role": "u", "content": "a"}]}), [1, *map(ord, "u:a;")]),
        (inference_pb2.Prompt(text="a" * 100_000), [1] + [97] * 100_000),
    ],
    ids=["text", "tokens", "chat", "long text, on the tokenizer's thread"],
)
def test_tokenize_returns_what_would_be_continued(prompt: inference_pb2.Prompt, ids: list[int]) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            answer = await shell.inference.Tokenize(inference_pb2.TokenizeRequest(prompt=prompt))
            assert list(answer.ids) == ids

    asyncio.run(scenario())


def test_detokenize_is_the_way_back() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            answer = await shell.inference.Detokenize(inference_pb2.DetokenizeRequest(ids=[97, 98]))
            assert answer.text == "ab"

    asyncio.run(scenario())
