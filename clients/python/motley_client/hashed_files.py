"""Files on their way to a server: what they are, by one reading, and their bytes in pieces by another.

Owns the size of a piece, and that a file which became shorter in between is noticed. Knows nothing of channels.
Everything blocks; whoever must not, runs each step on a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from motley_client.errors import DataLossError

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HashedFile:
    """A file as it was when it was read for its checksum."""

    path: Path
    size_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Return the name that travels."""
        return self.path.name

    def pieces(self, offset: int) -> Iterator[bytes]:
        """Yield the bytes from an offset on, as many as were there.

        Raises: DataLossError (reason=FILE_CHANGED) if there are fewer now; OSError.
        """
        with self.path.open("rb") as file:
            file.seek(offset)
            while offset < self.size_bytes:
                piece = file.read(min(PIECE_BYTES, self.size_bytes - offset))
                if not piece:
                    raise DataLossError(f"{self.path} became shorter while it was sent", reason="FILE_CHANGED")
                yield piece
                offset += len(piece)


def hash_file(path: Path) -> Iterator[int | HashedFile]:
    """Read a file once: yield the size of each piece, and at the end what the file is.

    Raises: OSError.
    """
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            hasher.update(piece)
            size += len(piece)
            yield len(piece)
    yield HashedFile(path, size, hasher.hexdigest())
