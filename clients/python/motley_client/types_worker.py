"""What a worker and a server say to each other: terms, leases, what happened in a job, and how its lease ends.

Owns the vocabulary of WorkerService as `types_adapters` does that of AdapterService. Knows neither protobuf nor gRPC.
Instances are immutable and may go from thread to thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class LeaseEnd(Enum):
    """How a lease ends: the state of its job from then on. `queued` gives the job back undone."""

    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"
    QUEUED = "queued"


@dataclass(frozen=True, slots=True)
class WorkerTerms:
    """What a server told a worker that registered: how it holds its base, and how long a lease lasts unheard of.

    Semantics: `terms_digest` is over all of them and the base's fingerprint; empty from a server that tells none.
    """

    quantization: str
    dtype: str
    lease_seconds: float
    terms_digest: str = ""


@dataclass(frozen=True, slots=True)
class LeasedJob:
    """A job as a worker needs it.

    Semantics: `spec` is the whole TrainingSpec as JSON, under the proto's names, without the fields that are unset; the
    fields beside it are read out of it. `datasets` are digests, each once, and `reads` the adapters to download;
    `adapter_name` is None for a job that publishes nothing.
    """

    id: str
    method: str
    base_fingerprint: str
    datasets: tuple[str, ...]
    reads: tuple[str, ...]
    adapter_name: str | None
    aliases: tuple[str, ...]
    labels: Mapping[str, str] = field(hash=False)
    spec: Mapping[str, Any] = field(hash=False)
    cancel_requested: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A job in a worker's hands: `token` is good for that job, `upload_id` the same at each attempt.

    Semantics: `terms_digest` is that of the server's terms when it lent the job; a worker that was told others has to
    register again.
    """

    job: LeasedJob
    token: str = field(repr=False)
    upload_id: str
    terms_digest: str = ""


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """Something that happened in a job, ready to be reported: its kind, and the message as it travels."""

    kind: str
    message: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class JobEnding:
    """How a lease ends, with a stable word and a sentence where something went wrong."""

    end: LeaseEnd
    reason: str = ""
    message: str = ""
