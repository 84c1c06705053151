"""Python values to protobuf requests, protobuf responses to Python values: the last sight of protobuf in the client.

Owns both directions for every call but those that `convert_tenants` and `convert_adapters` have, so that the sync and
the asyncio client differ only in how they wait. Knows nothing of channels. Pure functions; a value that protobuf cannot
hold is an InvalidArgumentError naming the field, raised before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import Message
from motley.v1 import common_pb2, inference_pb2, server_pb2

from motley_client.convert_fields import checked, duration
from motley_client.errors import InternalError, InvalidArgumentError
from motley_client.types import (
    AdapterChoice,
    AdapterFit,
    Candidate,
    Capacity,
    ChatMessage,
    ContinuationScore,
    DrainResult,
    FinishReason,
    Generation,
    Limits,
    Sampling,
    Score,
    ServedAdapter,
    ServedBy,
    ServerInfo,
    StreamPart,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

_FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def prompt_message(
    text: str | None, messages: Iterable[ChatMessage] | None, token_ids: Iterable[int] | None
) -> inference_pb2.Prompt:
    """Make the prompt of whichever of its three forms is given.

    Raises: InvalidArgumentError if that is not exactly one.
    """
    if sum(form is not None for form in (text, messages, token_ids)) != 1:
        raise InvalidArgumentError(
            "give exactly one of prompt, messages and token_ids", reason="PROMPT_FORM", field="prompt"
        )
    if messages is not None:
        turns = [
            checked("prompt.chat.messages", inference_pb2.ChatMessage, role=turn.role, content=turn.content)
            for turn in messages
        ]
        return inference_pb2.Prompt(chat=inference_pb2.ChatPrompt(messages=turns))
    if token_ids is not None:
        return inference_pb2.Prompt(tokens=checked("prompt.tokens.ids", inference_pb2.TokenPrompt, ids=token_ids))
    return checked("prompt.text", inference_pb2.Prompt, text=text)


def adapter_refs(adapters: Sequence[AdapterChoice]) -> list[common_pb2.AdapterRef]:
    """Make one reference for each name, or name and weight.

    Raises: InvalidArgumentError for a bare string, which would otherwise be taken letter by letter.
    """
    if isinstance(adapters, str):
        raise InvalidArgumentError(
            f"adapters is a sequence of names: write ({adapters!r},)", reason="INVALID_VALUE", field="adapters"
        )
    pairs = ((choice, None) if isinstance(choice, str) else choice for choice in adapters)
    return [checked("adapters", common_pb2.AdapterRef, name=name, weight=weight) for name, weight in pairs]


def sampling_params(sampling: Sampling) -> inference_pb2.SamplingParams:
    """Make the sampling message, field by field, so that a bad value is named."""
    params = inference_pb2.SamplingParams()
    for name, value in sampling.items():
        field = f"sampling.{name}"
        if isinstance(value, str):  # a bare `stop` string would be taken letter by letter
            raise InvalidArgumentError(f"{field} is a sequence, not a string", reason="INVALID_VALUE", field=field)
        params.MergeFrom(checked(field, inference_pb2.SamplingParams, **{name: value}))
    return params


def generate_request(
    prompt: inference_pb2.Prompt, adapters: Sequence[AdapterChoice], sampling: Sampling
) -> inference_pb2.GenerateRequest:
    """Make a request for a whole answer."""
    return inference_pb2.GenerateRequest(
        prompt=prompt, adapters=adapter_refs(adapters), sampling=sampling_params(sampling)
    )


def stream_request(
    prompt: inference_pb2.Prompt, adapters: Sequence[AdapterChoice], sampling: Sampling
) -> inference_pb2.GenerateStreamRequest:
    """Make a request for an answer as it is made."""
    return inference_pb2.GenerateStreamRequest(
        prompt=prompt, adapters=adapter_refs(adapters), sampling=sampling_params(sampling)
    )


def score_request(
    prompt: inference_pb2.Prompt, continuations: Iterable[str], adapters: Sequence[AdapterChoice]
) -> inference_pb2.ScoreRequest:
    """Make a request to score each continuation by itself."""
    if isinstance(continuations, str):
        raise InvalidArgumentError(
            "continuations is a sequence of strings", reason="INVALID_VALUE", field="continuations"
        )
    request = checked("continuations", inference_pb2.ScoreRequest, continuations=continuations)
    request.prompt.CopyFrom(prompt)
    request.adapters.extend(adapter_refs(adapters))
    return request


def detokenize_request(token_ids: Iterable[int]) -> inference_pb2.DetokenizeRequest:
    """Make a request for the text of ids."""
    return checked("ids", inference_pb2.DetokenizeRequest, ids=token_ids)


def drain_request(grace_seconds: float | None) -> server_pb2.DrainRequest:
    """Make a request to drain; None leaves the grace to the server's configuration."""
    if grace_seconds is None:
        return server_pb2.DrainRequest()
    return server_pb2.DrainRequest(timeout=checked("timeout", duration, seconds=grace_seconds))


