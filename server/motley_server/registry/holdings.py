"""What an owner holds of adapters, datasets and jobs: how many, of how many bytes, and whether there is room for more.

Each version counts with all its bytes, also where several share their files: what others store moves nobody's quota.
It knows no transactions but those that others began, on the database's threads.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Select, Table, delete, exists, func, select

from motley_server.errors import ResourceExhaustedError
from motley_server.registry.job_records import OPEN_STATES
from motley_server.registry.records import Quota
from motley_server.registry.schema import adapter_versions, dataset_uploads, datasets, jobs, uploads
from motley_server.registry.visibility import is_of

MAX_DATASETS = 1000


def has_adapters(connection: Connection, owner: str) -> bool:
    """Tell whether an owner has any version."""
    return bool(connection.execute(select(exists().where(adapter_versions.c.owner == owner))).scalar())


def forget_uploads(connection: Connection, owner: str) -> None:
    """Forget an owner's uploads, whose name may be another's one day; the numbers of its versions stay given."""
    connection.execute(delete(uploads).where(uploads.c.owner == owner))


def has_version(connection: Connection, owner: str, name: str) -> bool:
    """Tell whether an adapter has any version."""
    return bool(connection.execute(select(exists().where(is_of(adapter_versions, owner, name)))).scalar())


def check_room(
    connection: Connection, owner: str, name: str, size_bytes: int, quota: Quota, announced_bytes: int = 0
) -> None:
    """Refuse one more version that an owner's quota has no room for, beside bytes that are on their way.

    Raises: ResourceExhaustedError (reason=QUOTA_ADAPTERS or QUOTA_ADAPTER_BYTES).
    """
    if quota.adapters is not None and not has_version(connection, owner, name):
        names = select(adapter_versions.c.name).where(adapter_versions.c.owner == owner).distinct()
        held = connection.execute(select(func.count()).select_from(names.subquery())).scalar_one()
        if held >= quota.adapters:
            message = f"{owner!r} has {held} adapters, of {quota.adapters} that its quota allows"
            raise ResourceExhaustedError(message, reason="QUOTA_ADAPTERS", field="quota.adapters")
    if quota.adapter_bytes is not None:
        total = select(func.coalesce(func.sum(adapter_versions.c.size_bytes), 0))
        used = int(connection.execute(total.where(adapter_versions.c.owner == owner)).scalar_one())
        if used + announced_bytes + size_bytes > quota.adapter_bytes:
            coming = f" and {announced_bytes} on their way" if announced_bytes else ""
            message = (
                f"{owner!r} has adapters of {used} bytes{coming}; {size_bytes} more are over the {quota.adapter_bytes} "
                "that its quota allows"
            )
            raise ResourceExhaustedError(message, reason="QUOTA_ADAPTER_BYTES", field="quota.adapter_bytes")


def check_room_for_dataset(
    connection: Connection, owner: str, digest: str, size_bytes: int, max_total_bytes: int | None
) -> None:
    """Refuse one dataset more than an owner may have, or more bytes; one that it has already takes no room.

    Semantics: of uploads on their way what they announced counts too.
    Raises: ResourceExhaustedError (reason=TOO_MANY_DATASETS or TOO_MANY_DATASET_BYTES).
    """
    others = select(func.count()).where(datasets.c.owner == owner, datasets.c.digest != digest)
    held = connection.execute(others).scalar_one()
    if held >= MAX_DATASETS:
        message = f"{owner!r} has {held} datasets already: delete one"
        raise ResourceExhaustedError(message, reason="TOO_MANY_DATASETS", field="digest")
    if max_total_bytes is None:
        return
    known = select(datasets.c.digest).where(datasets.c.owner == owner)
    coming = dataset_uploads.c.digest.not_in(known)  # what comes again for a dataset is counted with that
    in_datasets, in_uploads = (
        _bytes_in(datasets, owner, digest),
        _bytes_in(dataset_uploads, owner, digest).where(coming),
    )
    used = sum(int(connection.execute(query).scalar_one()) for query in (in_datasets, in_uploads))
    if used + size_bytes > max_total_bytes:
        message = (
            f"{owner!r} has datasets of {used} bytes, with those on their way; {size_bytes} more are over the "
            f"{max_total_bytes} that a tenant may have: delete some"
        )
        raise ResourceExhaustedError(message, reason="TOO_MANY_DATASET_BYTES", field="size_bytes")


def _bytes_in(table: Table, owner: str, but: str) -> Select[Any]:
    total = select(func.coalesce(func.sum(table.c.size_bytes), 0))
    return total.where(table.c.owner == owner, table.c.digest != but)


def count_open_jobs(connection: Connection, owner: str) -> int:
    """Return how many jobs of an owner have not ended."""
    found = select(func.count()).where(jobs.c.owner == owner, jobs.c.state.in_(OPEN_STATES))
    return int(connection.execute(found).scalar_one())


def check_room_for_job(connection: Connection, owner: str, quota: Quota) -> None:
    """Refuse one more job than an owner's quota allows to be on their way.

    Raises: ResourceExhaustedError (reason=QUOTA_TRAINING_JOBS).
    """
    if quota.training_jobs is None:
        return
    held = count_open_jobs(connection, owner)
    if held >= quota.training_jobs:
        message = (
            f"{owner!r} has {held} training jobs that have not ended, of {quota.training_jobs} that its quota allows"
        )
        raise ResourceExhaustedError(message, reason="QUOTA_TRAINING_JOBS", field="quota.training_jobs")
