"""Adapters that live in directories of this machine, as the source from which they come back.

It remembers where each digest was found, in one place or in several, and reads there again through the one door. It
knows no names and no tenants, and removes nothing. Any thread but the event loop's and the engine's; nothing is read
under the lock.
"""

from __future__ import annotations

import threading
from pathlib import Path

from motley_bases.spec import BaseSpec

from motley_adapters.errors import AdapterError, AdapterLoadError
from motley_adapters.reader import Inspection, inspect_adapter, read_adapter
from motley_adapters.spec import Adapter, BaseTensor


class AdapterDirectories:
    """Read adapters of one base from directories, the first time and again (see `AdapterSource`)."""

    def __init__(self, base: BaseSpec, *, base_tensor: BaseTensor | None = None, residuals: Path | None = None) -> None:
        self._base = base
        self._base_tensor = base_tensor
        self._residuals = residuals
        self._lock = threading.Lock()
        self._directories: dict[str, list[Path]] = {}  # of each digest, the last remembered at the end
        self._digests: dict[Path, set[str]] = {}  # the same, from the other side

    def read(self, directory: Path) -> Adapter:
        """Read a directory, and remember it as a place of what it holds.

        Raises: AdapterFormatError, AdapterMismatchError.
        """
        adapter = self._read(directory)
        self.remember(adapter.spec.digest, directory)
        return adapter

    def inspect(self, directory: Path) -> Inspection:
        """Check a directory without keeping its tensors, and remember nothing of it.

        Semantics: for directories that nobody else writes to (see `inspect_adapter`).
        Raises: AdapterFormatError, AdapterMismatchError.
        """
        return inspect_adapter(directory, self._base, base_tensor=self._base_tensor, residuals=self._residuals)

    def remember(self, digest: str, directory: Path) -> None:
        """Remember a directory as a place of a digest, and the first to look at; nothing is read."""
        with self._lock:
            directories = self._directories.setdefault(digest, [])
            if directory in directories:
                directories.remove(directory)
            directories.append(directory)
            self._digests.setdefault(directory, set()).add(digest)

    def forget(self, directory: Path) -> frozenset[str]:
        """Forget a directory, and return the digests that have no place any more."""
        with self._lock:
            homeless = set()
            for digest in self._digests.pop(directory, ()):
                self._directories[digest].remove(directory)
                if not self._directories[digest]:
                    del self._directories[digest]
                    homeless.add(digest)
            return frozenset(homeless)

    def load(self, digest: str) -> Adapter:
        """Read what lies now where this digest was found, the place remembered last first.

        Raises: AdapterLoadError with reason ADAPTER_UNREADABLE, or ADAPTER_CHANGED where another adapter lies now, as
        the first place tried has it.
        """
        with self._lock:
            directories = tuple(reversed(self._directories.get(digest, ())))
        first_error: AdapterLoadError | None = None
        for directory in directories:
            try:
                return self._read_again(digest, directory)
            except AdapterLoadError as error:
                first_error = first_error or error
        if first_error is None:
            first_error = AdapterLoadError(f"{digest} was found in no directory", reason="ADAPTER_UNREADABLE")
        raise first_error

    def _read_again(self, digest: str, directory: Path) -> Adapter:
        try:
            adapter = self._read(directory)
        except (AdapterError, OSError) as error:
            said = error.message if isinstance(error, AdapterError) else str(error)
            message = f"{digest} cannot be read again: {said}"
            raise AdapterLoadError(message, reason="ADAPTER_UNREADABLE") from error
        if adapter.spec.digest != digest:
            message = f"what was {digest} holds {adapter.spec.digest} now"
            raise AdapterLoadError(message, reason="ADAPTER_CHANGED")
        return adapter

    def _read(self, directory: Path) -> Adapter:
        return read_adapter(directory, self._base, base_tensor=self._base_tensor, residuals=self._residuals)
