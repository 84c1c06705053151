"""Tenants: who there is, and what each may use.

An id is a tenant's for as long as it is there: nothing that was kept under it outlives it, but that the numbers of its
versions are never given again. Tenant `local` is always
there, for whoever needs no key; `public` owns adapters and is nobody. It knows no requests and no wire. Methods block:
they run on the database's threads.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import Connection, delete, select, update
from sqlalchemy.engine import Row

from motley_server.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from motley_server.registry import pages
from motley_server.registry.database import Database
from motley_server.registry.holdings import count_open_jobs, forget_uploads, has_adapters
from motley_server.registry.idempotency import Answer, Request, forget_scope
from motley_server.registry.lease_ends import end_leases_of_keys
from motley_server.registry.names import LOCAL_TENANT, NAME_RULE, PUBLIC_OWNER, is_name
from motley_server.registry.records import Page, Quota, Tenant
from motley_server.registry.schema import from_microseconds, keys, tenants, to_microseconds

LISTING = "tenants"
MAX_DISPLAY_NAME_CHARACTERS = 200
MAX_LIMIT = 2**63 - 1
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
NO_LIMITS = Quota()
QUOTA_FIELDS = frozenset(field.name for field in fields(Quota))

# Without the first, many Persian and Indian names could not be written; without the second, nor many emoji.
_JOINERS = str.maketrans("", "", "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}")


class Tenants:
    """Keep tenants. Every method but `get` and `list` takes a request id, whose repeat has the same answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, id: str, display_name: str = "", quota: Quota = NO_LIMITS, *, request_id: str = "", scope: str = ""
    ) -> Tenant:
        """Add a tenant.

        Raises: InvalidArgumentError (reason=INVALID_TENANT_ID, RESERVED_TENANT_ID, INVALID_DISPLAY_NAME, OUT_OF_RANGE
        or INVALID_REQUEST_ID); AlreadyExistsError (reason=TENANT_EXISTS or REQUEST_ID_REUSED).
        """
        _check_id(id)
        check_display_name(display_name)
        _check_quota(quota)
        request = Request.of("tenants.create", scope, request_id, id=id, display_name=display_name, quota=asdict(quota))
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return _from_answer(answer)
            if _find(connection, id) is not None:
                raise AlreadyExistsError(f"there is a tenant {id!r} already", reason="TENANT_EXISTS", field="id")
            tenant = Tenant(id, display_name, quota, now, _new_etag())
            connection.execute(
                tenants.insert().values(
                    id=id, display_name=display_name, created_at=now, etag=tenant.etag, **_columns_of(quota)
                )
            )
            request.keep_answer(connection, now, _to_answer(tenant))
            return tenant

    def get(self, id: str) -> Tenant:
        """Return a tenant.

        Raises: NotFoundError (reason=TENANT_NOT_FOUND).
        """
        with self._database.reading() as connection:
            return _require(connection, id)

    def list(self, page_size: int = 0, page_token: str = "") -> Page[Tenant]:
        """Return the next tenants by id.

        Semantics: whoever is there from the first page to the last is listed once, whoever else comes or goes.
        Raises: InvalidArgumentError (reason=BAD_PAGE_TOKEN or OUT_OF_RANGE).
        """
        size = pages.page_size(page_size)
        position = pages.decode_position(self._database.page_secret, LISTING, page_token)
        query = select(tenants).order_by(tenants.c.id).limit(size + 1)
        if position is not None:
            query = query.where(tenants.c.id > position[0])
        with self._database.reading() as connection:
            found = [_from_row(row) for row in connection.execute(query)]
        has_more = len(found) > size
        token = pages.encode_position(self._database.page_secret, LISTING, [found[size - 1].id]) if has_more else ""
        return Page(tuple(found[:size]), token)

    def update(
        self,
        id: str,
        *,
        display_name: str | None = None,
        quota: Quota | None = None,
        quota_fields: Collection[str] | None = None,
        etag: str | None = None,
        request_id: str = "",
        scope: str = "",
    ) -> Tenant:
        """Change what is not None; with `quota_fields`, these of the quota alone.

        Raises: NotFoundError (reason=TENANT_NOT_FOUND); AbortedError (reason=ETAG_MISMATCH); AlreadyExistsError
        (reason=REQUEST_ID_REUSED); InvalidArgumentError (reason=INVALID_DISPLAY_NAME, OUT_OF_RANGE or
        INVALID_REQUEST_ID).
        """
        changes: dict[str, Any] = {}
        if display_name is not None:
            check_display_name(display_name)
            changes["display_name"] = display_name
        if quota is not None:
            _check_quota(quota)
            chosen = QUOTA_FIELDS if quota_fields is None else QUOTA_FIELDS.intersection(quota_fields)
            changes |= {_column(name): value for name, value in asdict(quota).items() if name in chosen}
        request = Request.of("tenants.update", scope, request_id, id=id, changes=changes, etag=etag)
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return _from_answer(answer)
            if etag not in (None, _require(connection, id).etag):
                message = f"tenant {id!r} was changed since that etag was read: read it again"
                raise AbortedError(message, reason="ETAG_MISMATCH", field="etag")
            connection.execute(update(tenants).where(tenants.c.id == id).values(etag=_new_etag(), **changes))
            tenant = _require(connection, id)
            request.keep_answer(connection, now, _to_answer(tenant))
            return tenant

    def delete(self, id: str, *, request_id: str = "", scope: str = "") -> None:
        """Remove a tenant and its keys, which count no more from now on; not one who still has adapters.

        Semantics: its datasets and its ended jobs go with it, by the tables' own rules; leases that were made with its
        keys end.
        Raises: NotFoundError (reason=TENANT_NOT_FOUND); FailedPreconditionError (reason=TENANT_NEEDED for `local`,
        TENANT_OWNS_ADAPTERS, or TENANT_HAS_JOBS while some have not ended); InvalidArgumentError
        (reason=INVALID_REQUEST_ID); AlreadyExistsError (reason=REQUEST_ID_REUSED).
        """
        request = Request.of("tenants.delete", scope, request_id, id=id)
        with self._database.writing() as connection:
            now = self._database.now()
            if request.earlier_answer(connection, now) is not None:
                return
            _require(connection, id)
            if id == LOCAL_TENANT:
                message = f"tenant {id!r} is who calls without a key, and stays"
                raise FailedPreconditionError(message, reason="TENANT_NEEDED", field="id")
            if has_adapters(connection, id):
                message = f"tenant {id!r} has adapters, which others may use: delete their versions first"
                raise FailedPreconditionError(message, reason="TENANT_OWNS_ADAPTERS", field="id")
            if count_open_jobs(connection, id):
                message = f"tenant {id!r} has training jobs that have not ended: cancel them first"
                raise FailedPreconditionError(message, reason="TENANT_HAS_JOBS", field="id")
            end_leases_of_keys(connection, now, keys.c.tenant_id == id)
            forget_uploads(connection, id)
            forget_scope(connection, id)
            connection.execute(delete(tenants).where(tenants.c.id == id))
            request.keep_answer(connection, now, {})


