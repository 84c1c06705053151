"""The files of a version: where they lie, and their bytes for whoever may have them.

It knows no tensors and no names. Whoever calls holds the version. Everything here blocks.
"""

from __future__ import annotations

from pathlib import Path

from motley_server.errors import FailedPreconditionError, NotFoundError
from motley_server.registry.bundles import BundleStore
from motley_server.registry.records import AdapterVersion


def find_files(store: BundleStore, version: AdapterVersion) -> Path:
    """Return the folder that has a version's files.

    Raises: FailedPreconditionError (reason=ADAPTER_FILES_MISSING): another server of the same database took them.
    """
    try:
        return store.directory(version.bundle)
    except NotFoundError as error:
        message = f"this server does not have the files of version {version.version} of adapter {version.name!r}"
        raise FailedPreconditionError(message, reason="ADAPTER_FILES_MISSING", field="name") from error


def read_part(path: Path, offset: int, num_bytes: int) -> bytes:
    """Return bytes of a file from an offset on, fewer at its end."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(num_bytes)
