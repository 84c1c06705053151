"""The base fingerprint: one digest over a checkpoint's tensors, however they are spread over files.

It reads safetensors files itself, byte by byte, so that it sees what is stored and not what a loader made of it. Runs
on whichever thread loads the base; it needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

from motley_bases.checkpoint import weight_files
from motley_bases.errors import UnreadableBaseError

CACHE_FILE = "fingerprints.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What one tensor is, as stored.

    Semantics: `dtype` is the file's own word (F32, BF16, ...); `sha256` is over the tensor's bytes alone.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class DigestedFile:
    """What one file held when it had this size and modification time."""

    size_bytes: int
    mtime_ns: int
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor lies in its file. Units: bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def fingerprint(directory: Path, *, cache_directory: Path | None = None) -> str:
    """Return "sha256:..." over the sorted (name, dtype, shape, sha256 of the stored bytes) of a checkpoint.

    Semantics: tied weights count under the names they are stored under; sharding does not matter; the config does not
    enter.
    Effects: with a cache directory, remembers each file's tensors there by path, size and modification time.
    Raises: UnreadableBaseError if a file is broken, or two shards hold one name.
    """
    cache = _read_cache(cache_directory)
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        stat, key = path.stat(), str(path.resolve())
        known = cache.get(key)
        if known is None or (known.size_bytes, known.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            known = cache[key] = DigestedFile(stat.st_size, stat.st_mtime_ns, digest_file(path))
            _write_cache(cache_directory, cache)
        for tensor in known.tensors:
            if tensor.name in tensors:
                raise _broken(path, f"holds {tensor.name}, which another shard holds too")
            tensors[tensor.name] = tensor
    return combine(tensors.values())


def stored_dtypes(paths: Iterable[Path]) -> dict[str, int]:
    """Return how many bytes of safetensors files are of which dtype, in the files' own words."""
    totals: dict[str, int] = {}
    for path in paths:
        with path.open("rb") as file:
            for header in read_header(path, file):
                totals[header.dtype] = totals.get(header.dtype, 0) + header.end - header.begin
    return totals


def combine(tensors: Iterable[StoredTensor]) -> str:
    """Combine tensors, in any order, into one fingerprint."""
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        line = json.dumps([tensor.name, tensor.dtype, list(tensor.shape), tensor.sha256])
        digest.update(line.encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def digest_file(path: Path) -> tuple[StoredTensor, ...]:
    """Digest every tensor of one safetensors file, reading it in chunks."""
    with path.open("rb") as file:
        return tuple(
            StoredTensor(header.name, header.dtype, header.shape, _digest_range(file, header.begin, header.end))
            for header in read_header(path, file)
        )


def read_header(path: Path, file: BinaryIO) -> list[TensorHeader]:
    """Read where each tensor of a safetensors file lies, in the order of their bytes.

    Raises: UnreadableBaseError if the header is not one, repeats a name, or speaks of bytes that the file does not
    have.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
        raise _broken(path, "is not safetensors: its header's length is impossible")
    try:
        entries = json.loads(file.read(length), object_pairs_hook=_refuse_repeated_names)
    except ValueError as error:
        raise _broken(path, f"has a broken header: {error}") from error
    if not isinstance(entries, dict):
        raise _broken(path, "has a header that is not a JSON object")
    entries.pop("__metadata__", None)
    headers = [_parse_entry(path, name, entry, 8 + length, size) for name, entry in entries.items()]
    return sorted(headers, key=lambda header: header.begin)


def _parse_entry(path: Path, name: str, entry: object, data_begin: int, size: int) -> TensorHeader:
    fields = entry if isinstance(entry, dict) else {}
    try:
        dtype, shape = str(fields["dtype"]), tuple(int(side) for side in fields["shape"])
        begin, end = (data_begin + int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"describes {name} in a way that is not safetensors'") from error
    if min(shape, default=0) < 0 or not data_begin <= begin <= end <= size:
        raise _broken(path, f"places {name} outside the file: it is truncated or corrupted")
    if math.prod(shape) == 0 and end > begin:
        raise _broken(path, f"gives bytes to {name}, which has no element")
    return TensorHeader(name, dtype, shape, begin, end)


def _refuse_repeated_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _digest_range(file: BinaryIO, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    file.seek(begin)
    remaining = end - begin
    while remaining:
        chunk = file.read(min(CHUNK_BYTES, remaining))
        if not chunk:
            raise UnreadableBaseError(f"{file.name} was cut short while it was read", reason="BROKEN_WEIGHTS")
        digest.update(chunk)
        remaining -= len(chunk)
    return digest.hexdigest()


def _read_cache(directory: Path | None) -> dict[str, DigestedFile]:
    """Read the cache, by path; one that cannot be understood is an empty one, since it can be made again."""
    if directory is None or not (directory / CACHE_FILE).is_file():
        return {}
    try:
        stored = json.loads((directory / CACHE_FILE).read_text(encoding="utf-8"))
        return {path: _parse_cached(*fields) for path, fields in stored.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _parse_cached(size_bytes: int, mtime_ns: int, tensors: list[tuple[str, str, list[int], str]]) -> DigestedFile:
    parsed = tuple(StoredTensor(name, dtype, tuple(shape), sha256) for name, dtype, shape, sha256 in tensors)
    return DigestedFile(size_bytes, mtime_ns, parsed)


def _write_cache(directory: Path | None, cache: dict[str, DigestedFile]) -> None:
    """Replace the cache in one rename, so that a reader never sees half of one."""
    if directory is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    stored = {
        path: [known.size_bytes, known.mtime_ns, [astuple(tensor) for tensor in known.tensors]]
        for path, known in cache.items()
    }
    with tempfile.NamedTemporaryFile("w", dir=directory, delete=False, encoding="utf-8") as file:
        json.dump(stored, file)
    os.replace(file.name, directory / CACHE_FILE)


def _broken(path: Path, what: str) -> UnreadableBaseError:
    return UnreadableBaseError(f"{path} {what}", reason="BROKEN_WEIGHTS")
