"""What a caller asked for, as plain values: after the wire, before admission.

A field that was not set is None here; nothing was checked but that it could be read. `rpc/convert.py` makes these,
`admission.py` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from motley_server.registry.job_records import LeaseScope
from motley_server.registry.records import Quota


class Role(Enum):
    """What a caller may do."""

    USER = "user"
    PUBLISHER = "publisher"
    WORKER = "worker"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, how much of the server that tenant may use, and until when an answer is worth anything.

    Semantics: `key_id` is empty for a caller without a key; `lease` is what a worker may do for one of the tenant's
    jobs, and `key_id` then the job's id.
    Units: `deadline` is in time.monotonic seconds.
    """

    request_id: str
    tenant_id: str
    roles: frozenset[Role]
    deadline: float | None = None
    quota: Quota = field(default_factory=Quota)
    key_id: str = ""
    lease: LeaseScope | None = None


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation to continue, rendered by the checkpoint's own template."""

    turns: tuple[ChatTurn, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class AskedAdapter:
    """An adapter as a request names it."""

    name: str
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class AskedSampling:
    """How the caller wants tokens to be chosen."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class AskedGeneration:
    """A request to generate."""

    prompt: Prompt | None
    adapters: tuple[AskedAdapter, ...] = ()
    sampling: AskedSampling = AskedSampling()
    is_constrained: bool = False  # the answer's form is


@dataclass(frozen=True, slots=True)
class AskedScoring:
    """A request to score continuations of one prompt."""

    prompt: Prompt | None
    continuations: tuple[str, ...]
    adapters: tuple[AskedAdapter, ...] = ()
