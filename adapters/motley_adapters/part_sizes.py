"""What room parts take on the device: remembered for the adapters that were measured, until they are forgotten.

An adapter may share parts with others, and a part may outlive its adapter on the device; a size stays as long as either
may ask for it again, and no longer, so that memory does not grow with every adapter ever seen. The owner's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping


class PartSizes:
    """Remember the sizes of the extents of each part."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, tuple[str, ...]] = {}  # by adapter
        self._num_adapters: Counter[str] = Counter()  # by part

    def __len__(self) -> int:
        return len(self._sizes)

    def learn(self, adapter: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Take in the sizes of all parts of an adapter; twice is once."""
        self._sizes.update(sizes)
        if adapter not in self._parts:
            self._parts[adapter] = tuple(sizes)
            self._num_adapters.update(sizes.keys())

    def forget(self, adapter: str, placed: Container[str]) -> None:
        """Let go of an adapter, and of the sizes of its parts but for those that others share or that are placed."""
        for part in self._parts.pop(adapter, ()):
            self._num_adapters[part] -= 1
            if not self._num_adapters[part]:
                del self._num_adapters[part]
            if part not in placed:
                self.leave(part)

    def leave(self, part: str) -> None:
        """Take note that a part has left the device: if all its adapters were forgotten, so is its size."""
        if part not in self._num_adapters:
            self._sizes.pop(part, None)

    def get(self, part: str) -> tuple[int, ...] | None:
        """Return the sizes of a part's extents; None if they are not known."""
        return self._sizes.get(part)

    def are_known(self, parts: Iterable[str]) -> bool:
        """Tell whether the sizes of all these parts are known."""
        return all(part in self._sizes for part in parts)

    def num_bytes(self, parts: Iterable[str]) -> int:
        """Return what parts take together, as far as it is known; no part may be named twice."""
        return sum(sum(self._sizes.get(part, ())) for part in parts)
