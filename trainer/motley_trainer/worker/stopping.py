"""How a worker is told to end, whether by a signal or by a test.

Owns the two words: end soon, and end at once. Used on the event loop's thread.
"""

from __future__ import annotations

import asyncio


class Stop:
    """Remember that the worker shall end: `asked` lets its job keep a checkpoint, `hurried` lets it no longer."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def interrupt(self) -> None:
        """Ask for the end, and when that was done before, hurry it."""
        if self.asked.is_set():
            self.hurried.set()
        self.asked.set()
