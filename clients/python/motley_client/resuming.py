"""When a transfer that broke off goes on, and when it is given up.

Owns which failures are a connection's and not an answer, the pauses between attempts, and the time that is left. Knows
nothing of what is transferred. An instance belongs to one transfer.
"""

from __future__ import annotations

import time

from motley_client.errors import (
    CancelledRequestError,
    InternalError,
    MotleyClientError,
    NotFoundError,
    OutOfRangeError,
    UnavailableError,
)

FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 5.0
MAX_FRUITLESS_ATTEMPTS = 8


class Resuming:
    """Count the attempts of one transfer that brought nothing, and say how long to wait before the next.

    Units: `timeout` in seconds, for all attempts together; None is as long as it takes.
    """

    def __init__(self, timeout: float | None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._most_bytes = 0
        self._num_fruitless = 0

    def seconds_left(self) -> float | None:
        """Return what is left for the next attempt; None is as long as it takes."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def reached(self, num_bytes: int) -> None:
        """Take note of how far the transfer has come; further than ever is progress."""
        if num_bytes > self._most_bytes:
            self._most_bytes = num_bytes
            self._num_fruitless = 0

    def pause_after(self, error: MotleyClientError) -> float | None:
        """Return how many seconds to wait before going on, or None to give up and raise the error.

        Semantics: that is so if it is an answer, after too many attempts in a row without progress, and where no time
        would be left.
        """
        self._num_fruitless += 1
        if not _is_cut(error) or self._num_fruitless >= MAX_FRUITLESS_ATTEMPTS:
            return None
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (self._num_fruitless - 1), LAST_PAUSE_SECONDS)
        pause = max(pause, error.retry_after_seconds or 0.0)
        left = self.seconds_left()
        return None if left is not None and pause >= left else pause


def _is_cut(error: MotleyClientError) -> bool:
    """Tell whether the way broke, rather than that somebody said no; what nobody said has its code's name as reason."""
    if isinstance(error, OutOfRangeError):
        return error.reason == "UPLOAD_OFFSET"  # a server that restarted has less than it said
    if isinstance(error, NotFoundError):  # another stream made it a version, or it was aborted: the header tells which
        return error.reason == "UPLOAD_NOT_FOUND"
    if isinstance(error, CancelledRequestError | InternalError):  # a stream that was reset on the way
        return error.reason == error.code and "RST_STREAM" in error.message
    return isinstance(error, UnavailableError)