def generation(response: inference_pb2.GenerateResponse) -> Generation:
    """Read a whole answer.

    Raises: InternalError if the server sent no candidate.
    """
    if not response.candidates:
        raise InternalError(
            "the server answered without a candidate", reason="EMPTY_RESPONSE", request_id=response.request_id or None
        )
    return Generation(
        request_id=response.request_id,
        served_by=served_by(response.served_by),
        candidates=tuple(map(_candidate, response.candidates)),
        usage=_usage(response.usage),
    )


def stream_part(response: inference_pb2.GenerateStreamResponse) -> StreamPart:
    """Read one message of a stream."""
    return StreamPart(
        candidates=tuple(map(_candidate, response.candidates)),
        request_id=response.request_id or None,
        served_by=served_by(response.served_by) if response.HasField("served_by") else None,
        usage=_usage(response.usage) if response.HasField("usage") else None,
    )


def score(response: inference_pb2.ScoreResponse) -> Score:
    """Read the scores of a prompt's continuations."""
    return Score(
        request_id=response.request_id,
        served_by=served_by(response.served_by),
        scores=tuple(
            ContinuationScore(one.logprob, tuple(map(_token_logprobs, one.tokens)), one.is_greedy)
            for one in response.scores
        ),
        usage=_usage(response.usage),
    )


def served_by(message: common_pb2.ServedBy) -> ServedBy:
    """Read what answered."""
    return ServedBy(message.base_model, message.base_fingerprint, tuple(map(_served_adapter, message.adapters)))


def server_info(response: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """Read what a server is."""
    return ServerInfo(
        **_scalars(response, "limits", "adapter_kinds"),
        adapter_kinds=tuple(response.adapter_kinds),
        limits=Limits(**_scalars(response.limits)),
    )


def capacity(response: server_pb2.GetCapacityResponse) -> Capacity:
    """Read what is in use, and what is left."""
    fits = tuple(AdapterFit(**_scalars(fit)) for fit in response.adapter_fits)
    return Capacity(**_scalars(response, "adapter_fits"), adapter_fits=fits)


def drain_result(response: server_pb2.DrainResponse) -> DrainResult:
    """Read how a drain ended."""
    return DrainResult(response.finished_requests, response.cancelled_requests)


def _scalars(message: Message, *excluded: str) -> dict[str, Any]:
    names = (field.name for field in message.DESCRIPTOR.fields if field.name not in excluded)
    return {name: getattr(message, name) for name in names}


def _served_adapter(message: common_pb2.ServedAdapter) -> ServedAdapter:
    return ServedAdapter(**_scalars(message))


def _usage(message: common_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_prompt_tokens)


def _candidate(message: inference_pb2.Candidate) -> Candidate:
    return Candidate(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_token_logprobs, message.logprobs)),
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
    )


def _token_logprobs(message: inference_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(_token_logprob(message.chosen), tuple(map(_token_logprob, message.top)))


def _token_logprob(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob)
