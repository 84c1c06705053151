"""Datasets: which tenant has which, by the digests of their files.

A dataset never changes, and nobody but its owner can name it, whoever else has sent the same bytes. It stays while a
job that has not ended needs it. It knows no lines and no folders. Methods block: they run on the database's threads.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, delete, or_, select

from motley_server.errors import FailedPreconditionError
from motley_server.registry import pages
from motley_server.registry.database import Database
from motley_server.registry.dataset_records import (
    DatasetFormat,
    DatasetRecord,
    check_dataset_digest,
    dataset_not_found,
    is_dataset_digest,
)
from motley_server.registry.dataset_uploads import forget_dataset_upload
from motley_server.registry.holdings import check_room_for_dataset
from motley_server.registry.idempotency import Request
from motley_server.registry.job_records import OPEN_STATES
from motley_server.registry.names import is_name
from motley_server.registry.records import Page
from motley_server.registry.schema import datasets, from_microseconds, jobs, to_microseconds
from motley_server.registry.tenants import check_display_name, has_tenant, tenant_not_found


class Datasets:
    """Keep datasets. `delete` takes a request id, whose repeat has the same answer."""

    def __init__(self, database: Database, max_total_bytes: int | None = None) -> None:
        """Keep them in a database, of each tenant so many bytes at most."""
        self._database = database
        self._max_total_bytes = max_total_bytes

    def put(
        self,
        owner: str,
        digest: str,
        display_name: str,
        format: DatasetFormat,
        size_bytes: int,
        num_samples: int,
        *,
        needs_upload: bool = False,
    ) -> DatasetRecord:
        """Add a dataset, whose upload is off the record in the same moment; one that is there stays as it is.

        Semantics: with `needs_upload`, an upload that is not on record any more brings nothing, whoever has its owner's
        name by now.
        Raises: InvalidArgumentError (reason=INVALID_DIGEST or INVALID_DISPLAY_NAME); NotFoundError
        (reason=TENANT_NOT_FOUND or DATASET_NOT_FOUND); ResourceExhaustedError (reason=TOO_MANY_DATASETS or
        TOO_MANY_DATASET_BYTES).
        """
        check_dataset_digest(digest)
        check_display_name(display_name)
        with self._database.writing() as connection:
            is_on_record = forget_dataset_upload(connection, owner, digest)
            known = find_dataset(connection, owner, digest)
            if known is not None:
                return known
            if not has_tenant(connection, owner):
                raise tenant_not_found(owner, "owner")
            if needs_upload and not is_on_record:
                raise dataset_not_found()
            check_room_for_dataset(connection, owner, digest, size_bytes, self._max_total_bytes)
            now = self._database.now()
            record = DatasetRecord(owner, digest, display_name, format, size_bytes, num_samples, now)
            connection.execute(datasets.insert().values(_columns_of(record)))
            return record

    def find(self, owner: str, digest: str) -> DatasetRecord | None:
        """Return a tenant's dataset; None if it has none of that name."""
        with self._database.reading() as connection:
            return find_dataset(connection, owner, digest)

    def get(self, owner: str, digest: str) -> DatasetRecord:
        """Return a tenant's dataset.

        Raises: NotFoundError (reason=DATASET_NOT_FOUND).
        """
        found = self.find(owner, digest)
        if found is None:
            raise dataset_not_found()
        return found

    def list(self, owner: str, page_size: int = 0, page_token: str = "") -> Page[DatasetRecord]:
        """Return a tenant's next datasets, the newest first.

        Raises: InvalidArgumentError (reason=BAD_PAGE_TOKEN or OUT_OF_RANGE).
        """
        size = pages.page_size(page_size)
        listing = f"datasets of {owner}"
        position = pages.decode_position(self._database.page_secret, listing, page_token)
        columns = datasets.c
        query = select(datasets).where(columns.owner == owner)
        query = query.order_by(columns.created_at.desc(), columns.digest.desc()).limit(size + 1)
        if position is not None:
            created_at, digest = from_microseconds(int(position[0])), position[1]
            same_moment = and_(columns.created_at == created_at, columns.digest < digest)
            query = query.where(or_(columns.created_at < created_at, same_moment))
        with self._database.reading() as connection:
            found = tuple(_record_of(row) for row in connection.execute(query).mappings())
        if len(found) <= size:
            return Page(found, "")
        last = found[size - 1]
        after: pages.Position = [to_microseconds(last.created_at), last.digest]
        return Page(found[:size], pages.encode_position(self._database.page_secret, listing, after))

    def delete(self, owner: str, digest: str, *, request_id: str = "", scope: str = "") -> bool:
        """Forget a dataset, and an upload of it that is not finished; a repeat changes nothing, and returns False.

        Raises: NotFoundError (reason=DATASET_NOT_FOUND) where there is neither; FailedPreconditionError
        (reason=DATASET_IN_USE) while a job that has not ended names it; InvalidArgumentError
        (reason=INVALID_REQUEST_ID); AlreadyExistsError (reason=REQUEST_ID_REUSED).
        """
        request = Request.of("datasets.delete", scope, request_id, owner=owner, digest=digest)
        with self._database.writing() as connection:
            now = self._database.now()
            if request.earlier_answer(connection, now) is not None:
                return False
            is_on_its_way = forget_dataset_upload(connection, owner, digest)
            if find_dataset(connection, owner, digest) is None:
                if not is_on_its_way:
                    raise dataset_not_found()
            else:
                _require_unused(connection, owner, digest)
                connection.execute(delete(datasets).where(_is_dataset(owner, digest)))
            request.keep_answer(connection, now, {})
            return True

    def live_bundles(self) -> set[str]:
        """Return the bundles that some dataset needs."""
        with self._database.reading() as connection:
            return {_record_of(row).bundle for row in connection.execute(select(datasets)).mappings()}


def find_dataset(connection: Connection, owner: str, digest: str) -> DatasetRecord | None:
    """Return a tenant's dataset; None if it has none of that name."""
    if not (is_name(owner) and is_dataset_digest(digest)):
        return None
    row = connection.execute(select(datasets).where(_is_dataset(owner, digest))).mappings().one_or_none()
    return None if row is None else _record_of(row)


def _require_unused(connection: Connection, owner: str, digest: str) -> None:
    query = select(jobs.c.id, jobs.c.datasets).where(jobs.c.owner == owner, jobs.c.state.in_(OPEN_STATES))
    using = [row.id for row in connection.execute(query.order_by(jobs.c.created_at)) if digest in row.datasets]
    if using:
        others = f" and {len(using) - 1} more" if len(using) > 1 else ""
        message = f"{using[0]}{others} has not ended and needs this dataset: wait for it, or cancel it"
        raise FailedPreconditionError(message, reason="DATASET_IN_USE", field="digest")


def _is_dataset(owner: str, digest: str) -> ColumnElement[bool]:
    return and_(datasets.c.owner == owner, datasets.c.digest == digest)


def _columns_of(record: DatasetRecord) -> dict[str, Any]:
    return {column.name: getattr(record, column.name) for column in datasets.c} | {"format": record.format.value}


def _record_of(row: RowMapping) -> DatasetRecord:
    return DatasetRecord(**{**row, "format": DatasetFormat(row["format"])})
