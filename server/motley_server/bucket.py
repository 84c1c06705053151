"""What flows back steadily and may be taken in a burst: so much a minute, a minute's worth at once.

Whole numbers throughout, so that "in 250 ms" means neither 249 nor 251. Knows nothing of tenants, requests or clocks:
every call is told the time. Not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MINUTE = 60_000_000_000  # nanoseconds


@dataclass(slots=True, eq=False)
class Charge:
    """Something taken from a bucket, until it is known how much of it was needed.

    Units: `missing` is what of it has not flowed back yet, in amounts times nanoseconds of a minute.
    """

    amount: int
    missing: int


class Bucket:
    """Hold a minute's worth of something, and refill at that rate.

    Semantics: what is missing from a full bucket is the sum of what its charges have not got back. The flow fills what
    is settled first, then the oldest open charge; settling gives back no more than its own charge still misses. So the
    charges of any w seconds, less what each was given back, never exceed capacity * (1 + w / 60), however long they
    were open. A capacity that changes is in force from the call that names it; no more can be missing than it holds, so
    that an untouched minute fills any bucket.
    Units: times in nanoseconds. What is missing is counted in amounts times `MINUTE`, so that a capacity is also what
    flows back in a nanosecond.
    """

    def __init__(self) -> None:
        self._capacity = 0
        self._time = 0
        self._settled = 0
        self._missing = 0  # the settled and the open together
        self._open: OrderedDict[Charge, None] = OrderedDict()

    def wait(self, amount: int, capacity: int, now: int) -> int:
        """Return after how many nanoseconds `amount` could be taken if nothing else was; 0 is now.

        Semantics: an amount above the capacity could never be taken, and must not be asked for, nor one of 0.
        """
        self._refill(now)
        self._capacity = capacity
        self._fill(max(0, self._missing - capacity * MINUTE))
        too_much = self._missing - (capacity - amount) * MINUTE
        return max(0, -(-too_much // capacity))

    def take(self, amount: int) -> Charge:
        """Take what `wait` has just said can be taken."""
        charge = Charge(amount, amount * MINUTE)
        self._missing += charge.missing
        self._open[charge] = None
        return charge

    def settle(self, charge: Charge, used: int, now: int) -> None:
        """Give back what a charge did not need after all; once for each charge."""
        self._refill(now)
        self._open.pop(charge, None)
        given_back = min(charge.missing, (charge.amount - used) * MINUTE)
        self._missing -= given_back
        self._settled += charge.missing - given_back

    def _refill(self, now: int) -> None:
        self._fill(min(self._capacity * (now - self._time), self._missing))
        self._time = now

    def _fill(self, flow: int) -> None:
        self._missing -= flow
        from_settled = min(flow, self._settled)
        self._settled -= from_settled
        flow -= from_settled
        while flow:
            charge = next(iter(self._open))
            part = min(flow, charge.missing)
            charge.missing -= part
            flow -= part
            if not charge.missing:
                del self._open[charge]
