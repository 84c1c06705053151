"""From a call's credentials to a tenant, its roles and its quota.

A key is looked up at every call, so that its revocation is in force from the next one on, and so is the token of a
lease; quotas are remembered for a moment. Knows headers' values and nothing of gRPC. Runs on the event loop's thread;
the registry works on the database's.
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
from motley_server.registry.job_records import LeaseScope
from motley_server.registry.keys import Keys
from motley_server.registry.leases import Leases
from motley_server.registry.names import LOCAL_TENANT
from motley_server.registry.records import Quota
from motley_server.registry.tenants import Tenants

QUOTA_SECONDS: Final = 1.0
MAX_REMEMBERED_QUOTAS: Final = 4096
REFUSAL: Final = "the key is malformed, unknown, expired or revoked"
LEASE_REFUSAL: Final = "the token is that of no lease that holds: it was never given out, has expired, or has ended"
TOKEN_PREFIX: Final = "mj_"

_PUBLISHING: Final = frozenset({Role.PUBLISHER})
_BEARER = re.compile(r"bearer +(\S{1,200})", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Identity:
    """A tenant, what it may do and how much; `key_id` is empty for who came without a key.

    Semantics: with a `lease` that is a worker, for one job of the tenant's, and `key_id` is the job's id.
    """

    tenant_id: str
    roles: frozenset[Role]
    quota: Quota = field(default_factory=Quota)
    key_id: str = ""
    lease: LeaseScope | None = None


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
    """Identify callers by their keys, and workers by the tokens of their leases.

    Semantics: without `demands_key`, a caller who shows none is the local tenant with every role; without `leases` no
    token counts.
    """

    def __init__(
        self,
        database: Database,
        keys: Keys,
        quotas: TenantQuotas,
        *,
        demands_key: bool,
        leases: Leases | None = None,
    ) -> None:
        self._database = database
        self._keys = keys
        self._quotas = quotas
        self._demands_key = demands_key
        self._leases = leases

    async def identify(self, credentials: Sequence[str | bytes]) -> Identity:
        """Return who shows these credentials.

        Raises: UnauthenticatedError (reason=KEY_REQUIRED; INVALID_KEY, or LEASE_ENDED for what looks like a token, with
        one text whatever is wrong with it).
        """
        if not credentials:
            if self._demands_key:
                message = "this server asks for a key: send it as `authorization: Bearer mk_...`"
                raise UnauthenticatedError(message, reason="KEY_REQUIRED")
            return Identity(LOCAL_TENANT, frozenset(Role), await self._quotas.of(LOCAL_TENANT))
        text = _bearer(credentials)
        if text is not None and text.startswith(TOKEN_PREFIX):
            return await self._of_lease(text)
        key = None if text is None else await self._database.run(self._keys.authenticate, text)
        if key is None:
            raise UnauthenticatedError(REFUSAL, reason="INVALID_KEY")
        try:
            quota = await self._quotas.of(key.tenant_id)
        except NotFoundError:  # deleted this moment, and its keys with it
            raise UnauthenticatedError(REFUSAL, reason="INVALID_KEY") from None
        return Identity(key.tenant_id, frozenset({key.role}), quota, key.id)

    async def _of_lease(self, token: str) -> Identity:
        scope = None if self._leases is None else await self._database.run(self._leases.authenticate, token)
        if scope is None:
            raise UnauthenticatedError(LEASE_REFUSAL, reason="LEASE_ENDED")
        return Identity(scope.owner, _PUBLISHING, await self._quotas.of(scope.owner), scope.job_id, scope)


def _bearer(credentials: Sequence[str | bytes]) -> str | None:
    """Return the one key that was shown; two of them might be read as either, so they count as none."""
    if len(credentials) != 1 or not isinstance(credentials[0], str):
        return None
    found = _BEARER.fullmatch(credentials[0])
    return found[1] if found else None
