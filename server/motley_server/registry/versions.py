"""Versions of adapters: the newest, the next, and the one that a name means.

What a name means is one query, with the same conditions for what is missing, deleted and another's. It knows no files
and no transactions but those that others began, on the database's threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, and_, delete, select, update

from motley_server.registry.adapter_rows import version_of
from motley_server.registry.holdings import has_version
from motley_server.registry.names import AdapterReference, is_name
from motley_server.registry.records import AdapterVersion, NewVersion, Visibility
from motley_server.registry.schema import adapter_versions, adapters, aliases
from motley_server.registry.visibility import is_of, versions_seen_by


def find_meaning(
    connection: Connection, tenant_id: str, reference: AdapterReference, *, only_own: bool = False
) -> AdapterVersion | None:
    """Return what a name means to a tenant just now; None if that is nothing, for whatever reason.

    Semantics: a digest means the newest of the versions that have it.
    """
    owner = reference.owner or tenant_id
    if not (is_name(owner) and is_name(reference.name)):
        return None
    query = versions_seen_by(tenant_id).where(is_of(adapter_versions, owner, reference.name))
    if only_own:
        query = query.where(adapter_versions.c.owner == tenant_id)
    row = connection.execute(_narrow(query, owner, reference)).mappings().one_or_none()
    return None if row is None else version_of(row)


def newest_version(connection: Connection, owner: str, name: str) -> AdapterVersion | None:
    """Return the newest version of an adapter; None if it has none."""
    query = select(adapter_versions).where(is_of(adapter_versions, owner, name))
    row = connection.execute(query.order_by(adapter_versions.c.version.desc()).limit(1)).mappings().one_or_none()
    return None if row is None else version_of(row)


def is_same(version: AdapterVersion, content: NewVersion) -> bool:
    """Tell whether a version has a content already: what it computes, its files and its labels."""
    is_same_adapter = (version.digest, version.bundle) == (content.digest, content.bundle)
    return is_same_adapter and dict(version.labels) == dict(content.labels)


def add_version(
    connection: Connection, owner: str, name: str, columns: Mapping[str, Any], now: datetime
) -> AdapterVersion:
    """Add a version under the next number, which none had before, were it deleted, and its owner since."""
    is_it = is_of(adapters, owner, name)
    last = connection.execute(select(adapters.c.last_version).where(is_it)).scalar()
    number = (last or 0) + 1
    values: dict[str, Any] = {"last_version": number}
    if not has_version(connection, owner, name):  # also a name that comes back begins now
        values["created_at"] = now
    if last is None:
        private = Visibility.PRIVATE.value
        connection.execute(adapters.insert().values(owner=owner, name=name, visibility=private, **values))
    else:
        connection.execute(update(adapters).where(is_it).values(**values))
    row = {"owner": owner, "name": name, "version": number, "created_at": now, "is_pinned": False, **columns}
    connection.execute(adapter_versions.insert().values(row))
    return version_of(row)


def pin_version(connection: Connection, row: RowMapping, is_pinned: bool) -> None:
    """Note whether a version is to stay on the device, which alone may change of one."""
    connection.execute(update(adapter_versions).where(_is_version(row)).values(is_pinned=is_pinned))


def remove_version(connection: Connection, row: RowMapping) -> None:
    """Remove a version that no alias points at; its number stays given."""
    connection.execute(delete(adapter_versions).where(_is_version(row)))


def _is_version(row: RowMapping) -> ColumnElement[bool]:
    return and_(is_of(adapter_versions, row["owner"], row["name"]), adapter_versions.c.version == row["version"])


def _narrow(versions: Select[Any], owner: str, reference: AdapterReference) -> Select[Any]:
    """Return the query for what a reference says of an adapter's versions, one at most."""
    if reference.digest is not None:
        chosen = versions.where(adapter_versions.c.digest == reference.digest)
        return chosen.order_by(adapter_versions.c.version.desc()).limit(1)
    if reference.version is not None:
        return versions.where(adapter_versions.c.version == reference.version)
    pointed = select(aliases.c.version).where(is_of(aliases, owner, reference.name), aliases.c.alias == reference.alias)
    return versions.where(adapter_versions.c.version == pointed.scalar_subquery())
