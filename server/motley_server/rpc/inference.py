"""InferenceService: generate, score, and what a text is in tokens.

Reads a request, has it admitted, and turns the engine's events into messages. Runs on the event loop's thread, which
never computes here.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
from motley.v1 import inference_pb2, inference_pb2_grpc

from motley_server.admission import Admission, Admitted
from motley_server.asked import AskedGeneration
from motley_server.engine.types import RequestEvent, TokenLogprobs, Usage
from motley_server.errors import InternalError
from motley_server.facts import ServerFacts
from motley_server.rpc.call import current_caller
from motley_server.rpc.convert import (
    candidates_to,
    generation_from,
    prompt_from,
    scoring_from,
    served_by_to,
    token_logprobs_to,
    usage_to,
)
from motley_server.rpc.list_bounds import check_detokenized, check_generation, check_prompt, check_scoring

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Answer under the adapters that each request names."""

    def __init__(self, admission: Admission, facts: ServerFacts) -> None:
        self._admission = admission
        self._facts = facts

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """Answer when every candidate is finished."""
        caller = current_caller()
        admitted = await self._admission.generate(self._read(request), caller)
        events = await _read_all(admitted)
        return inference_pb2.GenerateResponse(
            request_id=caller.request_id,
            served_by=served_by_to(self._facts, admitted.request.adapters),
            candidates=candidates_to(events),
            usage=usage_to(_usage(events)),
        )

    async def GenerateStream(  # noqa: N802
        self, request: inference_pb2.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        """Send text as it is made; events that are ready together go out together."""
        caller = current_caller()
        admitted = await self._admission.generate(self._read(request), caller)
        message = inference_pb2.GenerateStreamResponse(
            request_id=caller.request_id, served_by=served_by_to(self._facts, admitted.request.adapters)
        )
        async with aclosing(admitted.events) as stream:
            async for event in stream:
                events = [event, *stream.take_ready()]
                message.candidates.extend(candidates_to(events))
                if events[-1].usage is not None:
                    message.usage.CopyFrom(usage_to(events[-1].usage))
                yield message
                message = inference_pb2.GenerateStreamResponse()

    async def Score(  # noqa: N802
        self, request: inference_pb2.ScoreRequest, context: Context
    ) -> inference_pb2.ScoreResponse:
        """Score every continuation, all at once."""
        caller = current_caller()
        with self._admission.counting_refusals():
            check_scoring(request, self._admission.limits)
        admitted = await self._admission.score(scoring_from(request), caller)
        async with AsyncExitStack() as streams:
            for one in admitted:
                streams.push_async_callback(one.events.aclose)
            # The engine works on all of them together; only the reading is one after the other.
            answers = [await _read_all(one) for one in admitted]
        usages = [_usage(events) for events in answers]
        return inference_pb2.ScoreResponse(
            request_id=caller.request_id,
            served_by=served_by_to(self._facts, admitted[0].request.adapters),
            scores=[_score([entry for event in events for entry in event.prompt_logprobs]) for events in answers],
            usage=usage_to(
                Usage(
                    prompt_tokens=sum(usage.prompt_tokens for usage in usages),
                    completion_tokens=sum(usage.completion_tokens for usage in usages),
                    cached_prompt_tokens=sum(usage.cached_prompt_tokens for usage in usages),
                )
            ),
        )

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Return the ids of a prompt."""
        with self._admission.counting(current_caller()):
            check_prompt(request.prompt, self._admission.limits)
            return inference_pb2.TokenizeResponse(ids=await self._admission.tokenize(prompt_from(request.prompt)))

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Return the text of ids."""
        with self._admission.counting(current_caller()):
            check_detokenized(request, self._admission.limits)
            return inference_pb2.DetokenizeResponse(text=await self._admission.detokenize(tuple(request.ids)))

    def _read(self, request: inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest) -> AskedGeneration:
        with self._admission.counting_refusals():
            check_generation(request, self._admission.limits)
        return generation_from(request)


async def _read_all(admitted: Admitted) -> list[RequestEvent]:
    async with aclosing(admitted.events) as stream:
        return [event async for event in stream]


def _usage(events: list[RequestEvent]) -> Usage:
    if not events or events[-1].usage is None:
        raise InternalError("the engine ended a request without its usage", reason="NO_USAGE")
    return events[-1].usage


def _score(entries: list[TokenLogprobs]) -> inference_pb2.ContinuationScore:
    return inference_pb2.ContinuationScore(
        logprob=math.fsum(entry.logprob for entry in entries),
        tokens=[token_logprobs_to(entry) for entry in entries],
        is_greedy=all(entry.top[0][0] == entry.token_id for entry in entries),
    )
