"""What an owner of adapters holds: how many, of how many bytes, and whether there is room for more.

Each version counts with all its bytes, also where several share their files: what others store moves nobody's quota.
It knows no transactions but those that others began, on the database's threads.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, exists, func, select

from motley_server.errors import ResourceExhaustedError
from motley_server.registry.records import Quota
from motley_server.registry.schema import adapter_versions, uploads
from motley_server.registry.visibility import is_of


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
