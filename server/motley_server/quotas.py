"""How much of the server a tenant may use at once and in a minute, counted for each tenant by itself.

Owns the counts, of every tenant with a request in flight or in the last minute; limits come with every call, so that a
changed quota holds from the next request on. Knows nothing of prompts, adapters, keys or the engine. Runs on the event
loop's thread, and never waits.

One call is one request, whatever its `n` and however many continuations it scores. Its tokens are those that the engine
may be given for it: the prompt once and `max_new_tokens` for each candidate, or for a Score the prompt with each
continuation. What it did not need in the end is given back.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Protocol

from motley_server.bucket import MINUTE, Bucket, Charge
from motley_server.errors import ResourceExhaustedError
from motley_server.registry.records import Quota

REASON_OF_QUOTA: Mapping[str, str] = MappingProxyType({
    "requests_in_flight": "QUOTA_REQUESTS_IN_FLIGHT",
    "requests_per_minute": "QUOTA_REQUESTS_PER_MINUTE",
    "tokens_per_minute": "QUOTA_TOKENS_PER_MINUTE",
})  # fmt: skip
IN_FLIGHT_RETRY_SECONDS = 1.0  # when a request will end is not known
MILLISECOND = 1_000_000  # nanoseconds
NUM_LOOKED_AT = 2  # tenants that may be forgotten, at each entry and end: more than can become idle by it

Clock = Callable[[], int]
"""Tells the time in nanoseconds, like time.monotonic_ns."""


class QuotaObserver(Protocol):
    """Who counts refusals by quota."""

    def quota_exceeded(self, quota: str) -> None:
        """Take note of a call that was refused, by the name of the quota."""


class Standing:
    """What a tenant has used."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.requests = Bucket()
        self.tokens = Bucket()


