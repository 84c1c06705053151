"""Training put together: datasets, jobs and leases of a server, from its start to its end.

Runs on the main thread, and then on its event loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from motley_server.registry.bundles import BundleStore
from motley_server.registry.collection import Collector
from motley_server.registry.database import Database
from motley_server.registry.dataset_intake import DatasetIntake
from motley_server.registry.dataset_records import FILE_NAME
from motley_server.registry.dataset_uploads import DatasetUploads
from motley_server.registry.datasets import Datasets
from motley_server.registry.jobs import Jobs
from motley_server.registry.leases import Leases
from motley_server.registry.workers import Workers
from motley_server.training.datasets import DatasetDesk, DatasetRegistry
from motley_server.training.jobs import JobDesk
from motley_server.training.keeper import Keeper
from motley_server.training.observer import TrainingObserver

FOLDER = "datasets"


@dataclass(frozen=True, slots=True)
class TrainingLimits:
    """How large datasets may be, how long a lease is kept without a word, and how long jobs last; None is no limit.

    Semantics: `max_dataset_bytes_total` is of a tenant's datasets together, `max_job_duration` of a job's time in
    workers' hands, `ended_jobs_kept` of the time from a job's end until it is forgotten.
    """

    max_dataset_bytes: int
    lease_duration: timedelta
    max_dataset_bytes_total: int | None = None
    max_job_duration: timedelta | None = None
    ended_jobs_kept: timedelta | None = None


class Training:
    """Take datasets in, queue jobs, and lend them to workers."""

    def __init__(self, data_dir: Path, database: Database, limits: TrainingLimits, observer: TrainingObserver) -> None:
        """Open the folder of datasets below the data directory.

        Raises: BundleStoreError (reason=DATA_DIR_IN_USE); OSError.
        """
        self.limits = limits
        self.database = database
        self.datasets = Datasets(database, limits.max_dataset_bytes_total)
        self.jobs = Jobs(database)
        self.workers = Workers(database)
        self.leases = Leases(database, limits.lease_duration, limits.max_job_duration)
        uploads = DatasetUploads(database, limits.max_dataset_bytes_total)
        self._store = BundleStore(data_dir / FOLDER, names=(FILE_NAME,))
        intake = DatasetIntake(self._store, self.datasets, uploads)
        registry = DatasetRegistry(database, self.datasets, uploads, intake)
        self.dataset_desk = DatasetDesk(registry, observer, limits.max_dataset_bytes)
        self.job_desk = JobDesk(database, self.jobs, self.leases, observer)
        collector = Collector(self._store, self.datasets, uploads, database.now)
        self.keeper = Keeper(
            database, self.jobs, self.workers, self.job_desk, self.dataset_desk, collector, observer,
            limits.ended_jobs_kept,
        )  # fmt: skip

    def start(self, collect_seconds: float) -> None:
        """Begin to end leases that are not kept, and to collect what is unwanted."""
        self.keeper.start(collect_seconds)

    async def stop(self) -> None:
        """Let what is being finished end, and take nothing more in."""
        await self.keeper.stop()
        await self.job_desk.stop()
        await self.dataset_desk.stop()
        self._store.close()
