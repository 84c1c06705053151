"""Uploads on record: which tenants have begun, what they announced, and when they were last heard of.

A row is there from before the first byte until the upload has become a version, was given up, or has expired; bytes
in the store of bundles that no row speaks for are nobody's. Tenants choose ids that mean something to themselves
alone: `store_id` makes of them what the store knows. It knows no files. Methods block: they run on the database's
threads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, update

from motley_server.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from motley_server.registry.aliases import check_room_for_aliases
from motley_server.registry.database import Database
from motley_server.registry.holdings import check_room
from motley_server.registry.names import is_name
from motley_server.registry.ownership import check_adapter_name
from motley_server.registry.records import Quota
from motley_server.registry.schema import uploads
from motley_server.registry.tenants import require_owner

MAX_OPEN_UPLOADS = 16
UPLOAD_LIFETIME = timedelta(days=1)

_UPLOAD_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_STORE_ID_DIGITS = 40


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """An upload that has become no version yet.

    Semantics: `size_bytes` is what it announced, of all files together; `header_sha256` says which header that was.
    """

    owner: str
    upload_id: str
    size_bytes: int
    header_sha256: bytes
    created_at: datetime
    touched_at: datetime

    @property
    def expires_at(self) -> datetime:
        """Return when it may be forgotten, unless it is heard of before."""
        return self.touched_at + UPLOAD_LIFETIME


class Uploads:
    """Keep account of uploads. `owner` is a tenant or `public`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(
        self,
        owner: str,
        upload_id: str,
        name: str,
        size_bytes: int,
        quota: Quota,
        header: str = "",
        aliases: Sequence[str] = (),
    ) -> bool:
        """Put an upload for an adapter on record, or touch one that is; return whether it is new.

        Semantics: what could not be published as things stand is refused, before anybody has sent it; of the quota,
        the owner's other uploads have what they announced. `header` is all that the caller says of the upload, always
        written alike: an upload that goes on has the one that it began with.
        Raises: InvalidArgumentError (reason=INVALID_UPLOAD_ID or INVALID_ADAPTER_NAME); NotFoundError
        (reason=TENANT_NOT_FOUND); AlreadyExistsError (reason=UPLOAD_EXISTS); ResourceExhaustedError
        (reason=TOO_MANY_UPLOADS, TOO_MANY_ALIASES, QUOTA_ADAPTERS or QUOTA_ADAPTER_BYTES).
        """
        check_upload_id(upload_id)
        check_adapter_name(name)
        said = {"size_bytes": size_bytes, "header_sha256": hashlib.sha256(header.encode()).digest()}
        with self._database.writing() as connection:
            now = self._database.now()
            require_owner(connection, owner)
            known = _find(connection, owner, upload_id)
            if known is not None and {key: getattr(known, key) for key in said} != said:
                message = f"upload {upload_id} was begun with another header"
                raise AlreadyExistsError(message, reason="UPLOAD_EXISTS", field="upload_id")
            count, announced_bytes = _others(connection, owner, upload_id)
            check_room(connection, owner, name, size_bytes, quota, announced_bytes)
            check_room_for_aliases(connection, owner, name, aliases, "aliases")
            if known is not None:
                _touch(connection, owner, upload_id, now)
                return False
            if count >= MAX_OPEN_UPLOADS:
                message = f"{owner!r} has {count} uploads open already: finish or abort one"
                raise ResourceExhaustedError(message, reason="TOO_MANY_UPLOADS", field="upload_id")
            row = {"owner": owner, "upload_id": upload_id, "created_at": now, "touched_at": now}
            connection.execute(uploads.insert().values(row | said))
            return True

    def get(self, owner: str, upload_id: str) -> UploadRecord:
        """Return an upload.

        Raises: NotFoundError (reason=UPLOAD_NOT_FOUND).
        """
        with self._database.reading() as connection:
            found = _find(connection, owner, upload_id)
        if found is None:
            raise upload_not_found()
        return found

    def touch(self, owner: str, upload_id: str) -> None:
        """Note that somebody works on an upload, so that it does not expire.

        Raises: NotFoundError (reason=UPLOAD_NOT_FOUND), also once its owner is gone.
        """
        with self._database.writing() as connection:
            if _find(connection, owner, upload_id) is None:
                raise upload_not_found()
            _touch(connection, owner, upload_id, self._database.now())

    def forget(self, owner: str, upload_id: str) -> bool:
        """Strike an upload off the record, and tell whether it was on it."""
        with self._database.writing() as connection:
            return forget_upload(connection, owner, upload_id)

    def forget_untouched(self, before: datetime, but: Set[str]) -> int:
        """Strike off uploads that were last heard of before a moment, but for some store ids, and return how many."""
        with self._database.writing() as connection:
            query = select(uploads.c.owner, uploads.c.upload_id).where(uploads.c.touched_at < before)
            stale = [(row.owner, row.upload_id) for row in connection.execute(query)]
            chosen = [upload for upload in stale if store_id(*upload) not in but]
            return sum(forget_upload(connection, *upload) for upload in chosen)

    def store_ids(self) -> set[str]:
        """Return what the store calls the uploads on record."""
        with self._database.reading() as connection:
            rows = connection.execute(select(uploads.c.owner, uploads.c.upload_id)).all()
        return {store_id(row.owner, row.upload_id) for row in rows}


