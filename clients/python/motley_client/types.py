"""What requests take and what answers hold, as plain frozen Python values.

Owns the vocabulary of the client's surface: every result of `Client` and `AsyncClient` is made of these. Knows neither
protobuf nor gRPC. Instances are immutable and may go from thread to thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import TypedDict

AdapterChoice = str | tuple[str, float]
"""A name (`NAME`, `NAME@alias`, `NAME@3`, `NAME@sha256:...`, `OWNER/NAME`), or a name and a weight; alone it weighs
1."""


class Sampling(TypedDict, total=False):
    """The optional knobs of a generation; what is left out or None is the server's and the checkpoint's to say.

    Units: `max_new_tokens` and `min_new_tokens` in tokens; `logprobs` asks for the chosen token's (0) and for that many
    likeliest ones besides.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float]
    seed: int | None
    n: int | None
    stop: Iterable[str]
    stop_token_ids: Iterable[int]
    min_new_tokens: int | None
    ignore_eos: bool
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; its `role` is what the checkpoint's template knows: `system`, `user`, `assistant`."""

    role: str
    content: str


class FinishReason(Enum):
    """Why a candidate ended: an end-of-sequence or stop, or the length."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter version as it was resolved; `trained_on` is a base fingerprint or `undeclared`.

    Semantics: `kind` is one of the server's `adapter_kinds`; `overlapping_channels` counts those of its channels that
    another S2FT adapter of the same request changes too, where the two interfere, and is 0 for other kinds.
    """

    name: str
    version: int
    digest: str
    weight: float
    trained_on: str
    kind: str
    overlapping_channels: int


@dataclass(frozen=True, slots=True)
class ServedBy:
    """What answered; no adapters means the base alone."""

    base_model: str
    base_fingerprint: str
    adapters: tuple[ServedAdapter, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for one request, all candidates together."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability under the raw distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token, and the likeliest ones where they were asked for, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to a prompt, or in a stream what is new of it; `finish_reason` is None while it goes on."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer; the properties speak of the first candidate, the only one unless `n` asked for more."""

    request_id: str
    served_by: ServedBy
    candidates: tuple[Candidate, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Return the generated text, without the prompt."""
        return self.candidates[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the generated token ids."""
        return self.candidates[0].token_ids

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Return each chosen token's log-probability; empty unless `logprobs` was asked for."""
        return tuple(token.chosen.logprob for token in self.candidates[0].logprobs)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return why the generation ended."""
        return self.candidates[0].finish_reason


@dataclass(frozen=True, slots=True)
class StreamPart:
    """What one message of a stream brought: `request_id` and `served_by` come with the first, `usage` with the last."""

    candidates: tuple[Candidate, ...]
    request_id: str | None
    served_by: ServedBy | None
    usage: Usage | None

    @property
    def text(self) -> str:
        """Return the new text of the first candidate; empty if this message has none."""
        return "".join(candidate.text for candidate in self.candidates if candidate.index == 0)


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How likely one continuation is: summed, token by token, and whether each token was the likeliest."""

    logprob: float
    tokens: tuple[TokenLogprobs, ...]
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of a prompt's continuations, in the order they were given."""

    request_id: str
    served_by: ServedBy
    scores: tuple[ContinuationScore, ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes at most, so that nobody needs to guess."""

    max_message_bytes: int
    max_prompt_bytes: int
    context_length: int  # tokens, prompt and answer together
    max_adapters_per_request: int
    max_candidates: int
    max_logprobs: int
    max_running_requests: int
    max_waiting_requests: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is; which adapters can be named there is for `list_adapters` to say."""

    version: str
    base_model: str
    base_fingerprint: str
    architecture: str
    dtype: str
    quantization: str
    device: str
    kernel: str
    adapter_kinds: tuple[str, ...]
    limits: Limits
    pruned_from: str  # of a pruned base: the fingerprint of the base of which it keeps a part


@dataclass(frozen=True, slots=True)
class AdapterFit:
    """LoRAs of one rank on every Linear of the layers: what one takes on the device, and how many fit at once."""

    rank: int
    bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What is in use at a server, and what is left."""

    kv_bytes_total: int
    kv_bytes_used: int
    kv_tokens_total: int
    kv_tokens_free: int
    adapter_bytes_total: int
    adapter_bytes_used: int
    running_requests: int
    waiting_requests: int
    weight_bytes: int
    kv_bytes_per_token: int
    adapter_device_bytes_total: int
    adapter_fits: tuple[AdapterFit, ...]


@dataclass(frozen=True, slots=True)
class DrainResult:
    """How the requests that ran when a drain began have ended."""

    finished_requests: int
    cancelled_requests: int


class Role(Enum):
    """What a key may do; `publisher` manages the tenant's adapters besides, `worker` trains, `admin` administers."""

    USER = "user"
    PUBLISHER = "publisher"
    WORKER = "worker"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits on a tenant; None is no limit in an answer, and in an update left as it is (`lift` takes one away).

    Semantics: `weight` is the tenant's share of the device beside others'; an answer always tells it.
    """

    adapters: int | None = None
    adapter_bytes: int | None = None
    requests_in_flight: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    training_jobs: int | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who owns adapters and keys; `etag` changes with every change of the rest."""

    id: str
    display_name: str
    quota: Quota
    create_time: datetime
    etag: str


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret; times are UTC, and `role` is None for one that this client does not know."""

    id: str
    tenant_id: str
    role: Role | None
    create_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made, and its secret, the text that clients show; no later call tells it again."""

    key: Key
    secret: str = field(repr=False)
