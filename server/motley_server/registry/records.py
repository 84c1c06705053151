"""What is kept of tenants, their keys and their adapters, as plain values that neither SQL nor the wire has touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:  # a caller has a quota, and a key a role
    from motley_server.asked import Role
    from motley_server.registry.bundle_files import BundleFile

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits on a tenant; None is no limit. `weight` is its share of the device beside others'."""

    adapters: int | None = None
    adapter_bytes: int | None = None
    requests_in_flight: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    training_jobs: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who owns adapters and keys; `etag` changes with every change of the rest."""

    id: str
    display_name: str
    quota: Quota
    created_at: datetime
    etag: str


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret. Times are UTC."""

    id: str
    tenant_id: str
    role: Role
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class Visibility(Enum):
    """Who besides its owner may use an adapter."""

    PRIVATE = "private"
    TENANTS = "tenants"
    PUBLIC = "public"


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A validated adapter that is about to have a number: what its content is, and where its files are.

    Semantics: `digest` names what it computes, `bundle` the bytes of its files; `created_by` is a key's id, or empty.
    """

    digest: str
    kind: str
    trained_on: str
    serves_on: str
    ranks: Mapping[str, int]
    size_bytes: int
    device_bytes: int
    bundle: str
    files: tuple[BundleFile, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    created_by: str = ""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of an adapter; `owner` is a tenant or `public`. Most other fields are NewVersion's.

    Semantics: `is_pinned` says what its owner wants of the device, and may change. In pages of a list, `ranks` and
    `files` are empty, whatever they are.
    """

    owner: str
    name: str
    version: int
    digest: str
    kind: str
    trained_on: str
    serves_on: str
    ranks: Mapping[str, int]
    size_bytes: int
    device_bytes: int
    bundle: str
    files: tuple[BundleFile, ...]
    labels: Mapping[str, str]
    created_by: str
    created_at: datetime
    is_pinned: bool

    def name_for(self, tenant_id: str) -> str:
        """Return what this tenant calls it."""
        return self.name if self.owner == tenant_id else f"{self.owner}/{self.name}"


@dataclass(frozen=True, slots=True)
class Alias:
    """A name for one version of an adapter, until it moves; `etag` changes with every move.

    Semantics: version 0 is none: `previous_version` before the first move, `version` of an alias that was removed.
    """

    alias: str
    version: int
    previous_version: int
    etag: str


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter that has a version, as one tenant may see it.

    Semantics: `shared_with` and `latest.created_by` are for its owner's eyes alone, and empty for others.
    """

    owner: str
    name: str
    visibility: Visibility
    shared_with: tuple[str, ...]
    aliases: tuple[Alias, ...]
    latest: AdapterVersion
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some of a list, in its order; an empty token is the end."""

    items: tuple[Item, ...]
    next_page_token: str