class Place:
    """One request among those of its tenant that are in flight, until everybody who shares it has left.

    Semantics: as a context manager it is left at the end of the block; whoever needs it longer joins before. A request
    for which nothing was used when the last one leaves, not even 0 tokens, is taken for one that never was: the minute
    gets it back too.
    """

    def __init__(self, quotas: Quotas, tenant_id: str, standing: Standing, quota: Quota) -> None:
        self._quotas = quotas
        self._tenant_id = tenant_id
        self._standing = standing
        self._quota = quota
        self._num_holders = 1
        self._request: Charge | None = None
        self._tokens: Charge | None = None
        self._num_used_tokens: int | None = None

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def charge(self, num_tokens: int) -> None:
        """Count the request and the most tokens that it may need, once, before anything is used.

        Raises: ResourceExhaustedError (reason=QUOTA_REQUESTS_PER_MINUTE or QUOTA_TOKENS_PER_MINUTE), and then counts
        nothing. `retry_after_seconds` is when the same request would be admitted if nothing else came or ended, in
        whole milliseconds, rounded up; None if that is never.
        """
        now, quota, standing = self._quotas.now(), self._quota, self._standing
        wanted = [
            (name, bucket, limit, amount)
            for name, bucket, limit, amount in (
                ("requests_per_minute", standing.requests, quota.requests_per_minute, 1),
                ("tokens_per_minute", standing.tokens, quota.tokens_per_minute, num_tokens),
            )
            if limit is not None and amount
        ]
        for name, _, limit, amount in wanted:
            if amount > limit:
                raise self._quotas.refusal(name, _too_large(name, limit, amount), None)
        waits = [(bucket.wait(amount, limit, now), name, limit) for name, bucket, limit, amount in wanted]
        longest, name, limit = max(waits, default=(0, "", 0))
        if longest:
            seconds = -(-longest // MILLISECOND) / 1000
            message = f"the quota of {limit} {_unit(name)} a minute is used up; there is room in {seconds:g} s"
            raise self._quotas.refusal(name, message, seconds)
        charges = {name: bucket.take(amount) for name, bucket, _, amount in wanted}
        self._request, self._tokens = charges.get("requests_per_minute"), charges.get("tokens_per_minute")

    def use(self, num_tokens: int) -> None:
        """Note tokens that were really used, beside those noted before."""
        self._num_used_tokens = (self._num_used_tokens or 0) + num_tokens

    def join(self) -> None:
        """Hold the place for one more who leaves it later."""
        self._num_holders += 1

    def leave(self) -> None:
        """Let go of the place; the last one ends the request and gives back what it did not use.

        Raises: RuntimeError for one more than there were, and then changes nothing.
        """
        if not self._num_holders:
            raise RuntimeError(f"a place of tenant {self._tenant_id} was left once too often")
        self._num_holders -= 1
        if self._num_holders:
            return
        now = self._quotas.now()
        if self._request is not None:
            self._standing.requests.settle(self._request, int(self._num_used_tokens is not None), now)
        if self._tokens is not None:
            self._standing.tokens.settle(self._tokens, self._num_used_tokens or 0, now)
        self._quotas.end(self._tenant_id, now)


class Quotas:
    """Count every tenant's requests and tokens, and refuse what its quota does not allow."""

    def __init__(self, observer: QuotaObserver, clock: Clock = time.monotonic_ns) -> None:
        self.now = clock
        self._observer = observer
        self._standings: dict[str, Standing] = {}
        self._idle: OrderedDict[str, int] = OrderedDict()  # nothing in flight, and since when

    @property
    def num_tenants(self) -> int:
        """Return how many tenants are kept count of."""
        return len(self._standings)

    def num_in_flight(self, tenant_id: str) -> int:
        """Return how many requests of a tenant have not ended."""
        standing = self._standings.get(tenant_id)
        return standing.num_in_flight if standing is not None else 0

    def admit(self, tenant_id: str, quota: Quota, num_tokens: int) -> Place:
        """Take a request in and charge it at once.

        Raises: as `enter` and `Place.charge`.
        """
        place = self.enter(tenant_id, quota)
        try:
            place.charge(num_tokens)
        except ResourceExhaustedError:
            place.leave()
            raise
        return place

    def enter(self, tenant_id: str, quota: Quota) -> Place:
        """Take a request in whose tokens are not counted yet.

        Semantics: so that what a tenant has in flight also bounds how many of its prompts are tokenized at once.
        Raises: ResourceExhaustedError (reason=QUOTA_REQUESTS_IN_FLIGHT).
        """
        limit, present = quota.requests_in_flight, self.num_in_flight(tenant_id)
        if limit is not None and present >= limit:
            if limit == 0:
                raise self.refusal("requests_in_flight", "the quota allows no requests", None)
            message = f"{present} requests are in flight, the quota allows {limit}; one of them must end first"
            raise self.refusal("requests_in_flight", message, IN_FLIGHT_RETRY_SECONDS)
        standing = self._standings.setdefault(tenant_id, Standing())
        standing.num_in_flight += 1
        self._idle.pop(tenant_id, None)
        self._forget_untouched(self.now())
        return Place(self, tenant_id, standing, quota)

    def end(self, tenant_id: str, now: int) -> None:
        """Take note that a request has left its place; `Place` calls this once."""
        standing = self._standings[tenant_id]
        standing.num_in_flight -= 1
        if not standing.num_in_flight:
            self._idle[tenant_id] = now
        self._forget_untouched(now)

    def refusal(self, name: str, message: str, retry_after_seconds: float | None) -> ResourceExhaustedError:
        """Count a refusal and return it as the error to raise."""
        self._observer.quota_exceeded(name)
        return ResourceExhaustedError(
            message, reason=REASON_OF_QUOTA[name], field=f"quota.{name}", retry_after_seconds=retry_after_seconds
        )

    def _forget_untouched(self, now: int) -> None:
        # After an idle minute every bucket is full, and a new one says the same.
        for _ in range(NUM_LOOKED_AT):
            tenant_id, since = next(iter(self._idle.items()), ("", now))
            if now - since < MINUTE:
                return
            del self._idle[tenant_id], self._standings[tenant_id]


def _unit(name: str) -> str:
    return name.removesuffix("_per_minute")


def _too_large(name: str, limit: int, amount: int) -> str:
    if name == "requests_per_minute":
        return "the quota allows no requests"
    return (
        f"prompt and answer may come to {amount} tokens, and the quota allows {limit} in any minute: this request can "
        "never be admitted; shorten the prompt, or ask for fewer tokens"
    )
