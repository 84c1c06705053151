"""The whole registry in one folder, as a server has it: a database, a store of bundles, and what goes between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from adapter_registry import NO_LIMITS
from bundle_uploads import Adapter, send
from motley_server.registry.adapters import Adapters
from motley_server.registry.bundle_files import checked_files
from motley_server.registry.bundles import BundleStore
from motley_server.registry.collection import Collected, Collector
from motley_server.registry.database import Database
from motley_server.registry.disk import Disk
from motley_server.registry.publication import Publication
from motley_server.registry.records import AdapterVersion, NewVersion
from motley_server.registry.tenants import Tenants
from motley_server.registry.uploads import Uploads, store_id

STORE = "adapters"


def found_in(adapter: Adapter) -> NewVersion:
    """Return what a validation that computes nothing would find in an adapter."""
    return NewVersion(
        digest=adapter.digest,
        kind="lora",
        trained_on="undeclared",
        serves_on=f"sha256:{'b' * 64}",
        ranks={"model.layers.0.mlp.down_proj": 4},
        size_bytes=sum(file.size_bytes for file in adapter.files),
        device_bytes=64,
        bundle=adapter.digest,
        files=checked_files(adapter.files),
    )


@dataclass(frozen=True, slots=True)
class House:
    """Everything of a registry, open."""

    root: Path
    store: BundleStore
    tenants: Tenants
    adapters: Adapters
    uploads: Uploads
    publication: Publication
    collector: Collector

    @classmethod
    def of(cls, root: Path, database: Database, clock: Callable[[], datetime], disk: Disk | None = None) -> House:
        """Open the store of a root beside an open database."""
        store, adapters, uploads = BundleStore(root / STORE, disk), Adapters(database), Uploads(database)
        publication = Publication(store, adapters, uploads)
        collector = Collector(store, adapters, uploads, clock)
        return cls(root, store, Tenants(database), adapters, uploads, publication, collector)

    def begin(self, owner: str, upload_id: str, name: str, adapter: Adapter) -> None:
        self.publication.begin(owner, upload_id, name, adapter.files, NO_LIMITS)

    def send(self, owner: str, upload_id: str, adapter: Adapter, chunk: int = 7) -> None:
        send(self.store, store_id(owner, upload_id), adapter, chunk)

    def publish(
        self, owner: str, upload_id: str, name: str, adapter: Adapter, aliases: Sequence[str] = ("default",)
    ) -> AdapterVersion:
        """Make a version of an upload; its id makes the publication happen once."""
        return self.publication.publish(
            owner, upload_id, name, found_in(adapter), aliases, quota=NO_LIMITS, request_id=upload_id, scope=owner
        )

    def upload(
        self,
        owner: str,
        upload_id: str,
        name: str,
        adapter: Adapter,
        aliases: Sequence[str] = ("default",),
        chunk: int = 7,
    ) -> AdapterVersion:
        """Upload from where it stopped, or find that it was published before, as a stream that begins does."""
        bundle = adapter.digest
        earlier = self.adapters.earlier_publication(owner, name, bundle, {}, aliases, request_id=upload_id, scope=owner)
        if earlier is not None:
            return earlier
        self.begin(owner, upload_id, name, adapter)
        self.send(owner, upload_id, adapter, chunk)
        return self.publish(owner, upload_id, name, adapter, aliases)

    def collect(self, held: frozenset[str] = frozenset(), active: frozenset[str] = frozenset()) -> Collected:
        return self.collector.collect(held, active)
