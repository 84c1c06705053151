"""Adapters: whose they are, their versions, what a name means, and to whom.

A version is immutable and its number is never given twice, also once it was deleted. An alias moves, and with it what a
name means. Who looks for what is missing, deleted or another's gets one answer, after the same queries. It knows
digests and facts, not files or tensors. Methods block: they run on the database's threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime

from sqlalchemy import Connection, RowMapping, select

from motley_server.errors import FailedPreconditionError
from motley_server.registry import adapter_rows
from motley_server.registry.aliases import aliases_at, check_alias, point_alias, roll_back_alias
from motley_server.registry.database import Database
from motley_server.registry.holdings import check_room, has_version
from motley_server.registry.idempotency import Request
from motley_server.registry.labels import check_labels
from motley_server.registry.listings import page_of_adapters, page_of_versions, require_visible
from motley_server.registry.names import AdapterReference, is_name
from motley_server.registry.ownership import (
    check_adapter_name,
    find_version,
    not_ones_own,
    require_own,
    version_not_found,
)
from motley_server.registry.records import AdapterRecord, AdapterVersion, Alias, NewVersion, Page, Quota, Visibility
from motley_server.registry.schema import adapter_versions
from motley_server.registry.sharing import check_sharing, share_adapter
from motley_server.registry.tenants import require_owner
from motley_server.registry.uploads import forget_upload, upload_not_found
from motley_server.registry.versions import (
    add_version,
    find_meaning,
    is_same,
    newest_version,
    pin_version,
    remove_version,
)

Guard = Callable[[Connection], None]
"""Raises what forbids a publication; what it looks at cannot change before the publication is done."""


class Adapters:
    """Keep adapters. What changes one takes a request id, whose repeat has the same answer.

    Semantics: `owner` is a tenant or `public`; a method that takes `tenant_id` before it does for this tenant what it
    may, and whoever acts for `public` is `public`. Reasons of request ids are as in `Tenants`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def publish(
        self,
        owner: str,
        name: str,
        content: NewVersion,
        aliases: Sequence[str] = (),
        *,
        quota: Quota,
        upload_id: str = "",
        request_id: str = "",
        scope: str = "",
        guard: Guard | None = None,
    ) -> AdapterVersion:
        """Give content the next number and point aliases at it; what is the newest version already stays that one.

        Semantics: the upload that brought it is off the record in the same moment; one that is not on it any more
        brings nothing, whoever has its owner's name by now. Of the quota, other uploads have nothing. A repeat counts
        as one for as long as its version is there. `guard` looks first, in the same transaction: what it raises leaves
        everything as it was, and what it found still holds when the version is there.
        Raises: InvalidArgumentError (reason=INVALID_ADAPTER_NAME, INVALID_ALIAS or INVALID_LABEL); NotFoundError
        (reason=TENANT_NOT_FOUND or UPLOAD_NOT_FOUND); ResourceExhaustedError (reason=QUOTA_ADAPTERS,
        QUOTA_ADAPTER_BYTES or TOO_MANY_ALIASES).
        """
        check_adapter_name(name)
        check_labels(content.labels)
        for number, alias in enumerate(aliases):
            check_alias(alias, f"aliases[{number}]")
        request = _publication(owner, name, content.bundle, content.labels, aliases, request_id, scope)
        with self._database.writing() as connection:
            if guard is not None:
                guard(connection)
            now = self._database.now()
            is_on_record = forget_upload(connection, owner, upload_id)
            if (earlier := _earlier_version(connection, request, now)) is not None:
                return earlier
            require_owner(connection, owner)
            if upload_id and not is_on_record:
                raise upload_not_found()
            version = newest_version(connection, owner, name)
            if version is None or not is_same(version, content):
                check_room(connection, owner, name, content.size_bytes, quota)
                version = add_version(connection, owner, name, adapter_rows.columns_of(content), now)
            for alias in aliases:
                point_alias(connection, owner, name, alias, version.version)
            request.keep_answer(connection, now, adapter_rows.version_answer(version))
            return version

    def earlier_publication(
        self,
        owner: str,
        name: str,
        bundle: str,
        labels: Mapping[str, str],
        aliases: Sequence[str],
        *,
        request_id: str,
        scope: str,
    ) -> AdapterVersion | None:
        """Return what `publish` answered when it was asked the same under this request id; None if it was not.

        Semantics: None, too, once that version was deleted.
        Raises: AlreadyExistsError (reason=REQUEST_ID_REUSED) where it was asked something else.
        """
        request = _publication(owner, name, bundle, labels, aliases, request_id, scope)
        with self._database.reading() as connection:
            return _earlier_version(connection, request, self._database.now())

    def newest(self, owner: str, name: str) -> AdapterVersion | None:
        """Return the newest version of an adapter, whoever may see it; None if it has none."""
        if not (is_name(owner) and is_name(name)):
            return None
        with self._database.reading() as connection:
            return newest_version(connection, owner, name)

    def resolve(self, tenant_id: str, reference: AdapterReference) -> AdapterVersion | None:
        """Return what a name means to a tenant just now; see `find_meaning`."""
        with self._database.reading() as connection:
            return find_meaning(connection, tenant_id, reference)

    def own(self, tenant_id: str, reference: AdapterReference) -> AdapterVersion:
        """Return what a name means to a tenant just now, if it is the tenant's own.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND).
        """
        with self._database.reading() as connection:
            found = find_meaning(connection, tenant_id, reference, only_own=True)
        if found is None:
            raise not_ones_own(reference.owner or tenant_id, reference.name)
        return found

    def get(self, tenant_id: str, owner: str, name: str) -> AdapterRecord:
        """Return an adapter that a tenant may use.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND).
        """
        with self._database.reading() as connection:
            return require_visible(connection, tenant_id, owner, name)

    def list(self, tenant_id: str, page_size: int = 0, page_token: str = "", filter: str = "") -> Page[AdapterRecord]:
        """Return the next adapters that a tenant may use, by owner and name, their versions without ranks and files.

        Raises: InvalidArgumentError (reason=BAD_FILTER, BAD_PAGE_TOKEN or OUT_OF_RANGE).
        """
        with self._database.reading() as connection:
            return page_of_adapters(connection, self._database.page_secret, tenant_id, page_size, page_token, filter)

    def list_versions(
        self, tenant_id: str, owner: str, name: str, page_size: int = 0, page_token: str = ""
    ) -> Page[AdapterVersion]:
        """Return the next versions of an adapter, the newest first, without ranks and files.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND); InvalidArgumentError (reason=BAD_PAGE_TOKEN or OUT_OF_RANGE).
        """
        with self._database.reading() as connection:
            require_visible(connection, tenant_id, owner, name)
            secret = self._database.page_secret
            return page_of_versions(connection, secret, tenant_id, owner, name, page_size, page_token)

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

    def check_deletable(self, tenant_id: str, owner: str, name: str, version: int) -> AdapterVersion:
        """Return a version that could be deleted as things stand.

        Raises: as `delete_version`, without a request id.
        """
        with self._database.reading() as connection:
            return adapter_rows.version_of(_require_deletable(connection, tenant_id, owner, name, version))

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
            row = _require_deletable(connection, tenant_id, owner, name, version)
            remove_version(connection, row)
            if not has_version(connection, owner, name):
                share_adapter(connection, owner, name, Visibility.PRIVATE)
            deleted = adapter_rows.version_of(row)
            request.keep_answer(connection, now, adapter_rows.version_answer(deleted))
            return deleted

    def set_pinned(self, tenant_id: str, owner: str, name: str, version: int, is_pinned: bool) -> AdapterVersion:
        """Note whether a version of a tenant's own adapter is to stay on the device.

        Raises: NotFoundError (reason=ADAPTER_NOT_FOUND or VERSION_NOT_FOUND).
        """
        with self._database.writing() as connection:
            row = _require_own_version(connection, tenant_id, owner, name, version)
            pin_version(connection, row, is_pinned)
            return replace(adapter_rows.version_of(row), is_pinned=is_pinned)

    def pinned(self) -> tuple[AdapterVersion, ...]:
        """Return the versions that are to stay on the device, in the order in which they were made."""
        query = select(adapter_versions).where(adapter_versions.c.is_pinned)
        columns = adapter_versions.c
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(columns.created_at, columns.owner, columns.name, columns.version))
            return tuple(adapter_rows.version_of(row) for row in rows.mappings())

    def live_bundles(self) -> set[str]:
        """Return the bundles that some version needs."""
        with self._database.reading() as connection:
            return set(connection.execute(select(adapter_versions.c.bundle).distinct()).scalars())