def tenant_not_found(id: str, field: str) -> NotFoundError:
    """Return the error for a tenant that is not there."""
    return NotFoundError(f"there is no tenant {id[:140]!r}", reason="TENANT_NOT_FOUND", field=field)


def has_tenant(connection: Connection, id: str) -> bool:
    """Tell whether there is such a tenant."""
    return _find(connection, id) is not None


def require_owner(connection: Connection, owner: str) -> None:
    """Refuse who can own no adapters: a tenant may have gone while its files were on their way.

    Raises: NotFoundError (reason=TENANT_NOT_FOUND).
    """
    if owner != PUBLIC_OWNER and not has_tenant(connection, owner):
        raise tenant_not_found(owner, "owner")


def check_display_name(display_name: str) -> None:
    """Refuse what cannot be shown on a line.

    Raises: InvalidArgumentError (reason=INVALID_DISPLAY_NAME).
    """
    if len(display_name) > MAX_DISPLAY_NAME_CHARACTERS or not display_name.translate(_JOINERS).isprintable():
        message = f"a display name is at most {MAX_DISPLAY_NAME_CHARACTERS} printable characters on one line"
        raise InvalidArgumentError(message, reason="INVALID_DISPLAY_NAME", field="display_name")


def _find(connection: Connection, id: str) -> Tenant | None:
    if not is_name(id):  # nor need the database see it: PostgreSQL refuses some characters
        return None
    row = connection.execute(select(tenants).where(tenants.c.id == id)).one_or_none()
    return None if row is None else _from_row(row)


def _require(connection: Connection, id: str) -> Tenant:
    tenant = _find(connection, id)
    if tenant is None:
        raise tenant_not_found(id, "id")
    return tenant


def _new_etag() -> str:
    return secrets.token_hex(8)


def _column(quota_field: str) -> str:
    return f"quota_{quota_field}"


def _columns_of(quota: Quota) -> dict[str, Any]:
    return {_column(name): value for name, value in asdict(quota).items()}


def _from_row(row: Row[Any]) -> Tenant:
    columns = row._mapping
    quota = Quota(**{name: columns[_column(name)] for name in QUOTA_FIELDS})
    return Tenant(row.id, row.display_name, quota, row.created_at, row.etag)


def _to_answer(tenant: Tenant) -> Answer:
    return asdict(tenant) | {"created_at": to_microseconds(tenant.created_at)}


def _from_answer(answer: Answer) -> Tenant:
    values: dict[str, Any] = dict(answer)
    created_at = from_microseconds(values.pop("created_at"))
    return Tenant(quota=Quota(**values.pop("quota")), created_at=created_at, **values)


def _check_id(id: str) -> None:
    if not is_name(id):
        message = f"{id[:140]!r} is no tenant's id: {NAME_RULE}"
        raise InvalidArgumentError(message, reason="INVALID_TENANT_ID", field="id")
    if id == PUBLIC_OWNER:
        message = f"{id!r} owns what everybody may use, and can be no tenant"
        raise InvalidArgumentError(message, reason="RESERVED_TENANT_ID", field="id")


def _check_quota(quota: Quota) -> None:
    for name, value in asdict(quota).items():
        if name == "weight":
            is_good = math.isfinite(value) and MIN_WEIGHT <= value <= MAX_WEIGHT
            bounds = f"{MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
        else:
            is_good = value is None or 0 <= value <= MAX_LIMIT
            bounds = f"0 to {MAX_LIMIT}, or unset for no limit"
        if not is_good:
            message = f"{value} is out of range: {bounds}"
            raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field=f"quota.{name}")
