"""Keys: what a caller shows to be taken for a tenant, in one role.

`mk_<id>_<secret>`: the id finds the key, the secret proves it, and of the secret only a hash is kept (it is random and
long, so that a plain hash cannot be guessed backwards). A key is shown once, when it is made. It knows no requests and
no wire. Methods block: they run on the database's threads.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, and_, exists, or_, select, update

from motley_server.asked import Role
from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry import pages
from motley_server.registry.database import Database
from motley_server.registry.idempotency import Answer, Request
from motley_server.registry.lease_ends import end_leases_of_keys
from motley_server.registry.records import Key, Page
from motley_server.registry.schema import from_microseconds, keys, to_microseconds
from motley_server.registry.tenants import has_tenant, tenant_not_found

ID_BYTES = 8
SECRET_BYTES = 32
# The id has no underscore, so that the secret may have some.
_TEXT = re.compile(r"mk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[0-9a-f]{16}")
_NO_SECRET_SHA256 = bytes(32)
_TIMES = ("created_at", "expires_at", "revoked_at")


class Keys:
    """Keep keys. `create` and `revoke` take a request id, whose repeat has the same answer, but for the secret."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        tenant_id: str,
        role: Role,
        expires_at: datetime | None = None,
        *,
        request_id: str = "",
        scope: str = "",
    ) -> tuple[Key, str]:
        """Make a key, and return its text with it; a repeat returns the key and an empty text.

        Raises: NotFoundError (reason=TENANT_NOT_FOUND); InvalidArgumentError (reason=INVALID_EXPIRY or
        INVALID_REQUEST_ID); AlreadyExistsError (reason=REQUEST_ID_REUSED).
        """
        expiry = None if expires_at is None else _to_utc(expires_at)
        request = Request.of(
            "keys.create",
            scope,
            request_id,
            tenant_id=tenant_id,
            role=role.value,
            expires_at=expiry and to_microseconds(expiry),
        )
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return _from_answer(answer), ""
            if expiry is not None and expiry <= now:
                raise InvalidArgumentError("that is in the past", reason="INVALID_EXPIRY", field="expire_time")
            if not has_tenant(connection, tenant_id):
                raise tenant_not_found(tenant_id, "tenant_id")
            key = Key(secrets.token_hex(ID_BYTES), tenant_id, role, now, expiry)
            secret = secrets.token_urlsafe(SECRET_BYTES)
            connection.execute(
                keys.insert().values(
                    id=key.id,
                    tenant_id=tenant_id,
                    role=role.value,
                    secret_sha256=_hash(secret),
                    created_at=now,
                    expires_at=expiry,
                )
            )
            request.keep_answer(connection, now, _to_answer(key))
        return key, f"mk_{key.id}_{secret}"

    def list(self, tenant_id: str, page_size: int = 0, page_token: str = "") -> Page[Key]:
        """Return a tenant's next keys, the oldest first, with those that count no more.

        Raises: NotFoundError (reason=TENANT_NOT_FOUND); InvalidArgumentError (reason=BAD_PAGE_TOKEN or OUT_OF_RANGE).
        """
        size = pages.page_size(page_size)
        listing = f"keys of {tenant_id}"
        with self._database.reading() as connection:
            if not has_tenant(connection, tenant_id):
                raise tenant_not_found(tenant_id, "tenant_id")
            position = pages.decode_position(self._database.page_secret, listing, page_token)
            query = select(keys).where(keys.c.tenant_id == tenant_id)
            query = query.order_by(keys.c.created_at, keys.c.id).limit(size + 1)
            if position is not None:
                created_at, id = from_microseconds(int(position[0])), position[1]
                later = and_(keys.c.created_at == created_at, keys.c.id > id)
                query = query.where(or_(keys.c.created_at > created_at, later))
            found = [_from_row(row._mapping) for row in connection.execute(query)]
        if len(found) <= size:
            return Page(tuple(found), "")
        last = found[size - 1]
        after: pages.Position = [to_microseconds(last.created_at), last.id]
        return Page(tuple(found[:size]), pages.encode_position(self._database.page_secret, listing, after))

    def revoke(self, key_id: str, *, request_id: str = "", scope: str = "") -> Key:
        """Let a key count no more from now on; one that was revoked before stays as it is.

        Effects: the leases that were made with it end in the same moment, and their jobs are queued again.
        Raises: NotFoundError (reason=KEY_NOT_FOUND); InvalidArgumentError (reason=INVALID_REQUEST_ID);
        AlreadyExistsError (reason=REQUEST_ID_REUSED).
        """
        request = Request.of("keys.revoke", scope, request_id, key_id=key_id)
        with self._database.writing() as connection:
            now = self._database.now()
            if (answer := request.earlier_answer(connection, now)) is not None:
                return _from_answer(answer)
            if _ID.fullmatch(key_id):
                is_in_force = and_(keys.c.id == key_id, keys.c.revoked_at.is_(None))
                connection.execute(update(keys).where(is_in_force).values(revoked_at=now))
                end_leases_of_keys(connection, now, keys.c.id == key_id)
                row = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
            else:
                row = None
            if row is None:
                raise NotFoundError(f"there is no key {key_id[:40]!r}", reason="KEY_NOT_FOUND", field="key_id")
            key = _from_row(row._mapping)
            request.keep_answer(connection, now, _to_answer(key))
            return key

    def authenticate(self, text: str) -> Key | None:
        """Return the key that a text proves; None for every text that proves none, whatever is wrong with it.

        Semantics: takes the same time for a wrong secret as for an unknown id. Nothing is remembered between calls, so
        that a revocation counts at once.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        id, secret = match.groups()
        with self._database.reading() as connection:
            row = connection.execute(select(keys).where(keys.c.id == id)).one_or_none()
        kept = _NO_SECRET_SHA256 if row is None else row.secret_sha256
        is_proven = hmac.compare_digest(kept, _hash(secret))
        if row is None or not is_proven:
            return None
        key = _from_row(row._mapping)
        is_expired = key.expires_at is not None and key.expires_at <= self._database.now()
        return None if is_expired or key.revoked_at is not None else key

    def has_admin(self) -> bool:
        """Tell whether an admin's key counts now."""
        in_force: ColumnElement[bool] = and_(
            keys.c.role == Role.ADMIN.value,
            keys.c.revoked_at.is_(None),
            or_(keys.c.expires_at.is_(None), keys.c.expires_at > self._database.now()),
        )
        with self._database.reading() as connection:
            return bool(connection.execute(select(exists().where(in_force))).scalar())


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _to_utc(moment: datetime) -> datetime:
    try:
        if moment.tzinfo is None:
            raise ValueError("it has no zone")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        message = f"{moment} is no moment that can be kept: {error}"
        raise InvalidArgumentError(message, reason="INVALID_EXPIRY", field="expire_time") from error


def _from_row(columns: RowMapping | Mapping[str, Any]) -> Key:
    return Key(
        id=columns["id"],
        tenant_id=columns["tenant_id"],
        role=Role(columns["role"]),
        created_at=columns["created_at"],
        expires_at=columns["expires_at"],
        revoked_at=columns["revoked_at"],
    )


def _to_answer(key: Key) -> Answer:
    times = {name: getattr(key, name) for name in _TIMES}
    return {"id": key.id, "tenant_id": key.tenant_id, "role": key.role.value} | {
        name: None if moment is None else to_microseconds(moment) for name, moment in times.items()
    }


def _from_answer(answer: Answer) -> Key:
    values: dict[str, Any] = dict(answer)
    for name in _TIMES:
        values[name] = None if values[name] is None else from_microseconds(values[name])
    return _from_row(values)
