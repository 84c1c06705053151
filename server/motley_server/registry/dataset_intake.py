"""What becomes of a dataset's upload, and where a dataset's bytes are, in steps between which the process may stop.

As with adapters, account and bytes are changed in an order in which bytes without an account can be there, for the next
collection, and never a dataset without its bytes. It knows no lines. Methods block: they run on the database's threads.
Of one upload, one stream at a time may call them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from motley_server.errors import FailedPreconditionError, NotFoundError
from motley_server.registry.bundles import BundleStore
from motley_server.registry.dataset_records import (
    FILE_NAME,
    DatasetFormat,
    DatasetRecord,
    dataset_not_found,
    file_of,
)
from motley_server.registry.dataset_uploads import DatasetUploads
from motley_server.registry.datasets import Datasets
from motley_server.registry.tenants import check_display_name
from motley_server.registry.uploads import store_id


class DatasetIntake:
    """Take datasets from their beginning to a record, or to nothing. Each step may be repeated after a crash.

    Raises: all methods: NotFoundError (reason=DATASET_NOT_FOUND) for what is not on record, or is another tenant's.
    """

    def __init__(self, store: BundleStore, datasets: Datasets, uploads: DatasetUploads) -> None:
        self._store = store
        self._datasets = datasets
        self._uploads = uploads

    def begin(self, owner: str, digest: str, size_bytes: int, display_name: str = "") -> DatasetRecord | None:
        """Return a dataset that is there already; else begin its upload, or go on with it, and return None.

        Semantics: None, too, if this server has not the bytes of one that is on record: they are to come again.
        Raises: InvalidArgumentError (reason=INVALID_DISPLAY_NAME); what `DatasetUploads.begin` and `BundleStore.begin`
        do.
        """
        check_display_name(display_name)
        known = self._datasets.find(owner, digest)
        if known is not None and self._has(known):
            return known
        id = store_id(owner, digest)
        if self._uploads.begin(owner, digest, size_bytes):
            self._store.abort(id)  # what an earlier one, off the record by now, may have left
        self._store.begin(id, (file_of(digest, size_bytes),))
        return None

    def committed(self, owner: str, digest: str) -> int:
        """Return how many bytes of an upload are kept whatever happens: where to go on."""
        self._uploads.get(owner, digest)
        try:
            return self._store.committed(store_id(owner, digest))[FILE_NAME]
        except NotFoundError:
            return 0  # stopped between its account and its first byte

    def append(self, owner: str, digest: str, offset: int, data: bytes | memoryview) -> int:
        """Write bytes of an upload as `BundleStore.append` does, and return how many it has now."""
        with _named_as_datasets():
            return self._store.append(store_id(owner, digest), FILE_NAME, offset, data)

    def sync(self, owner: str, digest: str) -> None:
        """Bring to disk what was written, so that it counts as committed."""
        with _named_as_datasets():
            self._store.sync(store_id(owner, digest))

    def staged_file(self, owner: str, digest: str) -> Path:
        """Return an upload's file once all of it is there and right.

        Raises: FailedPreconditionError (reason=UPLOAD_INCOMPLETE); DataLossError (reason=CHECKSUM_MISMATCH).
        """
        id = store_id(owner, digest)
        with _named_as_datasets():
            self._store.verify(id)
            return self._store.directory_of_upload(id) / FILE_NAME

    def finish(
        self, owner: str, digest: str, display_name: str, format: DatasetFormat, num_samples: int
    ) -> DatasetRecord:
        """Make a dataset of an upload that is complete; what its lines are, its caller has found.

        Raises: what `BundleStore.commit` and `Datasets.put` do; after those of the latter, the upload is as it was.
        """
        size_bytes = self._uploads.get(owner, digest).size_bytes
        id = store_id(owner, digest)
        with _named_as_datasets():
            self._store.commit(id)
        record = self._datasets.put(owner, digest, display_name, format, size_bytes, num_samples, needs_upload=True)
        self._store.abort(id)
        return record

    def abort(self, owner: str, digest: str) -> bool:
        """Give an upload up, and tell whether it was on record."""
        # The account goes last: who was cut off and comes again finds it, and what it stands for goes then.
        self._store.abort(store_id(owner, digest))
        return self._uploads.forget(owner, digest)

    def delete(self, owner: str, digest: str, *, request_id: str = "", scope: str = "") -> None:
        """Forget a dataset, and an upload of it with its bytes; those of the dataset go in a collection.

        Raises: what `Datasets.delete` does.
        """
        if self._datasets.delete(owner, digest, request_id=request_id, scope=scope):
            self._store.abort(store_id(owner, digest))

    def file(self, owner: str, digest: str) -> Path:
        """Return the file of a dataset.

        Raises: FailedPreconditionError (reason=DATASET_FILES_MISSING).
        """
        record = self._datasets.get(owner, digest)
        if not self._has(record):
            message = "this dataset was uploaded to another server of the same database: ask that one, or send it again"
            raise FailedPreconditionError(message, reason="DATASET_FILES_MISSING", field="digest")
        return self._store.directory(record.bundle) / FILE_NAME

    def _has(self, record: DatasetRecord) -> bool:
        try:
            self._store.directory(record.bundle)
        except NotFoundError:
            return False
        return True


@contextmanager
def _named_as_datasets() -> Iterator[None]:
    try:
        yield
    except NotFoundError:
        raise dataset_not_found() from None
