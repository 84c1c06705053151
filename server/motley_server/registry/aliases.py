"""Aliases: names for versions, that move from one to another in one step, and back.

An alias points at a version that is there, or it is not. It knows no ownership: whoever calls has looked. It runs
inside transactions that others began, on the database's threads.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, and_, delete, select, update

from motley_server.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from motley_server.registry.adapter_rows import alias_of
from motley_server.registry.names import NAME_RULE, is_name
from motley_server.registry.ownership import find_version, version_not_found
from motley_server.registry.records import Alias
from motley_server.registry.schema import aliases
from motley_server.registry.visibility import is_of

MAX_ALIASES = 100


def check_alias(alias: str, field: str) -> None:
    """Refuse what could not be written after an @, or would be read as a version there.

    Raises: InvalidArgumentError (reason=INVALID_ALIAS).
    """
    if not is_name(alias) or alias.isdigit():
        message = f"{alias[:140]!r} is no alias: {NAME_RULE}, and not digits alone"
        raise InvalidArgumentError(message, reason="INVALID_ALIAS", field=field)


def check_room_for_aliases(connection: Connection, owner: str, name: str, wanted: Sequence[str], field: str) -> None:
    """Refuse aliases that an adapter would have too many with.

    Raises: ResourceExhaustedError (reason=TOO_MANY_ALIASES).
    """
    there = set(connection.execute(select(aliases.c.alias).where(is_of(aliases, owner, name))).scalars())
    if not there.issuperset(wanted) and len(there.union(wanted)) > MAX_ALIASES:
        message = f"adapter {name!r} has {len(there)} aliases; {MAX_ALIASES} are allowed"
        raise ResourceExhaustedError(message, reason="TOO_MANY_ALIASES", field=field)


def point_alias(
    connection: Connection, owner: str, name: str, alias: str, version: int, etag: str | None = None
) -> Alias:
    """Point an alias at a version, or with version 0 remove it; where it points there already, nothing changes.

    Semantics: `etag` is what the caller last saw, empty for an alias that was not there; None overwrites whatever is.
    Raises: NotFoundError (reason=VERSION_NOT_FOUND or ALIAS_NOT_FOUND); AbortedError (reason=ETAG_MISMATCH);
    ResourceExhaustedError (reason=TOO_MANY_ALIASES).
    """
    old = _find(connection, owner, name, alias)
    _check_etag(alias, old, etag)
    if version == 0:
        if old is None:
            raise _alias_not_found(name, alias)
        connection.execute(delete(aliases).where(_is_alias(owner, name, alias)))
        return Alias(alias, 0, old.version, "")
    if find_version(connection, owner, name, version) is None:
        raise version_not_found(name, version)
    if old is None:
        return _add(connection, owner, name, alias, version)
    if old.version == version:
        return old
    return _move(connection, owner, name, Alias(alias, version, old.version, secrets.token_hex(8)))


def roll_back_alias(connection: Connection, owner: str, name: str, alias: str, etag: str | None = None) -> Alias:
    """Point an alias where it pointed before its last move; a second time undoes the first.

    Raises: NotFoundError (reason=ALIAS_NOT_FOUND); AbortedError (reason=ETAG_MISMATCH); FailedPreconditionError
    (reason=NO_PREVIOUS_VERSION).
    """
    old = _find(connection, owner, name, alias)
    _check_etag(alias, old, etag)
    if old is None:
        raise _alias_not_found(name, alias)
    if find_version(connection, owner, name, old.previous_version) is None:
        was = f"pointed at version {old.previous_version}, which was deleted" if old.previous_version else "never moved"
        message = f"alias {alias!r} of adapter {name!r} {was}"
        raise FailedPreconditionError(message, reason="NO_PREVIOUS_VERSION", field="alias")
    return _move(connection, owner, name, Alias(alias, old.previous_version, old.version, secrets.token_hex(8)))


def aliases_at(connection: Connection, owner: str, name: str, version: int) -> list[str]:
    """Return which aliases point at a version."""
    query = select(aliases.c.alias).where(is_of(aliases, owner, name), aliases.c.version == version)
    return list(connection.execute(query.order_by(aliases.c.alias)).scalars())


def _find(connection: Connection, owner: str, name: str, alias: str) -> Alias | None:
    row = connection.execute(select(aliases).where(_is_alias(owner, name, alias))).mappings().one_or_none()
    return None if row is None else alias_of(row)


def _is_alias(owner: str, name: str, alias: str) -> ColumnElement[bool]:
    return and_(is_of(aliases, owner, name), aliases.c.alias == alias)


def _check_etag(alias: str, old: Alias | None, etag: str | None) -> None:
    if etag is not None and etag != ("" if old is None else old.etag):
        message = f"alias {alias!r} was moved since that etag was read: read it again"
        raise AbortedError(message, reason="ETAG_MISMATCH", field="etag")


def _alias_not_found(name: str, alias: str) -> NotFoundError:
    message = f"adapter {name!r} has no alias {alias!r}"
    return NotFoundError(message, reason="ALIAS_NOT_FOUND", field="alias")


def _add(connection: Connection, owner: str, name: str, alias: str, version: int) -> Alias:
    check_room_for_aliases(connection, owner, name, [alias], "alias")
    added = Alias(alias, version, 0, secrets.token_hex(8))
    connection.execute(aliases.insert().values(owner=owner, name=name, alias=alias, version=version, etag=added.etag))
    return added


def _move(connection: Connection, owner: str, name: str, moved: Alias) -> Alias:
    values = {"version": moved.version, "previous_version": moved.previous_version, "etag": moved.etag}
    connection.execute(update(aliases).where(_is_alias(owner, name, moved.alias)).values(**values))
    return moved
