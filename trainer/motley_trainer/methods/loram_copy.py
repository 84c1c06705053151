"""The copy of a base that LoRAM trains on, as a method sees it: where it lies, and what was kept of the original.

Reads one small file. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from motley_bases.prune_manifest import MANIFEST_FILE, PruneManifest, read_prune_manifest


@dataclass(frozen=True, eq=False, slots=True)
class PrunedCopy:
    """A base directory made of another base's.

    Semantics: `fingerprint` is of its own weights, `original_fingerprint` of those it was made of; `facts` is what a
    manifest tells of it, as JSON.
    """

    directory: Path
    fingerprint: str
    original_fingerprint: str
    facts: Mapping[str, object]

    def manifest(self) -> PruneManifest | None:
        """Return which heads and channels it keeps; None if it has all of them, and single weights are zero.

        Raises: UnreadableBaseError with reason PRUNE_MANIFEST.
        """
        return read_prune_manifest(self.directory) if (self.directory / MANIFEST_FILE).is_file() else None
