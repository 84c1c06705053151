"""Adapters: whose they are, their versions, what a name means, and to whom.

A version is immutable and its number is never given twice, also once it was deleted. An alias moves, and with it what a
name means. Who looks for what is missing, deleted or another's gets one answer, after the same queries. It knows
digests and facts, not files or tensors. Methods block: they run on the database's threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, and_, func, select, update

from motley_server.errors import FailedPreconditionError, InvalidArgumentError
from motley_server.registry import adapter_rows
from motley_server.registry.aliases import aliases_at, check_alias, point_alias, roll_back_alias
from motley_server.registry.catalog import PUBLIC_OWNER
from motley_server.registry.database import Database
from motley_server.registry.holdings import check_room, has_version
from motley_server.registry.idempotency import Request
from motley_server.registry.labels import check_labels
from motley_server.registry.listings import page_of_adapters, page_of_versions, require_visible
from motley_server.registry.names import NAME_RULE, AdapterReference, is_name
from motley_server.registry.ownership import find_version, require_own, version_not_found
from motley_server.registry.records import AdapterRecord, AdapterVersion, Alias, NewVersion, Page, Quota, Visibility
from motley_server.registry.schema import adapter_versions, adapters, aliases
from motley_server.registry.sharing import check_sharing, share_adapter
from motley_server.registry.tenants import has_tenant, tenant_not_found
from motley_server.registry.visibility import IS_THERE, is_of, versions_seen_by


class Adapters:
    """Keep adapters. What changes one takes a request id, whose repeat has the same answer.

    Semantics: `owner` is a tenant or `public`; a method that takes `tenant_id` before it does for this tenant what it
    may, and whoever acts for `public` is `public`. Reasons of request ids are as in `Tenants`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def check_room(self, owner: str, name: str, size_bytes: int, quota: Quota) -> None:
        """Refuse what could not be published as things stand, before anybody has sent it.

        Raises: as `publish`, for the name, the owner and the quota.
        """
        _check_name(name)
        with self._database.reading() as connection:
            _require_owner(connection, owner)
            check_room(connection, owner, name, size_bytes, quota)

    def publish(
        self,
        owner: str,
        name: str,
        content: NewVersion,
        aliases: Sequence[str] = (),
        *,
        quota: Quota,
        request_id: str = "",
        scope: str = "",
    ) -> AdapterVersion:
        """Give content the next number and point aliases at it; what is the newest version already stays that one.

        Raises: InvalidArgumentError (reason=INVALID_ADAPTER_NAME, INVALID_ALIAS or INVALID_LABEL); NotFoundError
        (reason=TENANT_NOT_FOUND); ResourceExhaustedError (reason=QUOTA_ADAPTERS, QUOTA_ADAPTER_BYTES or
        TOO_MANY_ALIASES).
        """
        _check_name(name)
        check_labels(content.labels)
        for number, alias in enumerate(aliases):
            check_alias(alias, f"aliases[{number}]")
        columns = adapter_rows.columns_of(content)
        # Not by whose key: a caller may have got another one before it tries again.
        repeated = columns | {"created_by": ""}
        request = Request.of(
            "adapters.publish", scope, request_id, owner=owner, name=name, aliases=[*aliases], content=repeated
        )
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return adapter_rows.version_answered(answer)
            _require_owner(connection, owner)
            version = _newest_if_same(connection, owner, name, content)
            if version is None:
                check_room(connection, owner, name, content.size_bytes, quota)
                version = _add_version(connection, owner, name, columns, now)
            for alias in aliases:
                point_alias(connection, owner, name, alias, version.version)
            request.keep_answer(connection, now, adapter_rows.version_answer(version))
            return version

    def resolve(self, tenant_id: str, reference: AdapterReference) -> AdapterVersion | None:
        """Return what a name means to a tenant just now; None if that is nothing, for whatever reason.

        Semantics: a digest means the newest of the versions that have it.
        """
        owner = reference.owner or tenant_id
        if not (is_name(owner) and is_name(reference.name)):
            return None
        query = versions_seen_by(tenant_id).where(is_of(adapter_versions, owner, reference.name))
        with self._database.reading() as connection:
            row = connection.execute(_narrow(query, owner, reference)).mappings().one_or_none()
            return None if row is None else adapter_rows.version_of(row)

    def get(self, tenant_id: str, owner: str, name: str) -> AdapterRecord:
        """Return an adapter that a tenant may use.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND).
        """
        with self._database.reading() as connection:
            return require_visible(connection, tenant_id, owner, name)

    def list(self, tenant_id: str, page_size: int = 0, page_token: str = "", filter: str = "") -> Page[AdapterRecord]:
        """Return the next adapters that a tenant may use, by owner and name.

        Raises: InvalidArgumentError (reason=BAD_FILTER, BAD_PAGE_TOKEN or OUT_OF_RANGE).
        """
        with self._database.reading() as connection:
            return page_of_adapters(connection, self._database.page_secret, tenant_id, page_size, page_token, filter)

    def list_versions(
        self, tenant_id: str, owner: str, name: str, page_size: int = 0, page_token: str = ""
    ) -> Page[AdapterVersion]:
        """Return the next versions of an adapter, the newest first.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND); InvalidArgumentError (reason=BAD_PAGE_TOKEN or OUT_OF_RANGE).
        """
        with self._database.reading() as connection:
            require_visible(connection, tenant_id, owner, name)
            return page_of_versions(connection, self._database.page_secret, owner, name, page_size, page_token)

    def set_alias(
        self,
        tenant_id: str,
        owner: str,
        name: str,
        alias: str,
        version: int,
        *,
        etag: str | None = None,
        request_id: str = "",
        scope: str = "",
    ) -> Alias:
        """Point an alias of a tenant's own adapter at a version, or with version 0 remove it; see `point_alias`.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND too); InvalidArgumentError (reason=INVALID_ALIAS).
        """
        check_alias(alias, "alias")
        asked = {"tenant_id": tenant_id, "owner": owner, "name": name, "alias": alias, "version": version, "etag": etag}
        request = Request.of("adapters.set_alias", scope, request_id, **asked)
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return adapter_rows.alias_answered(answer)
            require_own(connection, tenant_id, owner, name)
            pointed = point_alias(connection, owner, name, alias, version, etag)
            request.keep_answer(connection, now, asdict(pointed))
            return pointed

    def rollback_alias(
        self,
        tenant_id: str,
        owner: str,
        name: str,
        alias: str,
        *,
        etag: str | None = None,
        request_id: str = "",
        scope: str = "",
    ) -> Alias:
        """Point an alias of a tenant's own adapter where it pointed before; see `roll_back_alias`.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND too); InvalidArgumentError (reason=INVALID_ALIAS).
        """
        check_alias(alias, "alias")
        asked = {"tenant_id": tenant_id, "owner": owner, "name": name, "alias": alias, "etag": etag}
        request = Request.of("adapters.rollback_alias", scope, request_id, **asked)
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return adapter_rows.alias_answered(answer)
            require_own(connection, tenant_id, owner, name)
            pointed = roll_back_alias(connection, owner, name, alias, etag)
            request.keep_answer(connection, now, asdict(pointed))
            return pointed

    def share(
        self,
        tenant_id: str,
        owner: str,
        name: str,
        visibility: Visibility,
        tenants: Sequence[str] = (),
        *,
        request_id: str = "",
        scope: str = "",
    ) -> AdapterRecord:
        """Replace who besides its owner may use a tenant's own adapter.

        Raises: InvalidArgumentError (reason=INVALID_SHARING); NotFoundError (reason=ADAPTER_NOT_FOUND or
        TENANT_NOT_FOUND).
        """
        check_sharing(owner, visibility, tenants)
        asked = {"tenant_id": tenant_id, "owner": owner, "name": name, "tenants": sorted(tenants)}
        request = Request.of("adapters.share", scope, request_id, visibility=visibility.value, **asked)
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return adapter_rows.record_answered(answer)
            require_own(connection, tenant_id, owner, name)
            share_adapter(connection, owner, name, visibility, tenants)
            record = require_visible(connection, tenant_id, owner, name)
            request.keep_answer(connection, now, adapter_rows.record_answer(record))
            return record

    def delete_version(
        self, tenant_id: str, owner: str, name: str, version: int, *, request_id: str = "", scope: str = ""
    ) -> AdapterVersion:
        """Delete a version of a tenant's own adapter; a name that has none left is private, should it come back.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND or VERSION_NOT_FOUND); FailedPreconditionError
        (reason=VERSION_HAS_ALIAS).
        """
        asked = {"tenant_id": tenant_id, "owner": owner, "name": name, "version": version}
        request = Request.of("adapters.delete_version", scope, request_id, **asked)
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return adapter_rows.version_answered(answer)
            require_own(connection, tenant_id, owner, name)
            row = find_version(connection, owner, name, version)
            if row is None:
                raise version_not_found(name, version)
            if pointing := aliases_at(connection, owner, name, version):
                message = f"version {version} of adapter {name!r} is what {', '.join(pointing)} points at"
                raise FailedPreconditionError(message, reason="VERSION_HAS_ALIAS", field="version")
            is_it = and_(is_of(adapter_versions, owner, name), adapter_versions.c.version == version)
            connection.execute(update(adapter_versions).where(is_it).values(deleted_at=now))
            if not has_version(connection, owner, name):
                share_adapter(connection, owner, name, Visibility.PRIVATE)
            deleted = adapter_rows.version_of(row)
            request.keep_answer(connection, now, adapter_rows.version_answer(deleted))
            return deleted

    def live_bundles(self) -> set[str]:
        """Return the bundles that some version needs."""
        with self._database.reading() as connection:
            return set(connection.execute(select(adapter_versions.c.bundle).where(IS_THERE).distinct()).scalars())


