"""What is kept of tenants and their keys, as plain values that neither SQL nor the wire has touched."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:  # a caller has a quota, and a key a role
    from motley_server.asked import Role

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


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Some of a list, in its order; an empty token is the end."""

    items: tuple[Item, ...]
    next_page_token: str
