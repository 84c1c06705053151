"""What training tells, as series (see `TrainingObserver`); `metrics.py` shows them with the rest.

How many jobs there are is what the keeper counted last, a moment ago, in the database: those of every server on it.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

METHODS: Final = ("lora", "s2ft", "goat", "loram", "loqt")
ENDS: Final = ("succeeded", "rejected", "failed", "cancelled")
WAIT_BUCKETS: Final = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)


class TrainingMetrics:
    """Count datasets, jobs and workers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._dataset_bytes = Counter("motley_training_dataset_bytes", "Bytes of datasets", registry=registry)
        self._jobs = Gauge("motley_training_jobs", "Jobs that have not ended", ["state"], registry=registry)
        for state in ("queued", "running"):
            self._jobs.labels(state)
        self._jobs_ended = Counter(
            "motley_training_jobs_ended", "Jobs that ended", ["method", "state"], registry=registry
        )
        for method in METHODS:
            for state in ENDS:
                self._jobs_ended.labels(method, state)
        self._wait = Histogram(
            "motley_training_wait_seconds", "From queued to leased", buckets=WAIT_BUCKETS, registry=registry
        )
        self._workers = Gauge("motley_training_workers", "Workers heard of", registry=registry)

    def dataset_bytes_uploaded(self, num_bytes: int) -> None:
        """Count bytes that a dataset's upload brought."""
        self._dataset_bytes.inc(num_bytes)

    def job_leased(self, wait_seconds: float) -> None:
        """Measure how long a job waited for its first worker."""
        self._wait.observe(wait_seconds)

    def job_ended(self, method: str, state: str) -> None:
        """Count a job that this server saw end."""
        self._jobs_ended.labels(method, state).inc()

    def training_counted(self, num_queued: int, num_running: int, num_workers: int) -> None:
        """Show how much there is to do, and who is there to do it."""
        self._jobs.labels("queued").set(num_queued)
        self._jobs.labels("running").set(num_running)
        self._workers.set(num_workers)
