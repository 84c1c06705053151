"""Places in the engine: how many requests it has in hand at once, and how tenants part them.

It knows tenants' ids and counts, not requests. Runs on the event loop's thread.
"""

from __future__ import annotations

from collections import Counter

from motley_server.errors import ResourceExhaustedError

RETRY_AFTER_SECONDS = 1.0


class Places:
    """Let requests in up to a bound, and a tenant with less than its part of it beyond that.

    Semantics: all tenants with a request in hand have equal parts, the one that comes included. Whoever has its part is
    refused until places are free again, so that what was let in beyond the bound goes away by itself.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._taken: Counter[str] = Counter()  # without those who have none

    def take(self, tenant_id: str) -> None:
        """Take a place, until `give_back`.

        Raises: ResourceExhaustedError (reason=QUEUE_FULL).
        """
        part = self._bound // len(self._taken.keys() | {tenant_id})
        if self._taken.total() >= self._bound and self._taken[tenant_id] >= part:
            message = f"{self._bound} requests are running or waiting already"
            raise ResourceExhaustedError(message, reason="QUEUE_FULL", retry_after_seconds=RETRY_AFTER_SECONDS)
        self._taken[tenant_id] += 1

    def give_back(self, tenant_id: str) -> None:
        """Give a place back."""
        self._taken[tenant_id] -= 1
        if not self._taken[tenant_id]:
            del self._taken[tenant_id]
