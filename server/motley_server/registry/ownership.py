"""Whose an adapter is, for whoever wants to change it.

What is missing, what was deleted and what is another's are the same answer after the same one query, also where the
caller may use it. It knows no transactions but those that others began, on the database's threads.
"""

from __future__ import annotations

from sqlalchemy import Connection, RowMapping, select

from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry.names import NAME_RULE, is_name
from motley_server.registry.schema import adapter_versions
from motley_server.registry.visibility import is_of


def check_adapter_name(name: str) -> None:
    """Refuse what could not name an adapter.

    Raises: InvalidArgumentError (reason=INVALID_ADAPTER_NAME).
    """
    if not is_name(name):
        message = f"{name[:140]!r} is no adapter's name: {NAME_RULE}"
        raise InvalidArgumentError(message, reason="INVALID_ADAPTER_NAME", field="adapter_name")


def adapter_not_found(text: str, field: str) -> NotFoundError:
    """Return the error for an adapter that a caller may not use, or that is not there."""
    message = f"there is no adapter {text[:300]!r} that you may use"
    return NotFoundError(message, reason="ADAPTER_NOT_FOUND", field=field)


def not_ones_own(owner: str, name: str) -> NotFoundError:
    """Return the error for an adapter that is not its caller's own, or that is not there."""
    message = f"there is no adapter {f'{owner}/{name}'[:300]!r} of yours"
    return NotFoundError(message, reason="ADAPTER_NOT_FOUND", field="name")


def version_not_found(name: str, version: int) -> NotFoundError:
    """Return the error for a version of one's own adapter that is not there."""
    message = f"adapter {name!r} has no version {version}"
    return NotFoundError(message, reason="VERSION_NOT_FOUND", field="version")


def require_own(connection: Connection, tenant_id: str, owner: str, name: str) -> None:
    """Refuse an adapter that has no version, or that is not the tenant's own.

    Raises: NotFoundError (reason=ADAPTER_NOT_FOUND).
    """
    found = None
    if is_name(owner) and is_name(name):
        versions = select(adapter_versions.c.version).where(is_of(adapter_versions, owner, name))
        found = connection.execute(versions.where(adapter_versions.c.owner == tenant_id).limit(1)).first()
    if found is None:
        raise not_ones_own(owner, name)


def find_version(connection: Connection, owner: str, name: str, version: int) -> RowMapping | None:
    """Return the row of a version that is there."""
    query = select(adapter_versions).where(is_of(adapter_versions, owner, name))
    return connection.execute(query.where(adapter_versions.c.version == version)).mappings().one_or_none()
