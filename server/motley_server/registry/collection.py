"""Collection: removing the bytes that nobody needs any more, while others publish, delete and read.

It brings together who may need a bundle: versions, uploads on record, and whoever holds one in memory just now. It
knows no requests and no adapters in memory. A collection blocks: it runs on the database's threads.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from datetime import datetime
from threading import Lock

from motley_server.registry.adapters import Adapters
from motley_server.registry.bundles import BundleStore
from motley_server.registry.uploads import UPLOAD_LIFETIME, Uploads


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed: bytes, and the digests of bundles that are in the store no more."""

    freed_bytes: int
    removed: frozenset[str]


class Collector:
    """Collect, one at a time.

    Semantics: a bundle goes in the second collection in a row that finds no version and no hold that needs it. Whoever
    looked a version up before it was deleted, and takes its hold only then, is thus in time if collections lie further
    apart than that.
    """

    def __init__(self, store: BundleStore, adapters: Adapters, uploads: Uploads, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._adapters = adapters
        self._uploads = uploads
        self._clock = clock
        self._turn = Lock()
        self._unwanted: frozenset[str] = frozenset()

    def collect(self, held_bundles: Set[str], active_uploads: Set[str]) -> Collected:
        """Let uploads expire that nobody streams, and remove what neither versions, uploads nor holds need.

        Semantics: `active_uploads` are store ids. A bundle that was removed may have come back by the time this
        returns: ask the store before forgetting what was read from one.
        """
        with self._turn:
            self._uploads.forget_untouched(self._clock() - UPLOAD_LIFETIME, active_uploads)
            # In this order: an upload that becomes a version in between is in both.
            kept_uploads = self._uploads.store_ids() | active_uploads
            present = self._store.bundles()
            wanted = self._adapters.live_bundles() | held_bundles
            unwanted = frozenset(present - wanted)
            doomed = unwanted & self._unwanted
            freed_bytes = self._store.collect((present | wanted) - doomed, kept_uploads)
            removed = doomed - self._store.bundles()
            self._unwanted = unwanted - removed
            return Collected(freed_bytes, removed)
