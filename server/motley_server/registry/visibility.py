"""Who may see which adapter, as conditions of the query that looks it up.

What is missing, what was deleted and what is another's differ in nothing but the rows that the one query does not
find: there is no second look that could tell them apart. It knows no names as they are written. Nothing here runs: it
is put together on the database's threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, FromClause, Select, and_, exists, func, or_, select

from motley_server.registry.names import PUBLIC_OWNER
from motley_server.registry.records import Visibility
from motley_server.registry.schema import adapter_versions, adapters, shares

# All but what is hundreds of entries a version, and takes longer to read than the rest together.
BRIEF_COLUMNS = tuple(column for column in adapter_versions.c if column.name not in ("ranks", "files"))
_EVERY_COLUMN = tuple(adapter_versions.c)


def is_of(table: FromClause, owner: str | ColumnElement[str], name: str | ColumnElement[str]) -> ColumnElement[bool]:
    """Tell which rows of a table belong to one adapter."""
    return and_(table.c.owner == owner, table.c.name == name)


def is_visible(tenant_id: str) -> ColumnElement[bool]:
    """Tell which adapters a tenant may use: its own, everybody's, and those that are shared with it."""
    is_shared = exists().where(is_of(shares, adapters.c.owner, adapters.c.name), shares.c.tenant == tenant_id)
    return or_(
        adapters.c.owner.in_((tenant_id, PUBLIC_OWNER)), adapters.c.visibility == Visibility.PUBLIC.value, is_shared
    )


def versions_seen_by(tenant_id: str, columns: Sequence[ColumnElement[Any]] = _EVERY_COLUMN) -> Select[Any]:
    """Select the versions that a tenant may use."""
    joined = adapter_versions.join(adapters, is_of(adapters, adapter_versions.c.owner, adapter_versions.c.name))
    return select(*columns).select_from(joined).where(is_visible(tenant_id))


def latest_seen_by(tenant_id: str, columns: Sequence[ColumnElement[Any]] = _EVERY_COLUMN) -> Select[Any]:
    """Select each adapter that a tenant may use as its newest version, with `visibility` and `adapter_created_at`."""
    others = adapter_versions.alias()
    newest = (
        select(func.max(others.c.version))
        .where(is_of(others, adapters.c.owner, adapters.c.name))
        .correlate(adapters)
        .scalar_subquery()
    )
    return (
        versions_seen_by(tenant_id, columns)
        .where(adapter_versions.c.version == newest)
        .add_columns(adapters.c.visibility, adapters.c.created_at.label("adapter_created_at"))
    )
