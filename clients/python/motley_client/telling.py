"""What is told of an upload while it goes on.

Owns that, within a phase, only more is told. An instance belongs to one upload, and may be used by several threads.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from motley_client.types_adapters import UploadPhase, UploadProgress

ProgressCall = Callable[[UploadProgress], None]


class Telling:
    """Tell how far an upload has come, if anybody listens."""

    def __init__(self, progress: ProgressCall | None) -> None:
        self._progress = progress
        self._told: tuple[UploadPhase, int] | None = None
        self._lock = Lock()

    def tell(self, phase: UploadPhase, done_bytes: int, total_bytes: int) -> None:
        """Tell progress, unless that is no more than was told of the phase before: an attempt may begin further back.

        Effects: of several threads, one at a time calls `progress`.
        """
        with self._lock:
            if self._progress is None or (self._told and self._told[0] is phase and done_bytes <= self._told[1]):
                return
            self._told = (phase, done_bytes)
            self._progress(UploadProgress(phase, done_bytes, total_bytes))
