"""The library put together: the adapters of a server, from its start to its end.

Two steps, because the engine stands between them: a shelf is there before anything is served, with what the
configuration names on it; the library lends from it. Runs on the main thread, and then on its event loop.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from motley_adapters.cache import AdapterCache
from motley_adapters.directories import AdapterDirectories
from motley_adapters.fusion import overlapping_channels
from motley_bases.base import Base

from motley_server.config import ServerConfig
from motley_server.engine.api import EngineFront
from motley_server.library.control import AdapterControl
from motley_server.library.holds import Holds, key_of
from motley_server.library.housekeeping import Housekeeping
from motley_server.library.intake import AdapterIntake
from motley_server.library.named import publish_directory
from motley_server.library.observer import LibraryObserver
from motley_server.library.publishing import AdapterRegistry, Publishing
from motley_server.library.sets import AdapterSets
from motley_server.library.uploads import UploadDesk
from motley_server.library.whereabouts import Whereabouts
from motley_server.registry.adapters import Adapters
from motley_server.registry.bundles import BundleStore
from motley_server.registry.collection import Collector
from motley_server.registry.database import Database
from motley_server.registry.records import AdapterVersion
from motley_server.registry.uploads import Uploads

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where adapters are kept, where they are read from, and those that are in memory."""

    registry: AdapterRegistry
    source: AdapterDirectories
    cache: AdapterCache


def open_shelf(config: ServerConfig, database: Database, base: Base) -> Shelf:
    """Open the folder of adapters below the data directory.

    Raises: BundleStoreError (reason=DATA_DIR_IN_USE); OSError.
    """
    folder = config.data_dir / "adapters"
    registry = AdapterRegistry(database, Adapters(database), Uploads(database), BundleStore(folder))
    source = AdapterDirectories(base.spec, base_tensor=base.tensor, residuals=config.data_dir / "residuals")
    return Shelf(registry, source, AdapterCache(config.engine.adapter_cache_bytes, source))


def put_named(shelf: Shelf, name: str, directory: Path) -> None:
    """Put a directory that the configuration names on the shelf; see `publish_directory`."""
    spec = publish_directory(name, directory, shelf.registry, shelf.source, shelf.cache).spec
    log.info("adapter %s, %s, %d bytes, %s, trained on %s", name, spec.kind, spec.nbytes, spec.digest, spec.trained_on)


class Library:
    """Lend adapters to requests, and have publishers bring and change them."""

    def __init__(self, shelf: Shelf, engine: EngineFront, observer: LibraryObserver, *, demands_base: bool) -> None:
        registry = shelf.registry
        self.registry = registry
        self.cache = shelf.cache
        self.intake = AdapterIntake(shelf.source, shelf.cache, registry.store, demands_base=demands_base)
        holds = Holds()
        self.sets = AdapterSets(registry.database, registry.adapters, holds, self.intake, overlapping_channels)
        self.desk = UploadDesk(registry, Publishing(registry, self.intake, holds), observer)
        collector = Collector(registry.store, registry.adapters, registry.uploads, registry.database.now)
        self.housekeeping = Housekeeping(registry, collector, holds, self.desk, self.intake, engine.forget, observer)
        self.control = AdapterControl(registry, holds, self.intake, engine, self.housekeeping.hurry)
        self._holds = holds
        self._engine = engine

    async def start(self, collect_seconds: float) -> None:
        """Put on the device what is pinned, and begin to collect what is unwanted."""
        await self.control.restore_pins()
        self.housekeeping.start(collect_seconds)

    async def stop(self) -> None:
        """Let what is being finished end, and take nothing more in."""
        await self.housekeeping.stop()
        await self.desk.stop()
        await asyncio.to_thread(self.intake.close)

    def whereabouts(self, version: AdapterVersion) -> Whereabouts:
        """Return what is true of a version on this server just now."""
        return Whereabouts(
            is_deleting=self._holds.is_deleting(key_of(version)),
            is_in_memory=self.cache.is_in_memory(version.digest),
            is_on_device=self._engine.is_on_device(version.digest),
        )
