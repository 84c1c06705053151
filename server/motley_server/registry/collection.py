"""Collection: removing the bytes that nobody needs any more, while others publish, delete and read.

It brings together who may need a bundle: versions or datasets, uploads on record, and whoever holds one in memory just
now. It knows no requests and no adapters in memory. A collection blocks: it runs on the database's threads.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from datetime import datetime
from threading import Lock
from typing import Protocol

from motley_server.registry.bundles import BundleStore
from motley_server.registry.uploads import UPLOAD_LIFETIME


class Keepers(Protocol):
    """What needs bundles for as long as it is there: `Adapters` or `Datasets`."""

    def live_bundles(self) -> set[str]:
        """Return the bundles that are needed."""


class UploadsOnRecord(Protocol):
    """The account of what is on its way: `Uploads` or `DatasetUploads`."""

    def forget_untouched(self, before: datetime, but: Set[str]) -> int:
        """Strike off uploads that were last heard of before a moment, but for some store ids, and return how many."""

    def store_ids(self) -> set[str]:
        """Return what the store calls the uploads on record."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed: bytes, and the digests of bundles that are in the store no more."""

    freed_bytes: int
    removed: frozenset[str]


class Collector:
    """Collect, one at a time.

    Semantics: a bundle goes in the second collection in a row that finds no keeper and no hold that needs it. Whoever
    looked a version up before it was deleted, and takes its hold only then, is thus in time if collections lie further
    apart than that.
    """

    def __init__(
        self, store: BundleStore, keepers: Keepers, uploads: UploadsOnRecord, clock: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._keepers = keepers
        self._uploads = uploads
        self._clock = clock
        self._turn = Lock()
        self._unwanted: frozenset[str] = frozenset()

    def collect(self, held_bundles: Set[str], active_uploads: Set[str]) -> Collected:
        """Let uploads expire that nobody streams, and remove what neither keepers, uploads nor holds need.

        Semantics: `active_uploads` are store ids. A bundle that was removed may have come back by the time this
        returns: ask the store before forgetting what was read from one.
        """
        with self._turn:
            self._uploads.forget_untouched(self._clock() - UPLOAD_LIFETIME, active_uploads)
            # In this order: an upload that becomes a version in between is in both.
            kept_uploads = self._uploads.store_ids() | active_uploads
            present = self._store.bundles()
            wanted = self._keepers.live_bundles() | held_bundles
            unwanted = frozenset(present - wanted)
            doomed = unwanted & self._unwanted
            freed_bytes = self._store.collect((present | wanted) - doomed, kept_uploads)
            removed = doomed - self._store.bundles()
            self._unwanted = unwanted - removed
            return Collected(freed_bytes, removed)
