"""A library over a real registry and a real store, with adapters that do not exist, and leases that are counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from motley_adapters.errors import AdapterFormatError
from motley_server.library.control import AdapterControl
from motley_server.library.holds import Holds, key_of
from motley_server.library.housekeeping import Housekeeping
from motley_server.library.observer import LibraryObserver
from motley_server.library.publishing import AdapterRegistry, Publishing, content_of
from motley_server.library.sets import AdapterSets
from motley_server.library.uploads import UploadDesk
from motley_server.library.whereabouts import Whereabouts
from motley_server.registry.adapters import Adapters
from motley_server.registry.bundle_files import BundleFile
from motley_server.registry.bundles import BundleStore
from motley_server.registry.collection import Collector
from motley_server.registry.database import Database, utc_now
from motley_server.registry.keys import Keys
from motley_server.registry.records import AdapterVersion, Quota, Visibility
from motley_server.registry.tenants import Tenants
from motley_server.registry.uploads import Uploads
from motley_server.rpc.adapters import AdapterLibrary
from motley_server.rpc.identity import TenantQuotas
from motley_server.rpc.tenants import TenantRegistry
from scripted_engine import ScriptedEngine


class LeaseBook:
    """Count leases; giving one back twice is an error, as with the real cache."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.nbytes = 4096

    def acquire(self, digest: str) -> BookedLease:
        self.held.append(digest)
        return BookedLease(self, digest)


class BookedLease:
    """One lease of a LeaseBook."""

    def __init__(self, book: LeaseBook, digest: str) -> None:
        self._book, self._digest, self._is_released = book, digest, False

    def release(self) -> None:
        assert not self._is_released, "released twice"
        self._is_released = True
        self._book.held.remove(self._digest)


