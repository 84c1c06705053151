"""Uploads of datasets on record: which have begun, how many bytes are to come, and when they were last heard of.

As with adapters' uploads, a row is there from before the first byte until the upload has become a dataset, was given
up, or has expired. A dataset's digest is its upload's id. It knows no files. Methods block: they run on the database's
threads.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, update

from motley_server.errors import AlreadyExistsError, InvalidArgumentError, ResourceExhaustedError
from motley_server.registry.bundle_files import MAX_FILE_BYTES
from motley_server.registry.database import Database
from motley_server.registry.dataset_records import check_dataset_digest, dataset_not_found, is_dataset_digest
from motley_server.registry.holdings import check_room_for_dataset
from motley_server.registry.names import is_name
from motley_server.registry.schema import dataset_uploads
from motley_server.registry.tenants import has_tenant, tenant_not_found
from motley_server.registry.uploads import MAX_OPEN_UPLOADS, UPLOAD_LIFETIME, store_id


@dataclass(frozen=True, slots=True)
class DatasetUpload:
    """An upload that has become no dataset yet; `size_bytes` is what it announced."""

    owner: str
    digest: str
    size_bytes: int
    created_at: datetime
    touched_at: datetime

    @property
    def expires_at(self) -> datetime:
        """Return when it may be forgotten, unless it is heard of before."""
        return self.touched_at + UPLOAD_LIFETIME


class DatasetUploads:
    """Keep account of datasets on their way."""

    def __init__(self, database: Database, max_total_bytes: int | None = None) -> None:
        """Keep it in a database, of each tenant's datasets, and those on their way, for so many bytes at most."""
        self._database = database
        self._max_total_bytes = max_total_bytes

    def begin(self, owner: str, digest: str, size_bytes: int) -> bool:
        """Put an upload on record, or touch one that is; return whether it is new.

        Raises: InvalidArgumentError (reason=INVALID_DIGEST or OUT_OF_RANGE); NotFoundError (reason=TENANT_NOT_FOUND);
        AlreadyExistsError (reason=UPLOAD_EXISTS); ResourceExhaustedError (reason=TOO_MANY_UPLOADS,
        TOO_MANY_DATASETS or TOO_MANY_DATASET_BYTES).
        """
        check_dataset_digest(digest)
        if not 0 <= size_bytes <= MAX_FILE_BYTES:
            message = f"a size is 0 to {MAX_FILE_BYTES} bytes"
            raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="size_bytes")
        with self._database.writing() as connection:
            now = self._database.now()
            if not has_tenant(connection, owner):
                raise tenant_not_found(owner, "owner")
            known = _find(connection, owner, digest)
            if known is not None and known.size_bytes != size_bytes:
                message = f"the upload of this dataset was begun with {known.size_bytes} bytes; delete it to begin anew"
                raise AlreadyExistsError(message, reason="UPLOAD_EXISTS", field="digest")
            check_room_for_dataset(connection, owner, digest, size_bytes, self._max_total_bytes)
            if known is not None:
                _touch(connection, owner, digest, now)
                return False
            of_owner = select(func.count()).where(dataset_uploads.c.owner == owner)
            count = connection.execute(of_owner).scalar_one()
            if count >= MAX_OPEN_UPLOADS:
                message = f"{owner!r} has {count} uploads of datasets open already: finish or delete one"
                raise ResourceExhaustedError(message, reason="TOO_MANY_UPLOADS", field="digest")
            row = {"owner": owner, "digest": digest, "size_bytes": size_bytes, "created_at": now, "touched_at": now}
            connection.execute(dataset_uploads.insert().values(row))
            return True

    def get(self, owner: str, digest: str) -> DatasetUpload:
        """Return an upload.

        Raises: NotFoundError (reason=DATASET_NOT_FOUND).
        """
        with self._database.reading() as connection:
            found = _find(connection, owner, digest)
        if found is None:
            raise dataset_not_found()
        return found

    def touch(self, owner: str, digest: str) -> None:
        """Note that somebody works on an upload, so that it does not expire.

        Raises: NotFoundError (reason=DATASET_NOT_FOUND), also once its owner is gone.
        """
        with self._database.writing() as connection:
            if _find(connection, owner, digest) is None:
                raise dataset_not_found()
            _touch(connection, owner, digest, self._database.now())

    def forget(self, owner: str, digest: str) -> bool:
        """Strike an upload off the record, and tell whether it was on it."""
        with self._database.writing() as connection:
            return forget_dataset_upload(connection, owner, digest)

    def forget_untouched(self, before: datetime, but: Set[str]) -> int:
        """Strike off uploads that were last heard of before a moment, but for some store ids, and return how many."""
        columns = dataset_uploads.c
        with self._database.writing() as connection:
            query = select(columns.owner, columns.digest).where(columns.touched_at < before)
            stale = [(row.owner, row.digest) for row in connection.execute(query)]
            chosen = [upload for upload in stale if store_id(*upload) not in but]
            return sum(forget_dataset_upload(connection, *upload) for upload in chosen)

    def store_ids(self) -> set[str]:
        """Return what the store calls the uploads on record."""
        with self._database.reading() as connection:
            rows = connection.execute(select(dataset_uploads.c.owner, dataset_uploads.c.digest)).all()
        return {store_id(row.owner, row.digest) for row in rows}


def forget_dataset_upload(connection: Connection, owner: str, digest: str) -> bool:
    """Strike an upload off the record, and tell whether it was on it."""
    if not _may_be(owner, digest):
        return False
    return connection.execute(delete(dataset_uploads).where(_is_upload(owner, digest))).rowcount > 0


def _find(connection: Connection, owner: str, digest: str) -> DatasetUpload | None:
    if not _may_be(owner, digest):
        return None
    row = connection.execute(select(dataset_uploads).where(_is_upload(owner, digest))).mappings().one_or_none()
    return None if row is None else DatasetUpload(**row)


def _may_be(owner: str, digest: str) -> bool:
    return is_name(owner) and is_dataset_digest(digest)


def _is_upload(owner: str, digest: str) -> ColumnElement[bool]:
    return and_(dataset_uploads.c.owner == owner, dataset_uploads.c.digest == digest)


def _touch(connection: Connection, owner: str, digest: str, now: datetime) -> None:
    connection.execute(update(dataset_uploads).where(_is_upload(owner, digest)).values(touched_at=now))
