"""Adapters that live in directories of this machine, as the source from which they come back.

It remembers where each digest was read, and reads there again through the one door. Filled before serving; loads on the
loader's thread.
"""

from __future__ import annotations

from pathlib import Path

from motley_bases.spec import BaseSpec

from motley_adapters.errors import AdapterError, AdapterLoadError
from motley_adapters.reader import read_adapter
from motley_adapters.spec import Adapter, BaseTensor


class AdapterDirectories:
    """Read adapters of one base from directories, the first time and again (see `AdapterSource`)."""

    def __init__(self, base: BaseSpec, *, base_tensor: BaseTensor | None = None, residuals: Path | None = None) -> None:
        self._base = base
        self._base_tensor = base_tensor
        self._residuals = residuals
        self._directories: dict[str, Path] = {}

    def read(self, directory: Path) -> Adapter:
        """Read a directory, and remember it as the place of what it holds.

        Raises: AdapterFormatError, AdapterMismatchError.
        """
        adapter = self._read(directory)
        self._directories[adapter.spec.digest] = directory
        return adapter

    def load(self, digest: str) -> Adapter:
        """Read what lies now where this digest was read.

        Raises: AdapterLoadError with reason ADAPTER_UNREADABLE.
        """
        try:
            return self._read(self._directories[digest])
        except (AdapterError, OSError, KeyError) as error:
            said = error.message if isinstance(error, AdapterError) else str(error)
            message = f"{digest} cannot be read again: {said}"
            raise AdapterLoadError(message, reason="ADAPTER_UNREADABLE") from error

    def _read(self, directory: Path) -> Adapter:
        return read_adapter(directory, self._base, base_tensor=self._base_tensor, residuals=self._residuals)
