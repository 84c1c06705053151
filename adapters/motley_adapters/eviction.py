"""The order in which things kept in memory are given up: what is cheapest to bring back, and was not used for long.

Greedy-Dual-Size: a thing's worth is what bringing it back costs for each byte that it occupies, counted from the worth
of the last thing given up, so that what is never used falls behind however dear it is. Of one size it is least recently
used. Plain Python over numbers; its owner's thread or lock.
"""

from __future__ import annotations

from collections.abc import Iterable

RELOAD_OVERHEAD_BYTES = 1 << 20
"""What opening, checking and placing a thing costs, in bytes that could be copied meanwhile."""


class EvictionOrder:
    """Remember how recently each key was used, and name the one to give up."""

    def __init__(self) -> None:
        self._worth: dict[str, tuple[float, int]] = {}
        self._floor = 0.0
        self._clock = 0

    def use(self, key: str, nbytes: int) -> None:
        """Note that a key is there, or was used again."""
        self._clock += 1
        self._worth[key] = (self._floor + 1 + RELOAD_OVERHEAD_BYTES / max(1, nbytes), self._clock)

    def cheapest(self, candidates: Iterable[str]) -> str | None:
        """Return the one of some known keys that is given up first; None of none."""
        return min(candidates, key=self._worth.__getitem__, default=None)

    def give_up(self, key: str) -> None:
        """Forget a key that was evicted: those that stay age by its worth."""
        self._floor = max(self._floor, self._worth.pop(key)[0])

    def forget(self, key: str) -> None:
        """Forget a key that went for a reason of its own; nothing if it is not known."""
        self._worth.pop(key, None)