def _publication(
    owner: str,
    name: str,
    bundle: str,
    labels: Mapping[str, str],
    aliases: Sequence[str],
    request_id: str,
    scope: str,
) -> Request:
    # Not what validation found, which is known only at the end, nor whose key: a caller may have another one by then.
    asked = {"owner": owner, "name": name, "bundle": bundle, "labels": dict(labels), "aliases": [*aliases]}
    return Request.of("adapters.publish", scope, request_id, **asked)


def _earlier_version(connection: Connection, request: Request, now: datetime) -> AdapterVersion | None:
    """Return what a publication was answered before; None if it is new, or what it was answered is gone."""
    answer = request.earlier_answer(connection, now)
    if answer is None:
        return None
    version = adapter_rows.version_answered(answer)
    # Its number was given to it alone: what has it now, whoever owns it, is the same version.
    is_there = find_version(connection, version.owner, version.name, version.version) is not None
    return version if is_there else None


def _require_own_version(connection: Connection, tenant_id: str, owner: str, name: str, version: int) -> RowMapping:
    require_own(connection, tenant_id, owner, name)
    row = find_version(connection, owner, name, version)
    if row is None:
        raise version_not_found(name, version)
    return row


def _require_deletable(connection: Connection, tenant_id: str, owner: str, name: str, version: int) -> RowMapping:
    row = _require_own_version(connection, tenant_id, owner, name, version)
    if pointing := aliases_at(connection, owner, name, version):
        message = f"version {version} of adapter {name!r} is what {', '.join(pointing)} points at"
        raise FailedPreconditionError(message, reason="VERSION_HAS_ALIAS", field="version")
    return row
