"""What crosses the engine's mailbox: requests going in, events and outcomes coming out.

Plain frozen dataclasses of Python values, all picklable: the seam at which the engine could move to a process of its
own. Nothing here knows gRPC, torch, names of adapters that were not resolved, or which thread it is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from motley_server.errors import MotleyError


class FinishReason(Enum):
    """Why a candidate ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen; every default is already filled in.

    Semantics: temperature 0 is greedy; top_k 0 is no limit; logprobs None asks for none, k >= 0 for the chosen token
    and the k likeliest.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # the checkpoint's eos ids included, unless ignore_eos was asked for
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()  # the checkpoint's, whether or not they stop: what min_new_tokens forbids
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter as resolved for one request: what the answer will say served it.

    Semantics: `overlapping_channels` counts those of its S2FT channels that another adapter of the request holds too.
    """

    name: str
    version: int
    digest: str
    weight: float
    trained_on: str
    kind: str
    overlapping_channels: int = 0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One admitted request.

    Semantics: `adapters` is sorted by digest, without repetition and without zero weights; `deadline` is in
    time.monotonic seconds; with `prompt_logprobs` the request reports the log-probability of every prompt token after
    the first `num_context_tokens` and generates nothing. `weight` is the tenant's share of the device beside others'.
    """

    request_id: str
    tenant_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    adapters: tuple[ServedAdapter, ...] = ()
    deadline: float | None = None
    prompt_logprobs: bool = False
    num_context_tokens: int = 0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of one token under the raw distribution, and of the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateDelta:
    """What is new of one candidate since the event before."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for one request, all candidates together."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """What one engine step did for one request.

    Semantics: the last event of a request has `usage` (every candidate finished) or `error` (the request failed), never
    both; nothing follows it. `prompt_logprobs` comes once, in the last event of a scoring request, one entry a token
    after the context.
    """

    request_id: str
    deltas: tuple[CandidateDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    usage: Usage | None = None
    error: MotleyError | None = None

    @property
    def is_last(self) -> bool:
        """Tell whether nothing follows."""
        return self.usage is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class KeepOutcome:
    """How the keeping of an adapter on the device began: all of it is there, or `error` says why it is not kept."""

    ticket: int
    error: MotleyError | None = None
