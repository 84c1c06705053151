"""What long work tells whoever watches it: which stage it is in, and how far.

Knows nothing of screens. Called on the thread that does the work.
"""

from __future__ import annotations

from typing import Protocol


class Watcher(Protocol):
    """Sees work go by."""

    def begin(self, stage: str, num_steps: int) -> None:
        """Learn that a stage of so many steps begins, and that the one before is over."""

    def advance(self) -> None:
        """Learn that one step of the stage is done."""


class Unwatched:
    """See nothing."""

    def begin(self, stage: str, num_steps: int) -> None:
        """Ignore it."""

    def advance(self) -> None:
        """Ignore it."""
