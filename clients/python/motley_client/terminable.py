"""A coroutine as a whole command: SIGTERM ends it as Ctrl-C does, so that what it has started is stopped first.

Runs an event loop of its own on the main thread.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


def run_terminable(command: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine to its end and return its exit code, or 143 when it was told to end by SIGTERM.

    Raises: whatever the coroutine raises; KeyboardInterrupt.
    """
    try:
        return asyncio.run(_listening(command))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM


async def _listening(command: Coroutine[Any, Any, int]) -> int:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await command