def _check_name(name: str) -> None:
    if not is_name(name):
        message = f"{name[:140]!r} is no adapter's name: {NAME_RULE}"
        raise InvalidArgumentError(message, reason="INVALID_ADAPTER_NAME", field="adapter_name")


def _require_owner(connection: Connection, owner: str) -> None:
    # It may have gone while its files were on their way, and its id may be another's one day.
    if owner != PUBLIC_OWNER and not has_tenant(connection, owner):
        raise tenant_not_found(owner, "owner")


def _newest_if_same(connection: Connection, owner: str, name: str, content: NewVersion) -> AdapterVersion | None:
    query = select(adapter_versions).where(is_of(adapter_versions, owner, name), IS_THERE)
    query = query.order_by(adapter_versions.c.version.desc()).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    is_same = row is not None and (row["digest"], row["bundle"]) == (content.digest, content.bundle)
    return adapter_rows.version_of(row) if row is not None and is_same else None


def _add_version(
    connection: Connection, owner: str, name: str, columns: Mapping[str, Any], now: datetime
) -> AdapterVersion:
    last = select(func.max(adapter_versions.c.version)).where(is_of(adapter_versions, owner, name))
    number = (connection.execute(last).scalar() or 0) + 1  # of the deleted ones too
    if number == 1:
        private = Visibility.PRIVATE.value
        connection.execute(adapters.insert().values(owner=owner, name=name, visibility=private, created_at=now))
    row = {"owner": owner, "name": name, "version": number, "created_at": now, **columns}
    connection.execute(adapter_versions.insert().values(row))
    return adapter_rows.version_of(row)


def _narrow(versions: Select[Any], owner: str, reference: AdapterReference) -> Select[Any]:
    """Return the query for what a reference says of an adapter's versions, one at most."""
    if reference.digest is not None:
        chosen = versions.where(adapter_versions.c.digest == reference.digest)
        return chosen.order_by(adapter_versions.c.version.desc()).limit(1)
    if reference.version is not None:
        return versions.where(adapter_versions.c.version == reference.version)
    pointed = select(aliases.c.version).where(is_of(aliases, owner, reference.name), aliases.c.alias == reference.alias)
    return versions.where(adapter_versions.c.version == pointed.scalar_subquery())
