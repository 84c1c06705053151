"""The files that a bundle consists of: which there may be, and the digest that they have together.

It knows no disk and no upload. Pure functions, for any thread.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from motley_server.errors import InvalidArgumentError

FILE_NAMES = (
    "adapter_config.json", "adapter_model.safetensors", "goat_residual.safetensors", "motley_manifest.json",
    "prune_manifest.json",
)  # fmt: skip
MAX_FILE_BYTES = 1 << 40
PREFIX = "sha256:"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A file of a bundle; `sha256` is 64 small hexadecimal digits."""

    name: str
    size_bytes: int
    sha256: str


def bundle_digest(files: Iterable[BundleFile]) -> str:
    """Return the digest of a bundle: of a line `<sha256> <size> <name>` for each file, in the order of their names."""
    lines = (f"{file.sha256} {file.size_bytes} {file.name}\n" for file in sorted(files, key=lambda file: file.name))
    return PREFIX + hashlib.sha256("".join(lines).encode()).hexdigest()


def checked_files(files: Iterable[BundleFile], names: Collection[str] = FILE_NAMES) -> tuple[BundleFile, ...]:
    """Return announced files in the order of their names, so that their own order never counts.

    Semantics: `names` are those that a file may have; an adapter's, unless others are given.
    Raises: InvalidArgumentError (reason=EMPTY_UPLOAD, FILE_NOT_ALLOWED, DUPLICATE_FILE, OUT_OF_RANGE or
    INVALID_CHECKSUM).
    """
    found: dict[str, BundleFile] = {}
    for index, file in enumerate(files):
        field = f"files[{index}]"
        if file.name not in names:
            message = f"there is no place for a file {file.name[:80]!r} here; files are {', '.join(names)}"
            raise InvalidArgumentError(message, reason="FILE_NOT_ALLOWED", field=f"{field}.name")
        if file.name in found:
            raise InvalidArgumentError(f"{file.name} twice", reason="DUPLICATE_FILE", field=f"{field}.name")
        if not 0 <= file.size_bytes <= MAX_FILE_BYTES:
            message = f"{file.name}: a size is 0 to {MAX_FILE_BYTES} bytes"
            raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field=f"{field}.size_bytes")
        if not SHA256.fullmatch(file.sha256):
            message = f"{file.name}: a sha256 is 64 of the digits 0-9 and a-f"
            raise InvalidArgumentError(message, reason="INVALID_CHECKSUM", field=f"{field}.sha256")
        found[file.name] = file
    if not found:
        raise InvalidArgumentError("an upload has at least one file", reason="EMPTY_UPLOAD", field="files")
    return tuple(found[name] for name in sorted(found))
