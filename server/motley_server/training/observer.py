"""What training tells whoever counts. Called on the event loop's thread."""

from __future__ import annotations

from typing import Protocol


class TrainingObserver(Protocol):
    """Receive what came in, what was begun and how it ended."""

    def dataset_bytes_uploaded(self, num_bytes: int) -> None:
        """Take note of bytes that a dataset's upload brought."""

    def bytes_collected(self, num_bytes: int) -> None:
        """Take note of bytes on disk that nobody needed any more."""

    def job_leased(self, wait_seconds: float) -> None:
        """Take note of a job that is leased for the first time, and of how long it had been queued."""

    def job_ended(self, method: str, state: str) -> None:
        """Take note of a job's end, by its method and last state."""

    def training_counted(self, num_queued: int, num_running: int, num_workers: int) -> None:
        """Take note of how much there is to do just now, and of who is there to do it."""
