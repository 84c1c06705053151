"""Between protobuf messages and the server's own dataclasses: the last sight of the wire, and the first.

Reads fields and nothing else: whether their values make sense is admission's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from motley.v1 import common_pb2, inference_pb2

from motley_server.asked import (
    AskedAdapter,
    AskedGeneration,
    AskedSampling,
    AskedScoring,
    ChatPrompt,
    ChatTurn,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from motley_server.engine.types import (
    CandidateDelta,
    FinishReason,
    RequestEvent,
    ServedAdapter,
    TokenLogprobs,
    Usage,
)
from motley_server.facts import ServerFacts

FINISH_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
OPTIONAL_SAMPLING_FIELDS: Final = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "n", "min_new_tokens", "logprobs",
)  # fmt: skip


def prompt_from(message: inference_pb2.Prompt) -> Prompt | None:
    """Read a prompt; None if none of the three was set."""
    which = message.WhichOneof("content")
    if which == "text":
        return TextPrompt(message.text)
    if which == "chat":
        return ChatPrompt(tuple(ChatTurn(turn.role, turn.content) for turn in message.chat.messages))
    return TokenPrompt(tuple(message.tokens.ids)) if which == "tokens" else None


def generation_from(
    message: inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest,
) -> AskedGeneration:
    """Read a request to generate."""
    return AskedGeneration(
        prompt=prompt_from(message.prompt),
        adapters=_adapters_from(message.adapters),
        sampling=_sampling_from(message.sampling),
        is_constrained=message.HasField("structured_output"),
    )


def scoring_from(message: inference_pb2.ScoreRequest) -> AskedScoring:
    """Read a request to score."""
    return AskedScoring(prompt_from(message.prompt), tuple(message.continuations), _adapters_from(message.adapters))


def _adapters_from(messages: Iterable[common_pb2.AdapterRef]) -> tuple[AskedAdapter, ...]:
    return tuple(AskedAdapter(one.name, one.weight if one.HasField("weight") else None) for one in messages)


def _sampling_from(message: inference_pb2.SamplingParams) -> AskedSampling:
    given: dict[str, Any] = {
        name: getattr(message, name) for name in OPTIONAL_SAMPLING_FIELDS if message.HasField(name)
    }
    return AskedSampling(
        logit_bias=tuple(message.logit_bias.items()),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        **given,
    )


def served_adapter_to(adapter: ServedAdapter) -> common_pb2.ServedAdapter:
    """Write an adapter that served."""
    return common_pb2.ServedAdapter(
        name=adapter.name,
        version=adapter.version,
        digest=adapter.digest,
        weight=adapter.weight,
        trained_on=adapter.trained_on,
        kind=adapter.kind,
        overlapping_channels=adapter.overlapping_channels,
    )


def served_by_to(facts: ServerFacts, adapters: Iterable[ServedAdapter]) -> common_pb2.ServedBy:
    """Write what served a request."""
    return common_pb2.ServedBy(
        base_model=facts.base.name,
        base_fingerprint=facts.base.fingerprint,
        adapters=[served_adapter_to(adapter) for adapter in adapters],
    )


def usage_to(usage: Usage) -> common_pb2.Usage:
    """Write a request's tokens."""
    return common_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
    )


def token_logprobs_to(entry: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    """Write a token's log-probability, and those of the likeliest."""
    return inference_pb2.TokenLogprobs(
        chosen=inference_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob),
        top=[inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
    )


@dataclass(slots=True)
class CandidateParts:
    """What several events said of one candidate, put together."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: CandidateDelta) -> None:
        """Take what is new."""
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason


def candidates_to(events: Iterable[RequestEvent]) -> list[inference_pb2.Candidate]:
    """Write what events said of each candidate, as one message each, in the order of their indices."""
    parts: dict[int, CandidateParts] = {}
    for event in events:
        for delta in event.deltas:
            parts.setdefault(delta.index, CandidateParts()).add(delta)
    return [
        inference_pb2.Candidate(
            index=index,
            text="".join(part.text),
            token_ids=part.token_ids,
            logprobs=[token_logprobs_to(entry) for entry in part.logprobs],
            finish_reason=FINISH_REASONS[part.finish_reason],
        )
        for index, part in sorted(parts.items())
    ]
