"""What the upload of a dataset says, message by message, whichever client sends it.

Owns the header, the order of the bytes, how samples become lines, and what progress is told. Knows nothing of channels
and of waiting. Its generators read files: whoever must not block runs each step on a thread.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from motley.v1 import training_pb2

from motley_client.convert_fields import checked
from motley_client.errors import InvalidArgumentError
from motley_client.hashed_files import PIECE_BYTES, HashedFile, hash_file
from motley_client.telling import ProgressCall, Telling
from motley_client.types_adapters import UploadPhase

Sample = str | Mapping[str, object]
"""A line of a dataset, as JSON text or as what becomes it."""

DatasetSource = str | os.PathLike[str] | Iterable[Sample]
"""A file of lines, by its path, or the samples themselves; a text alone is a path."""

_MAX_DEFAULT_NAME = 200  # characters, as many as a server takes


@dataclass(frozen=True, slots=True)
class _HashedLines:
    """Samples as the bytes of a file."""

    data: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def pieces(self, offset: int) -> Iterator[bytes]:
        for start in range(offset, len(self.data), PIECE_BYTES):
            yield self.data[start : start + PIECE_BYTES]


class DatasetPlan:
    """The bytes that one upload brings, and what it says of them.

    Semantics: `hashing` comes first, then `messages` as often as it takes.
    """

    def __init__(self, source: DatasetSource, display_name: str | None, progress: ProgressCall | None) -> None:
        """Find the file, or write the samples as lines, and refuse what cannot be sent before anything is.

        Raises: InvalidArgumentError; OSError.
        """
        name = "" if display_name is None else display_name
        self._source: Path | _HashedLines
        if isinstance(source, str | os.PathLike):
            self._source = Path(source)
            self._total_bytes = self._source.stat().st_size
            if not self._source.is_file():
                raise InvalidArgumentError(f"{self._source} is no file", reason="NOT_A_FILE", field="source")
            name = self._source.name[:_MAX_DEFAULT_NAME] if display_name is None else display_name
        else:
            self._source = _HashedLines(_joined(source))
            self._total_bytes = self._source.size_bytes
        self._header = checked("display_name", training_pb2.DatasetHeader, display_name=name)
        self._content: HashedFile | _HashedLines | None = None
        self._telling = Telling(progress)

    @property
    def digest(self) -> str:
        """Return the dataset's name, once it is hashed."""
        return self._header.digest

    @property
    def total_bytes(self) -> int:
        """Return the size of all lines together."""
        return self._total_bytes

    def hashing(self) -> Iterator[int]:
        """Read everything for its checksum, yielding how many bytes are read.

        Raises: OSError.
        """
        done = 0
        for step in hash_file(self._source) if isinstance(self._source, Path) else (self._total_bytes, self._source):
            if isinstance(step, int):
                done += step
                yield done
            else:
                self._content = step
                self._total_bytes = step.size_bytes
                self._header.digest = f"sha256:{step.sha256}"
                self._header.size_bytes = step.size_bytes

    def messages(self, committed: int) -> Iterator[tuple[training_pb2.UploadDatasetRequest, int]]:
        """Yield what to send where some bytes have arrived, each with how many bytes of all are there after it.

        Raises: DataLossError (reason=FILE_CHANGED); OSError.
        """
        assert self._content is not None, "nothing was hashed"
        offset = min(committed, self._total_bytes)
        yield training_pb2.UploadDatasetRequest(header=self._header), offset
        for piece in self._content.pieces(offset):
            chunk = training_pb2.DatasetChunk(offset=offset, data=piece)
            offset += len(piece)
            yield training_pb2.UploadDatasetRequest(chunk=chunk), offset
        yield training_pb2.UploadDatasetRequest(finish=training_pb2.DatasetFinish()), offset

    def tell(self, phase: UploadPhase, done_bytes: int) -> None:
        """Tell how far a phase has come; see Telling."""
        self._telling.tell(phase, done_bytes, self._total_bytes)


def _joined(samples: Iterable[Sample]) -> bytes:
    """Write samples one a line.

    Raises: InvalidArgumentError, with the line's number, for what is not one line of text, or cannot become one.
    """
    lines = []
    if isinstance(samples, Mapping):
        raise _refusal("one sample alone: give a sequence of them")
    for number, sample in enumerate(samples, start=1):
        try:
            line = sample.removesuffix("\n") if isinstance(sample, str) else _written(sample)
            data = line.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise _refusal(f"line {number}: {error}") from error
        if b"\n" in data:
            raise _refusal(f"line {number} has a line break inside")
        lines.append(data + b"\n")
    return b"".join(lines)


def _written(sample: object) -> str:
    if not isinstance(sample, Mapping):
        raise TypeError(f"a text or a mapping, not {type(sample).__name__}")
    return json.dumps(dict(sample), ensure_ascii=False, allow_nan=False)


def _refusal(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"source: {message}", reason="INVALID_VALUE", field="source")
