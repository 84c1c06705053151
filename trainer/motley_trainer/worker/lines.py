"""Lines out of a stream of bytes, none longer than a bound.

Owns the splitting alone. Pure but for what it holds of an unfinished line.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_LINE_BYTES = 1 << 20


class LineSplitter:
    """Take bytes as they come and give whole lines, without their ends."""

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._is_skipping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that end in these bytes; of one that is too long, its beginning, once."""
        *ends, rest = data.split(b"\n")
        for end in ends:
            yield from self._append(end)
            if not self._is_skipping:
                yield bytes(self._rest)
            self._rest.clear()
            self._is_skipping = False
        yield from self._append(rest)

    def finish(self) -> Iterator[bytes]:
        """Yield what stands behind the last end of a line, if anything does."""
        if self._rest:
            yield bytes(self._rest)

    def _append(self, part: bytes) -> Iterator[bytes]:
        if self._is_skipping:
            return
        self._rest += part
        if len(self._rest) > self._max_bytes:
            yield bytes(self._rest[: self._max_bytes])
            self._rest.clear()
            self._is_skipping = True