def digest_of(letter: str) -> str:
    """Return a digest that is easy to read."""
    return "sha256:" + letter * 64


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an adapter that does not exist."""

    digest: str
    kind: str = "lora"
    trained_on: str = "undeclared"
    serves_on: str = "undeclared"
    nbytes: int = 1000
    ranks: Mapping[str, int] = field(default_factory=lambda: {"q_proj": 8})
    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Looked:
    """What an inspection found."""

    spec: Facts
    outline: None = None


class PaperIntake:
    """Know adapters that do not exist: by digest those of the catalog, and any upload by its config file's text.

    An upload whose adapter_config.json is not one of the kinds' names is refused.
    """

    def __init__(self, leases: LeaseBook) -> None:
        self.facts: dict[str, Facts] = {}
        self.forgotten: list[str] = []
        self._leases = leases

    async def inspect(self, directory: Path) -> Looked:
        text = (directory / "adapter_config.json").read_text(errors="replace")
        if text not in ("lora", "s2ft", "goat", "loram"):
            raise AdapterFormatError("that is no adapter", reason="BAD_JSON", field="adapter_config.json")
        contents = b"".join(path.read_bytes() for path in sorted(directory.iterdir()))
        return Looked(Facts(f"sha256:{hashlib.sha256(contents).hexdigest()}", kind=text))

    def accept(self, version: AdapterVersion, inspection: Looked) -> None:
        self.facts[version.digest] = inspection.spec

    async def introduce(self, version: AdapterVersion) -> Facts:
        return self.facts[version.digest]

    def lease(self, digest: str) -> BookedLease:
        return self._leases.acquire(digest)

    def forget(self, bundle: str) -> frozenset[str]:
        self.forgotten.append(bundle)
        return frozenset()


class PaperLibrary:
    """The library over a real registry and a real store, with adapters that do not exist.

    It has `zeta` twice, `alpha`, `twin` with alpha's digest, one public, one of another tenant, three of S2FT.
    """

    def __init__(self, folder: Path, engine: ScriptedEngine, leases: LeaseBook, observer: LibraryObserver) -> None:
        self.folder = folder
        path = folder / "registry.sqlite3"
        if not path.exists():
            path.write_bytes(_written_registry())
        self.clock = MovedClock()
        self.tenancy = open_registry(path, self.clock)
        database = self.tenancy.database
        self.registry = AdapterRegistry(database, Adapters(database), Uploads(database), BundleStore(folder / "files"))
        self.intake = PaperIntake(leases)
        self.holds = Holds()
        intake: Any = self.intake
        self.sets = AdapterSets(database, self.registry.adapters, self.holds, intake, count_overlaps)
        self.desk = UploadDesk(self.registry, Publishing(self.registry, intake, self.holds), observer)
        collector = Collector(self.registry.store, self.registry.adapters, self.registry.uploads, database.now)
        self.housekeeping = Housekeeping(
            self.registry, collector, self.holds, self.desk, intake, engine.forget, observer
        )
        self.control = AdapterControl(self.registry, self.holds, intake, engine, self.housekeeping.hurry)
        self._engine = engine
        self.intake.facts.update((facts.digest, facts) for _, _, facts in catalog())

    @property
    def surface(self) -> AdapterLibrary:
        return AdapterLibrary(self.registry, self.desk, self.control, self.whereabouts)

    def whereabouts(self, version: AdapterVersion) -> Whereabouts:
        is_deleting = self.holds.is_deleting(key_of(version))
        return Whereabouts(is_deleting, is_on_device=self._engine.is_on_device(version.digest))

    async def stop(self) -> None:
        await self.desk.stop()
        self.registry.store.close()
        self.registry.database.close()


def catalog() -> list[tuple[str, str, Facts]]:
    """Return whose adapters a paper library has, in the order of their making."""
    return [
        *((owner, name, Facts(digest_of(letter))) for owner, name, letter in (
            ("local", "zeta", "1"), ("local", "zeta", "2"), ("local", "alpha", "9"), ("local", "twin", "9"),
            ("public", "shared", "5"), ("other", "secret", "6"),
        )),
        *(("local", f"many{index}", Facts(f"sha256:{index:064x}")) for index in range(9)),
        *(("local", name, Facts(digest_of(letter), "s2ft", channels={"down_proj": channels})) for name, letter, channels
          in (("columns", "a", (1, 2, 3)), ("rows", "b", (2, 3, 4)), ("apart", "c", (9,)))),
    ]  # fmt: skip


@cache
def _written_registry() -> bytes:
    """Return a registry's file with the catalog in it, written once: every commit waits for the disk."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "registry.sqlite3"
        tenancy = open_registry(path)
        tenancy.tenants.create("other")
        adapters = Adapters(tenancy.database)
        for owner, name, facts in catalog():
            files = (BundleFile("adapter_config.json", 4, hashlib.sha256(facts.digest.encode()).hexdigest()),)
            content: Any = facts
            adapters.publish(owner, name, content_of(content, files), ("default",), quota=Quota())
        adapters.share("public", "public", "shared", Visibility.PUBLIC)
        with tenancy.database.writing() as connection:  # the tests count tenants, and this one is only there to own
            connection.exec_driver_sql("delete from tenants where id = 'other'")
        tenancy.database.close()
        return path.read_bytes()


def count_overlaps(specs: Sequence[Facts]) -> dict[str, int]:
    """Count as the adapters' own function does, where every channel is of the same Linear and side."""
    held = {one.digest: set(one.channels["down_proj"]) for one in specs}
    return {
        digest: sum(any(channel in held[other] for other in held if other != digest) for channel in channels)
        for digest, channels in held.items()
    }


class MovedClock:
    """Tell the time, as much later as a test says."""

    def __init__(self) -> None:
        self.moved = timedelta(0)

    def __call__(self) -> datetime:
        return utc_now() + self.moved


def open_registry(path: Path, clock: Callable[[], datetime] = utc_now) -> TenantRegistry:
    """Open a registry in a file."""
    database = Database.open(f"sqlite:///{path}", clock=clock)
    tenants = Tenants(database)
    return TenantRegistry(database, tenants, Keys(database), TenantQuotas(database, tenants))
