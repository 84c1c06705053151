"""What the library tells whoever counts. Called on the event loop's thread."""

from __future__ import annotations

from typing import Protocol


class LibraryObserver(Protocol):
    """Receive what came in and what went."""

    def bytes_uploaded(self, num_bytes: int) -> None:
        """Take note of bytes that an upload brought."""

    def bytes_collected(self, num_bytes: int) -> None:
        """Take note of bytes on disk that nobody needed any more."""
