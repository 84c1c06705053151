"""What an upload says, message by message, whichever client sends it.

Owns the header, the id that lets a repeated push go on, the order of the bytes, and what progress is told. Knows
nothing of channels and of waiting. Its generators read files: whoever must not block runs each step on a thread.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from motley.v1 import adapter_pb2

from motley_client.adapter_files import find_files
from motley_client.convert_adapters import kind_number, strings
from motley_client.convert_fields import checked
from motley_client.hashed_files import HashedFile, hash_file
from motley_client.telling import ProgressCall, Telling
from motley_client.types_adapters import AdapterKind, ResolvedAdapter, UploadPhase

DEFAULT_ALIAS = "default"


@dataclass(frozen=True, slots=True)
class Standing:
    """How an adapter stands: its newest version, 0 without one, and the etags of the aliases that an upload names.

    Semantics: an alias that is not there has an empty etag.
    """

    newest_version: int
    etags: tuple[str, ...]

    @property
    def has_every_alias(self) -> bool:
        """Tell whether each alias points somewhere."""
        return all(self.etags)


class UploadPlan:
    """The files that one upload brings, and what it says of them.

    Semantics: `hashing` comes first, then `settle` or `settle_by`, then `messages` as often as it takes.
    """

    def __init__(
        self,
        name: str,
        directory: str | os.PathLike[str],
        aliases: Iterable[str],
        labels: Mapping[str, str] | None,
        kind: AdapterKind | None,
        progress: ProgressCall | None,
    ) -> None:
        """Find the files, and refuse what cannot be sent before any is read.

        Raises: InvalidArgumentError; OSError.
        """
        self._header = checked("adapter_name", adapter_pb2.UploadHeader, adapter_name=name)
        self._header.aliases.extend(strings("aliases", aliases))
        self._header.MergeFrom(checked("labels", adapter_pb2.UploadHeader, labels=labels))
        self._header.MergeFrom(checked("kind", _of_kind, kind=kind))
        self._paths = find_files(Path(directory))
        self._total_bytes = sum(path.stat().st_size for path in self._paths)
        self._files: tuple[HashedFile, ...] = ()
        self._telling = Telling(progress)

    @property
    def adapter_name(self) -> str:
        """Return the name that is published under."""
        return self._header.adapter_name

    @property
    def upload_id(self) -> str:
        """Return what the upload is called, once that is settled."""
        return self._header.upload_id

    @property
    def total_bytes(self) -> int:
        """Return the size of all files together."""
        return self._total_bytes

    def hashing(self) -> Iterator[int]:
        """Read every file for its checksum, yielding how many bytes of all are read.

        Raises: OSError.
        """
        files, done = [], 0
        for path in self._paths:
            for step in hash_file(path):
                if isinstance(step, HashedFile):
                    files.append(step)
                else:
                    done += step
                    yield done
        self._files = tuple(files)
        self._total_bytes = sum(file.size_bytes for file in files)
        for file in files:
            self._header.files.add(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)

    def standing(self, newest: ResolvedAdapter | None) -> Standing:
        """Return what of an adapter's standing counts, from its newest version and its aliases; None has neither."""
        if newest is None:
            return Standing(0, ("",) * max(1, len(self._header.aliases)))
        etags = {alias.name: alias.etag for alias in newest.adapter.aliases}
        aliases = self._header.aliases or (DEFAULT_ALIAS,)
        return Standing(newest.version.version, tuple(etags.get(alias, "") for alias in aliases))

    def settle(self, upload_id: str) -> None:
        """Complete the header, under the given id."""
        self._header.MergeFrom(checked("upload_id", adapter_pb2.UploadHeader, upload_id=upload_id))

    def settle_by(self, standing: Standing) -> None:
        """Complete the header, under an id that the same push has again as long as the adapter stands as it does.

        Semantics: once a version was made or an alias moved, the same push is a new upload, and does what it says.
        """
        header = self._header
        files = [(file.name, file.size_bytes, file.sha256) for file in self._files]
        content = [header.adapter_name, header.kind, files, sorted(header.labels.items()), list(header.aliases)]
        content += [standing.newest_version, standing.etags]
        self.settle(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40])

    def messages(self, committed: Mapping[str, int]) -> Iterator[tuple[adapter_pb2.UploadAdapterRequest, int]]:
        """Yield what to send where some bytes have arrived, each with how many bytes of all are there after it.

        Raises: DataLossError (reason=FILE_CHANGED); OSError.
        """
        offsets = {file.name: min(committed.get(file.name, 0), file.size_bytes) for file in self._files}
        done = sum(offsets.values())
        yield adapter_pb2.UploadAdapterRequest(header=self._header), done
        for file in self._files:
            offset = offsets[file.name]
            for piece in file.pieces(offset):
                chunk = adapter_pb2.UploadChunk(file=file.name, offset=offset, data=piece)
                offset += len(piece)
                done += len(piece)
                yield adapter_pb2.UploadAdapterRequest(chunk=chunk), done
        yield adapter_pb2.UploadAdapterRequest(finish=adapter_pb2.UploadFinish()), done

    def tell(self, phase: UploadPhase, done_bytes: int) -> None:
        """Tell how far a phase has come; see Telling."""
        self._telling.tell(phase, done_bytes, self._total_bytes)


def _of_kind(kind: AdapterKind | None) -> adapter_pb2.UploadHeader:
    return adapter_pb2.UploadHeader(kind=kind_number(kind))