def check_upload_id(upload_id: str) -> None:
    """Refuse what no upload can be called.

    Raises: InvalidArgumentError (reason=INVALID_UPLOAD_ID).
    """
    if not _UPLOAD_ID.fullmatch(upload_id):
        message = "an upload's id is 1 to 64 letters, digits, `_` and `-`"
        raise InvalidArgumentError(message, reason="INVALID_UPLOAD_ID", field="upload_id")


def store_id(owner: str, upload_id: str) -> str:
    """Return what the store calls an upload: 40 hexadecimal digits, which no two tenants have in common."""
    return hashlib.sha256(f"{owner}/{upload_id}".encode()).hexdigest()[:_STORE_ID_DIGITS]


def forget_upload(connection: Connection, owner: str, upload_id: str) -> bool:
    """Strike an upload off the record, and tell whether it was on it."""
    if not _may_be(owner, upload_id):
        return False
    return connection.execute(delete(uploads).where(_is_upload(owner, upload_id))).rowcount > 0


def upload_not_found() -> NotFoundError:
    """Return the error for an upload that is missing, became a version, was given up, has expired, or is another's."""
    message = "you have no such upload: it was never begun, became a version, was aborted, or has expired"
    return NotFoundError(message, reason="UPLOAD_NOT_FOUND", field="upload_id")


def _find(connection: Connection, owner: str, upload_id: str) -> UploadRecord | None:
    if not _may_be(owner, upload_id):
        return None
    row = connection.execute(select(uploads).where(_is_upload(owner, upload_id))).mappings().one_or_none()
    return None if row is None else UploadRecord(**row)


def _may_be(owner: str, upload_id: str) -> bool:
    return is_name(owner) and _UPLOAD_ID.fullmatch(upload_id) is not None


def _is_upload(owner: str, upload_id: str) -> ColumnElement[bool]:
    return and_(uploads.c.owner == owner, uploads.c.upload_id == upload_id)


def _touch(connection: Connection, owner: str, upload_id: str, now: datetime) -> None:
    connection.execute(update(uploads).where(_is_upload(owner, upload_id)).values(touched_at=now))


def _others(connection: Connection, owner: str, upload_id: str) -> tuple[int, int]:
    """Return how many other uploads an owner has open, and the bytes that they announced."""
    totals = select(func.count(), func.coalesce(func.sum(uploads.c.size_bytes), 0))
    row = connection.execute(totals.where(uploads.c.owner == owner, uploads.c.upload_id != upload_id)).one()
    return int(row[0]), int(row[1])
