"""From a call's credentials to a tenant, its roles and its quota.

A key is looked up at every call, so that its revocation is in force from the next one on; quotas are remembered for a
moment. Knows headers' values and nothing of gRPC. Runs on the event loop's thread; the registry works on the
database's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from motley_server.asked import Role
from motley_server.errors import NotFoundError, UnauthenticatedError
from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.names import LOCAL_TENANT
from motley_server.registry.records import Quota
from motley_server.registry.tenants import Tenants

QUOTA_SECONDS: Final = 1.0
MAX_REMEMBERED_QUOTAS: Final = 4096
REFUSAL: Final = "the key is malformed, unknown, expired or revoked"

_BEARER = re.compile(r"bearer +(\S{1,200})", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Identity:
    """A tenant, what it may do and how much; `key_id` is empty for who came without a key."""

    tenant_id: str
    roles: frozenset[Role]
    quota: Quota = field(default_factory=Quota)
    key_id: str = ""


# Takes all values of the header `authorization`.
Identify = Callable[[Sequence[str | bytes]], Awaitable[Identity]]


class TenantQuotas:
    """Tell tenants' quotas, as they were at most a second ago."""

    def __init__(self, database: Database, tenants: Tenants, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._tenants = tenants
        self._clock = clock
        self._known: dict[str, tuple[Quota, float]] = {}

    async def of(self, tenant_id: str) -> Quota:
        """Return a tenant's quota."""
        quota, until = self._known.get(tenant_id, (None, 0.0))
        if quota is None or self._clock() >= until:
            until = self._clock() + QUOTA_SECONDS
            quota = (await self._database.run(self._tenants.get, tenant_id)).quota
            if len(self._known) >= MAX_REMEMBERED_QUOTAS:
                self._known.clear()
            self._known[tenant_id] = quota, until
        return quota

    def forget(self, tenant_id: str) -> None:
        """Look again next time: the quota has changed."""
        self._known.pop(tenant_id, None)


class KeyIdentity:
    """Identify callers by their keys.

    Semantics: without `demands_key`, a caller who shows none is the local tenant with every role.
    """

    def __init__(self, database: Database, keys: Keys, quotas: TenantQuotas, *, demands_key: bool) -> None:
        self._database = database
        self._keys = keys
        self._quotas = quotas
        self._demands_key = demands_key

    async def identify(self, credentials: Sequence[str | bytes]) -> Identity:
        """Return who shows these credentials.

        Raises: UnauthenticatedError (reason=KEY_REQUIRED, or INVALID_KEY with one text whatever is wrong with it).
        """
        if not credentials:
            if self._demands_key:
                message = "this server asks for a key: send it as `authorization: Bearer mk_...`"
                raise UnauthenticatedError(message, reason="KEY_REQUIRED")
            return Identity(LOCAL_TENANT, frozenset(Role), await self._quotas.of(LOCAL_TENANT))
        text = _bearer(credentials)
        key = None if text is None else await self._database.run(self._keys.authenticate, text)
        if key is None:
            raise UnauthenticatedError(REFUSAL, reason="INVALID_KEY")
        try:
            quota = await self._quotas.of(key.tenant_id)
        except NotFoundError:  # deleted this moment, and its keys with it
            raise UnauthenticatedError(REFUSAL, reason="INVALID_KEY") from None
        return Identity(key.tenant_id, frozenset({key.role}), quota, key.id)


def _bearer(credentials: Sequence[str | bytes]) -> str | None:
    """Return the one key that was shown; two of them might be read as either, so they count as none."""
    if len(credentials) != 1 or not isinstance(credentials[0], str):
        return None
    found = _BEARER.fullmatch(credentials[0])
    return found[1] if found else None
