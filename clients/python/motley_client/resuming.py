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

_MAX_DOUBLINGS = 20  # more than it takes to the last pause, and fewer than a float can hold


class Resuming:
    """Count the attempts of one transfer that brought nothing, and say how long to wait before the next.

    Semantics: with `patience`, a server that has `answered` is waited for so long, however many attempts that takes,
    and one that has not is not waited for at all.
    Units: `timeout` in seconds, for all attempts together; None is as long as it takes. `patience` in seconds.
    """

    def __init__(self, timeout: float | None, patience: float | None = None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._patience = patience
        self._has_answered = False
        self._away_since: float | None = None
        self._furthest = 0
        self._num_fruitless = 0

    def seconds_left(self) -> float | None:
        """Return what is left for the next attempt; None is as long as it takes."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def reached(self, place: int) -> None:
        """Take note of how far the transfer has come, in bytes or events; further than ever is progress."""
        if place > self._furthest:
            self._furthest = place
            self._num_fruitless = 0

    def answered(self) -> None:
        """Take note that the server is there; that alone is no progress."""
        self._has_answered = True
        self._away_since = None

    def pause_after(self, error: MotleyClientError) -> float | None:
        """Return how many seconds to wait before going on, or None to give up and raise the error.

        Semantics: that is so if it is an answer, after too many attempts in a row without progress or too long a time
        without an answer, and where no time would be left.
        """
        self._num_fruitless += 1
        if not _is_cut(error) or self._is_hopeless():
            return None
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(self._num_fruitless - 1, _MAX_DOUBLINGS), LAST_PAUSE_SECONDS)
        pause = max(pause, error.retry_after_seconds or 0.0)
        left = self.seconds_left()
        return None if left is not None and pause >= left else pause

    def _is_hopeless(self) -> bool:
        if self._patience is None:
            return self._num_fruitless >= MAX_FRUITLESS_ATTEMPTS
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        return not self._has_answered or now - self._away_since >= self._patience


def _is_cut(error: MotleyClientError) -> bool:
    """Tell whether the way broke, rather than that somebody said no; what nobody said has its code's name as reason."""
    if isinstance(error, OutOfRangeError):
        return error.reason == "UPLOAD_OFFSET"  # a server that restarted has less than it said
    if isinstance(error, NotFoundError):  # another stream has finished it, or it was aborted: the header tells which
        return error.reason in ("UPLOAD_NOT_FOUND", "DATASET_NOT_FOUND")
    if isinstance(error, CancelledRequestError | InternalError):  # a stream that was reset on the way
        return error.reason == error.code and "RST_STREAM" in error.message
    return isinstance(error, UnavailableError)
