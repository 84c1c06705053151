"""A dataset on its way to a worker's disk: what has come of it, and its way to its name.

Owns the file beside its place, which outlives the process, so that what came once is not fetched again. Knows nothing
of channels. Everything blocks; whoever must not, runs each step on a thread.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from motley_client.errors import DataLossError

READ_BYTES = 1 << 20


class DatasetArrival:
    """Write a dataset beside its place, and give it its name once its checksum is right.

    Raises: OSError, by everything.
    """

    def __init__(self, digest: str, path: Path) -> None:
        self.digest = digest
        self._path = path
        self._aside = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._hasher = hashlib.sha256()
        self._sink = self._aside.open("a+b")
        self.num_bytes = self._num_found = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sink.close()

    @property
    def is_right(self) -> bool:
        """Tell whether what has come is the dataset."""
        return f"sha256:{self._hasher.hexdigest()}" == self.digest

    @property
    def began_with_some(self) -> bool:
        """Tell whether bytes of an earlier attempt are among those that have come."""
        return self._num_found > 0

    def take_up(self) -> None:
        """Read what lies there of an earlier attempt; comes first."""
        self._sink.seek(0)
        while piece := self._sink.read(READ_BYTES):
            self._hasher.update(piece)
            self.num_bytes += len(piece)
        self._num_found = self.num_bytes

    def take(self, data: bytes) -> None:
        """Append what came next."""
        self._sink.write(data)
        self._hasher.update(data)
        self.num_bytes += len(data)

    def forget(self) -> None:
        """Throw away what has come, and begin again."""
        self._sink.truncate(0)
        self._hasher = hashlib.sha256()
        self.num_bytes = self._num_found = 0

    def settle(self) -> None:
        """Give the dataset its name.

        Raises: DataLossError (reason=CHECKSUM_MISMATCH); OSError.
        """
        if not self.is_right:
            message = f"a dataset arrived as sha256:{self._hasher.hexdigest()}, and {self.digest} was asked for"
            raise DataLossError(message, reason="CHECKSUM_MISMATCH", field="digest")
        self._sink.flush()
        os.fsync(self._sink.fileno())
        os.replace(self._aside, self._path)
