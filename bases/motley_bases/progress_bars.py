"""Progress bars of transformers, kept out of a server's log and of what a command prints.

The switch is transformers' own and is the process'; whoever turns it puts it back. Any thread, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from transformers.utils import logging as transformers_logging


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars away for a while."""
    bars = cast(Any, transformers_logging)
    were_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            bars.enable_progress_bar()
