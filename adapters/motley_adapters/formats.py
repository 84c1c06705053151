"""Files of an adapter's directory: regular, named, bounded; JSON strictly read.

Nothing here follows a symbolic link, opens a file that was not asked for by its fixed name, or loads a pickle. It knows
nothing of tensors or kinds. Any thread may run it; reading blocks, so the event loop's thread should not.
"""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from motley_adapters.errors import AdapterFormatError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
RESIDUAL_FILE = "goat_residual.safetensors"
MANIFEST_FILE = "motley_manifest.json"
CUT_FILE = "prune_manifest.json"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")

MAX_JSON_BYTES = 1 << 20
MAX_TENSOR_FILE_BYTES = 4 << 30
MAX_CUT_BYTES = 64 << 20

FileReader = Callable[[Path, str, int], bytearray | mmap.mmap]
"""How a file's bytes are had, given its directory, its name and their bound: `read_file` or `map_file`."""

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not make us wait for a writer


def max_bytes_of(name: str) -> int:
    """Return how many bytes a file of an adapter may have, by its name."""
    if name == CUT_FILE:
        return MAX_CUT_BYTES
    return MAX_JSON_BYTES if name.endswith(".json") else MAX_TENSOR_FILE_BYTES


def has_file(directory: Path, name: str) -> bool:
    """Tell whether a directory has an entry of this name, of whatever type."""
    return os.path.lexists(directory / name)


def read_file(directory: Path, name: str, max_bytes: int) -> bytearray:
    """Read one regular file of a directory whole.

    Raises: AdapterFormatError with reason MISSING_FILE, SYMLINK_REFUSED, NOT_A_REGULAR_FILE, FILE_TOO_LARGE or
    UNREADABLE_FILE; the field is the file's name.
    """
    with _opened(directory, name, max_bytes) as (file, num_bytes):
        content = bytearray(num_bytes)
        if file.readinto(content) != num_bytes:
            raise _changed_error(name)
        return content


def map_file(directory: Path, name: str, max_bytes: int) -> bytearray | mmap.mmap:
    """Map one regular file of a directory, so that its bytes take no memory of this process's own.

    Semantics: private: writing to the mapping reaches no file. It lasts as long as anything refers to it.
    Effects: whoever shortens a mapped file ends this process when the missing bytes are touched, and whoever overwrites
    it changes what was checked: for directories that this process alone writes to.
    Raises: as `read_file`.
    """
    with _opened(directory, name, max_bytes) as (file, num_bytes):
        if num_bytes == 0:
            return bytearray()  # nothing cannot be mapped
        try:
            return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_COPY)
        except ValueError:  # the file is shorter by now
            raise _changed_error(name) from None


@contextmanager
def _opened(directory: Path, name: str, max_bytes: int) -> Iterator[tuple[io.BufferedReader, int]]:
    """Open a regular file of at most so many bytes, and say how many it has."""
    try:
        with open(directory / name, "rb", opener=lambda path, _: os.open(path, _OPEN_FLAGS)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterFormatError(f"{name} is not a regular file", reason="NOT_A_REGULAR_FILE", field=name)
            if status.st_size > max_bytes:
                message = f"{name} has {status.st_size} bytes, at most {max_bytes} are read"
                raise AdapterFormatError(message, reason="FILE_TOO_LARGE", field=name)
            yield file, status.st_size
    except OSError as error:
        raise _open_error(name, error) from None


def _changed_error(name: str) -> AdapterFormatError:
    return AdapterFormatError(f"{name} changed while it was read", reason="UNREADABLE_FILE", field=name)


def _open_error(name: str, error: OSError) -> AdapterFormatError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return AdapterFormatError(f"there is no file {name}", reason="MISSING_FILE", field=name)
    if error.errno == errno.ELOOP:
        message = f"{name} is a symbolic link; put the file itself there"
        return AdapterFormatError(message, reason="SYMLINK_REFUSED", field=name)
    if error.errno == errno.EISDIR:
        return AdapterFormatError(f"{name} is a directory", reason="NOT_A_REGULAR_FILE", field=name)
    return AdapterFormatError(f"{name} cannot be read: {error.strerror}", reason="UNREADABLE_FILE", field=name)


def read_tensor_file(directory: Path, read: FileReader = read_file) -> bytearray | mmap.mmap:
    """Read the safetensors file, and say so when only a pickle is there.

    Raises: AdapterFormatError as `read_file` does, or with reason PICKLE_REFUSED and the pickle's name as the field.
    """
    if not has_file(directory, TENSOR_FILE):
        for name in PICKLE_FILES:
            if has_file(directory, name):
                message = f"{name} is a pickle, which can run code when loaded; save the adapter as {TENSOR_FILE}"
                raise AdapterFormatError(message, reason="PICKLE_REFUSED", field=name)
    return read(directory, TENSOR_FILE, MAX_TENSOR_FILE_BYTES)


def refuse_peft_config(directory: Path, kind: str) -> None:
    """Refuse a directory of a kind that PEFT cannot load and that has PEFT's configuration nevertheless.

    Raises: AdapterFormatError with reason UNEXPECTED_FILE.
    """
    if has_file(directory, CONFIG_FILE):
        message = f"{CONFIG_FILE} says LoRA, and {MANIFEST_FILE} says {kind}: PEFT would load it as what it is not"
        raise AdapterFormatError(message, reason="UNEXPECTED_FILE", field=CONFIG_FILE)


def read_json_file(directory: Path, name: str) -> dict[str, object]:
    """Read one JSON file that must hold an object.

    Raises: AdapterFormatError as `read_file` and `parse_json_object` do.
    """
    return parse_json_object(bytes(read_file(directory, name, MAX_JSON_BYTES)), name)


def parse_json_object(content: bytes, name: str) -> dict[str, object]:
    """Parse UTF-8 JSON that must be an object.

    Semantics: a key given twice is refused at any depth; NaN and Infinity, which Python would accept, are not JSON.
    Raises: AdapterFormatError with reason BAD_JSON or DUPLICATE_KEY; the field is `name`, with the key for a duplicate.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            seen: set[str] = set()
            key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            message = f"{name} gives the key {show(key)} twice"
            raise AdapterFormatError(message, reason="DUPLICATE_KEY", field=f"{name.removesuffix('.json')}.{key}")
        return fields

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except AdapterFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{name} is not JSON: {error}", reason="BAD_JSON", field=name) from None
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{name} does not hold a JSON object", reason="BAD_JSON", field=name)
    return value


def show(value: object) -> str:
    """Quote a value from a file in a message, shortened."""
    try:
        text = repr(value)
    except RecursionError:  # parsed with just enough room on the stack, and there is less here
        return "something too deeply nested to show"
    return text if len(text) <= 120 else f"{text[:120]}..."
