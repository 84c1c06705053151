"""Datasets as plain values: what is kept of one, what its name may be, and what its bytes are called in the store.

It knows no SQL and no lines. Any thread may use it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry.bundle_files import PREFIX, BundleFile, bundle_digest

FILE_NAME = "data.jsonl"

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class DatasetFormat(Enum):
    """What the lines of a dataset are."""

    COMPLETION = "completion"
    CHAT = "chat"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """Lines that a tenant may train on; `digest` is that of the file, and its name everywhere."""

    owner: str
    digest: str
    display_name: str
    format: DatasetFormat
    size_bytes: int
    num_samples: int
    created_at: datetime

    @property
    def bundle(self) -> str:
        """Return what the store of bundles calls its bytes."""
        return bundle_digest((file_of(self.digest, self.size_bytes),))


def file_of(digest: str, size_bytes: int) -> BundleFile:
    """Return the one file that a dataset consists of."""
    return BundleFile(FILE_NAME, size_bytes, digest.removeprefix(PREFIX))


def is_dataset_digest(text: str) -> bool:
    """Tell whether a text can name a dataset."""
    return _DIGEST.fullmatch(text) is not None


def check_dataset_digest(digest: str) -> None:
    """Refuse what could not name a dataset.

    Raises: InvalidArgumentError (reason=INVALID_DIGEST).
    """
    if not is_dataset_digest(digest):
        message = "a dataset is called `sha256:` and the 64 small hexadecimal digits of its file's sha256"
        raise InvalidArgumentError(message, reason="INVALID_DIGEST", field="digest")


def dataset_not_found(field: str = "digest") -> NotFoundError:
    """Return the error for a dataset, or an upload of one, that is missing, was deleted, or is another's."""
    message = "you have no such dataset: it was never uploaded to its end, was deleted, or its upload has expired"
    return NotFoundError(message, reason="DATASET_NOT_FOUND", field=field)
