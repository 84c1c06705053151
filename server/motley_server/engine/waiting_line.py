"""Those who wait, in the order of their turn: a tenant's own as they came, tenants by what they were given before.

Fair queueing on tokens. A tenant's turn is a point in virtual time; whoever is let in moves it on by the tokens that it
may use, divided by the tenant's weight, and the tenant whose turn is earliest comes next. A tenant with nothing waiting
saves nothing up. The first of the line, the window, are looked at in every pass. Behind it only those are looked for
who need wait for no adapter, and only once something changed, so that a long line costs a pass nothing. Runs on the
engine thread.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from motley_server.engine.sequence import Sequence

WINDOW = 64


@dataclass(slots=True)
class _Share:
    """One tenant's: when its next is due, in tokens by weight, and those who wait with the number of their arrival."""

    turn: float
    line: deque[tuple[int, Sequence]] = field(default_factory=deque)


class WaitingLine:
    """A line of sequences."""

    def __init__(self) -> None:
        self._first: deque[Sequence] = deque()  # had their turn before: preempted, or more candidates of one request
        self._shares: dict[str, _Share] = {}
        self._owed_by: dict[Sequence, _Share] = {}  # who was let in, until its end
        self._now = 0.0  # the turn of whoever was let in last
        self._arrivals = itertools.count()
        self._num_changes = 0
        self._ready_behind: list[Sequence] = []
        self._ready_as_of: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._first) + sum(len(share.line) for share in self._shares.values())

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._first
        turns = [(share.turn, share.line[0][0], 0, share) for share in self._shares.values() if share.line]
        heapq.heapify(turns)
        while turns:
            turn, _, place, share = heapq.heappop(turns)
            _, sequence = share.line[place]
            yield sequence
            if (place := place + 1) < len(share.line):
                heapq.heappush(turns, (turn + _share_of(sequence), share.line[place][0], place, share))

    def append(self, sequence: Sequence) -> None:
        """Put a sequence behind all others of its tenant."""
        share = self._shares.setdefault(sequence.request.tenant_id, _Share(self._now))
        if not share.line:
            share.turn = max(share.turn, self._now)
        share.line.append((next(self._arrivals), sequence))
        self._num_changes += 1

    def append_first(self, sequence: Sequence) -> None:
        """Put a sequence before all others."""
        self._first.appendleft(sequence)
        self._num_changes += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out.

        Raises: ValueError if it does not wait.
        """
        self._num_changes += 1
        share = self._shares.get(sequence.request.tenant_id)
        for entry in share.line if share is not None else ():
            if entry[1] is sequence:
                assert share is not None
                share.line.remove(entry)
                return
        self._first.remove(sequence)

    def charge(self, sequence: Sequence) -> None:
        """Note that a sequence is let in, with all the tokens that it may use.

        Semantics: where nobody is left waiting, nobody went short, and all debts are forgotten.
        """
        share = self._shares.setdefault(sequence.request.tenant_id, _Share(self._now))
        self._owed_by[sequence] = share
        self._now = max(self._now, share.turn)
        share.turn = self._now + _share_of(sequence)
        self._num_changes += 1
        is_idle = not self
        for tenant_id in [one for one, share in self._shares.items() if not share.line]:
            if is_idle or self._shares[tenant_id].turn <= self._now:
                del self._shares[tenant_id]

    def refund(self, sequence: Sequence) -> None:
        """Give a tenant back, at a sequence's end, what it was charged for and did not use."""
        share = self._owed_by.pop(sequence, None)
        if share is not None:
            share.turn -= (sequence.max_num_tokens - sequence.num_tokens) / sequence.request.weight
            self._num_changes += 1

    def window(self) -> list[Sequence]:
        """Return the first of the line."""
        return list(islice(self, WINDOW))

    def ready_behind(self, is_ready: Callable[[Sequence], bool], num_binds: int) -> list[Sequence]:
        """Return those behind the window who were ready at the last look.

        Semantics: looks again only when the line or `num_binds` changed; what was ready may have left the device since.
        """
        now = (self._num_changes, num_binds)
        if now != self._ready_as_of:
            self._ready_behind = [sequence for sequence in islice(self, WINDOW, None) if is_ready(sequence)]
            self._ready_as_of = now
        return self._ready_behind


def _share_of(sequence: Sequence) -> float:
    """Return by how much letting a sequence in moves its tenant's turn on."""
    shared = sequence.num_prompt_tokens if sequence.index else 0  # its request's other candidates computed the prompt
    return (sequence.max_num_tokens - shared) / sequence.request.weight
