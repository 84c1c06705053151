"""Those who wait, in the order of their turn.

The first of them, the window, are looked at in every pass. Behind it only those are looked for who need wait for no
adapter, and only once something changed, so that a long line costs a pass nothing. Runs on the engine thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from motley_server.engine.sequence import Sequence

WINDOW = 64


class WaitingLine:
    """A line of sequences."""

    def __init__(self) -> None:
        self._line: deque[Sequence] = deque()
        self._num_changes = 0
        self._ready_behind: list[Sequence] = []
        self._ready_as_of: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def append(self, sequence: Sequence) -> None:
        """Put a sequence behind all others."""
        self._line.append(sequence)
        self._num_changes += 1

    def append_first(self, sequence: Sequence) -> None:
        """Put a sequence before all others."""
        self._line.appendleft(sequence)
        self._num_changes += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        self._line.remove(sequence)
        self._num_changes += 1

    def window(self) -> list[Sequence]:
        """Return the first of the line."""
        return list(islice(self._line, WINDOW))

    def ready_behind(self, is_ready: Callable[[Sequence], bool], num_binds: int) -> list[Sequence]:
        """Return those behind the window who were ready at the last look.

        Semantics: looks again only when the line or `num_binds` changed; what was ready may have left the device since.
        """
        now = (self._num_changes, num_binds)
        if now != self._ready_as_of:
            self._ready_behind = [sequence for sequence in islice(self._line, WINDOW, None) if is_ready(sequence)]
            self._ready_as_of = now
        return self._ready_behind
