"""The safetensors format: header length, JSON header, tensors back to back.

The header is checked here to the last byte before any tensor is made, more strictly than the format's own library does:
no key twice, no zero-size tensor, no dtype that an adapter has no use for, no value that is not finite or that a device
could not hold. Bytes come in, tensors go out; files and meanings are others' business. Any thread.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

import torch
from torch import Tensor

from motley_adapters.errors import AdapterFormatError
from motley_adapters.formats import TENSOR_FILE, parse_json_object, show

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 16384
MAX_NAME_CHARACTERS = 512
MAX_DIMENSIONS = 8
LARGEST_WEIGHT: float = torch.finfo(torch.float16).max  # of the dtypes that a device may hold, the narrowest

FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
FLOATS_AND_INDICES: Mapping[str, torch.dtype] = MappingProxyType({**FLOATS, "I32": torch.int32})
_PIECE_VALUES = 1 << 18
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header declares it; offsets are bytes after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_tensors(
    content: bytes | bytearray | mmap.mmap, *, file: str = TENSOR_FILE, dtypes: Mapping[str, torch.dtype] = FLOATS
) -> dict[str, Tensor]:
    """Turn the bytes of a safetensors file into tensors.

    Semantics: a tensor is a view of the content and keeps it alive; it is a copy where the content is immutable or the
    header's length leaves it unaligned. `file` is the file's name in errors; `dtypes` are those that it may hold.
    Raises: AdapterFormatError as `parse_header` does, or with reason NON_FINITE or WEIGHT_TOO_LARGE and the tensor's
    name as the field.
    """
    entries, data_begin = parse_header(content, file=file, dtypes=dtypes)
    tensors = {}
    for entry in entries:
        tensor = _tensor(content, data_begin + entry.begin, entry)
        if tensor.is_floating_point():
            _check_values(entry.name, tensor)
        tensors[entry.name] = tensor
    return tensors


def in_pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor along its first dimension, so that converting a piece takes little memory."""
    values_a_row = max(1, math.prod(tensor.shape[1:]))
    return tuple(tensor.split(max(1, _PIECE_VALUES // values_a_row)))


def parse_header(
    content: bytes | bytearray | mmap.mmap, *, file: str = TENSOR_FILE, dtypes: Mapping[str, torch.dtype] = FLOATS
) -> tuple[tuple[TensorEntry, ...], int]:
    """Check the header against the whole file.

    Semantics: returns the entries in file order, and the offset of the first byte after the header.
    Raises: AdapterFormatError; the field is a tensor's name, or the file's where no tensor is at fault.
    """
    header, _, length = _header(content, file)
    if len(header) > MAX_TENSORS:
        _refuse(file, "TOO_MANY_TENSORS", f"the header names {len(header)} tensors, at most {MAX_TENSORS} are read")
    entries = sorted(
        (_entry(name, value, file, dtypes) for name, value in header.items()), key=lambda entry: entry.begin
    )
    _check_coverage(entries, len(content) - 8 - length, file)
    return tuple(entries), 8 + length


def parse_metadata(content: bytes | bytearray | mmap.mmap, *, file: str = TENSOR_FILE) -> Mapping[str, str]:
    """Return the texts that the header has beside the tensors; nothing else of the file is looked at.

    Raises: AdapterFormatError for a header that is none; the field is the file's.
    """
    return _header(content, file)[1]


def _header(content: bytes | bytearray | mmap.mmap, file: str) -> tuple[dict[str, object], dict[str, str], int]:
    """Return what the header says of tensors, what it says beside, and its length."""
    length = _header_length(content, file)
    raw = bytes(content[8 : 8 + length])
    if not raw.startswith(b"{"):
        _refuse(file, "BAD_HEADER", "the header does not begin with a JSON object")
    header = parse_json_object(raw, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(file, "BAD_HEADER", "__metadata__ is not a map of strings")
    return header, metadata, length


def _tensor(content: bytes | bytearray | mmap.mmap, begin: int, entry: TensorEntry) -> Tensor:
    if isinstance(content, bytes) or begin % entry.dtype.itemsize:
        with memoryview(content) as view:
            copied = bytearray(view[begin : begin + entry.end - entry.begin])
        return torch.frombuffer(copied, dtype=entry.dtype).reshape(entry.shape)
    count = math.prod(entry.shape)
    return torch.frombuffer(content, dtype=entry.dtype, count=count, offset=begin).reshape(entry.shape)


def _check_values(name: str, tensor: Tensor) -> None:
    """Refuse values that are not finite now, or would not be once the device holds them in its own dtype."""
    low, high = (float(bound) for bound in tensor.aminmax())  # NaN if there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        raise AdapterFormatError(f"{name} holds NaN or infinity", reason="NON_FINITE", field=name)
    if (largest := max(-low, high)) > LARGEST_WEIGHT:
        message = f"{name} holds {largest:g}, and no weight may be beyond {LARGEST_WEIGHT:g}"
        raise AdapterFormatError(message, reason="WEIGHT_TOO_LARGE", field=name)


def _header_length(content: bytes | bytearray | mmap.mmap, file: str) -> int:
    if len(content) < 8:
        _refuse(file, "TRUNCATED", f"{len(content)} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", content[:8])
    if length > MAX_HEADER_BYTES:
        # Only here: 0x80 may also begin an honest length, such as 640.
        if content[:4].startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
            _refuse(file, "PICKLE_REFUSED", "the file is a pickle under another name")
        _refuse(file, "HEADER_TOO_LARGE", f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if length > len(content) - 8:
        _refuse(file, "TRUNCATED", f"the header claims {length} bytes, the file ends after {len(content) - 8}")
    return int(length)


def _entry(name: str, value: object, file: str, dtypes: Mapping[str, torch.dtype]) -> TensorEntry:
    if len(name) > MAX_NAME_CHARACTERS:
        _refuse(file, "NAME_TOO_LONG", f"a tensor's name has {len(name)} characters, at most {MAX_NAME_CHARACTERS}")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(file, "BAD_HEADER", f"{name} is not described by dtype, shape and data_offsets alone", name)
    dtype = dtypes.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        _refuse(file, "BAD_DTYPE", f"{name} has dtype {show(value['dtype'])}; adapters are {', '.join(dtypes)}", name)
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        _refuse(file, "BAD_SHAPE", f"{name} has shape {show(shape)}", name)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(file, "BAD_OFFSETS", f"{name} has data_offsets {show(offsets)}", name)
    if 0 in shape:
        _refuse(file, "EMPTY_TENSOR", f"{name} has shape {show(shape)}: no values", name)
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        message = f"{name} has shape {show(shape)} of {value['dtype']}, but data_offsets {show(offsets)}"
        _refuse(file, "SIZE_MISMATCH", message, name)
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _are_counts(value: object) -> bool:
    # type() and not isinstance: true and false are ints to Python, not to the format
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(entries: Iterable[TensorEntry], num_bytes: int, file: str) -> None:
    position = 0
    for entry in entries:
        if entry.begin < position:
            _refuse(
                file, "OVERLAP", f"{entry.name} begins at byte {entry.begin}, inside the tensor before it", entry.name
            )
        if entry.begin > position:
            _refuse(
                file, "HOLE", f"bytes {position} to {entry.begin} before {entry.name} belong to no tensor", entry.name
            )
        if entry.end > num_bytes:
            _refuse(file, "TRUNCATED", f"{entry.name} ends at byte {entry.end} of {num_bytes}", entry.name)
        position = entry.end
    if position != num_bytes:
        _refuse(file, "TRAILING_BYTES", f"{num_bytes - position} bytes after the last tensor belong to no tensor")


def _refuse(file: str, reason: str, message: str, field: str | None = None) -> NoReturn:
    raise AdapterFormatError(f"{file}: {message}", reason=reason, field=file if field is None else field)
