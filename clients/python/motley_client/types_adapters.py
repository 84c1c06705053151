"""What tenants keep at a server: adapters, their versions and aliases, and how files come and go.

Owns the vocabulary of AdapterService as `types` does that of the other services. Knows neither protobuf nor gRPC.
Instances are immutable and may go from thread to thread; of an enum, None is a value that this client does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum


class AdapterKind(Enum):
    """How an adapter's delta is made."""

    LORA = "lora"
    S2FT = "s2ft"
    GOAT = "goat"
    LORAM = "loram"


class AdapterState(Enum):
    """Whether a request can name a version; one that is `deleting` serves those that hold it, and no new ones."""

    READY = "ready"
    DELETING = "deleting"


class AdapterResidency(Enum):
    """The nearest tier that holds a version; what was evicted comes back by itself."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class Visibility(Enum):
    """Who besides the owner may use an adapter: nobody, the tenants that it is shared with, or everybody."""

    PRIVATE = "private"
    TENANTS = "tenants"
    PUBLIC = "public"


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of an adapter.

    Semantics: `digest` is over the canonical content; `ranks` are by module path, and None in lists, which do not tell
    them. `trained_on` and `serves_on` are base fingerprints or `undeclared`. `created_by` is the id of a key; empty
    without one, and for those who own it not.
    Units: `size_bytes` of all files together, `device_bytes` in the server's memory.
    """

    name: str
    version: int
    digest: str
    kind: AdapterKind | None
    state: AdapterState | None
    size_bytes: int
    ranks: Mapping[str, int] | None = field(hash=False)
    device_bytes: int
    trained_on: str
    serves_on: str
    residency: AdapterResidency | None
    pinned: bool
    labels: Mapping[str, str] = field(hash=False)
    create_time: datetime
    created_by: str


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that points at a version, and can go back to the previous one, if there was one."""

    name: str
    version: int
    previous_version: int | None
    etag: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name of a tenant's, its aliases and its newest version, if any is left."""

    owner: str
    name: str
    aliases: tuple[Alias, ...]
    latest: AdapterVersion | None
    visibility: Visibility | None
    shared_with: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter, and the version that the name it was asked for by means now."""

    adapter: Adapter
    version: AdapterVersion


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """How many bytes of each file of an unfinished upload are safe, and when it is forgotten unless it goes on."""

    upload_id: str
    committed_bytes: Mapping[str, int] = field(hash=False)
    expire_time: datetime


class UploadPhase(Enum):
    """What an upload does: read the files for their checksums, or send them."""

    HASHING = "hashing"
    SENDING = "sending"


@dataclass(frozen=True, slots=True)
class UploadProgress:
    """How far a phase of an upload has come; within a phase, `done_bytes` only grows.

    Semantics: what the server had before counts as sent.
    """

    phase: UploadPhase
    done_bytes: int
    total_bytes: int
