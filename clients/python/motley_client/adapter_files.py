"""The files of an adapter on the client's disk: which are sent, what they are, and their bytes in pieces.

Owns the names that an adapter's files may have. Knows nothing of channels. Everything blocks; whoever must not, runs
each step on a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from motley_client.errors import DataLossError, InvalidArgumentError

FILE_NAMES = (
    "adapter_config.json",
    "motley_manifest.json",
    "goat_residual.safetensors",
    "adapter_model.safetensors",
)
PIECE_BYTES = 1 << 20

_PICKLE = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class AdapterFile:
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


def find_files(directory: Path) -> tuple[Path, ...]:
    """Return the files of a directory that make an adapter; whatever else lies there is left out.

    Raises: InvalidArgumentError (reason=NO_ADAPTER_FILES, NOT_A_FILE or PICKLED_TENSORS) for what is refused; OSError.
    """
    found = []
    for name in FILE_NAMES:
        path = directory / name
        if path.is_symlink():
            raise _refusal(f"{path} is a symbolic link: copy the directory with its files (cp -rL)", "NOT_A_FILE")
        if path.is_file():
            found.append(path)
        elif path.exists():
            raise _refusal(f"{path} is no file", "NOT_A_FILE")
    if directory / "adapter_model.safetensors" not in found and (directory / _PICKLE).exists():
        hint = "a pickle can run code where it is read: save the adapter as safetensors (safe_serialization=True)"
        raise _refusal(f"{directory / _PICKLE}: {hint}", "PICKLED_TENSORS")
    if not found:
        raise _refusal(f"{directory} holds none of {', '.join(FILE_NAMES)}", "NO_ADAPTER_FILES")
    return tuple(found)


def hash_file(path: Path) -> Iterator[int | AdapterFile]:
    """Read a file once: yield the size of each piece, and at the end what the file is.

    Raises: OSError.
    """
    hasher, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            hasher.update(piece)
            size += len(piece)
            yield len(piece)
    yield AdapterFile(path, size, hasher.hexdigest())


def _refusal(message: str, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=reason, field="directory")
