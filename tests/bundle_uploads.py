"""Uploads for tests of the store of bundles, and what must hold of a store whatever happened to it.

Run as a program, it uploads to a store without end and says what was acknowledged, until it is killed.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from motley_server.registry.bundle_files import BundleFile, bundle_digest
from motley_server.registry.bundles import BundleStore

CHUNK = 7


@dataclass(frozen=True)
class Adapter:
    """Files by name; two with one mark are the same bundle."""

    mark: str
    size_bytes: int = 20

    @property
    def contents(self) -> dict[str, bytes]:
        weights = (self.mark.encode() * self.size_bytes)[: self.size_bytes]
        return {"adapter_config.json": f'{{"mark": "{self.mark}"}}'.encode(), "adapter_model.safetensors": weights}

    @property
    def files(self) -> list[BundleFile]:
        return [
            BundleFile(name, len(data), hashlib.sha256(data).hexdigest())
            for name, data in reversed(self.contents.items())
        ]

    @property
    def digest(self) -> str:
        return bundle_digest(self.files)


def send(store: BundleStore, upload_id: str, adapter: Adapter, chunk: int = CHUNK) -> None:
    """Send what is still missing of an upload, each chunk synced."""
    for name, done in store.committed(upload_id).items():
        data = adapter.contents[name]
        for offset in range(done, len(data), chunk):
            store.append(upload_id, name, offset, data[offset : offset + chunk])
            store.sync(upload_id)


def upload(store: BundleStore, upload_id: str, adapter: Adapter, chunk: int = CHUNK) -> str:
    store.begin(upload_id, adapter.files)
    send(store, upload_id, adapter, chunk)
    return store.commit(upload_id)


def bundles_in(root: Path) -> set[str]:
    """Return the digests of what lies in the store, each of them checked against its bytes."""
    found = set()
    for folder in (root / "bundles").iterdir():
        data = {path.name: path.read_bytes() for path in folder.iterdir()}
        files = [BundleFile(name, len(part), hashlib.sha256(part).hexdigest()) for name, part in data.items()]
        assert bundle_digest(files) == f"sha256:{folder.name}"
        found.add(f"sha256:{folder.name}")
    return found


def paths_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


EMPTY = ["bundles", "lock", "staging", "trash"]


def main(root: Path) -> None:
    store = BundleStore(root)
    kept: set[str] = set()
    for number in count():
        upload_id, adapter = f"up-{number}", Adapter(f"{root.name}-{number}-", 300_000)
        print("begins", upload_id, adapter.digest, flush=True)
        print("has", upload(store, upload_id, adapter, chunk=65_536), flush=True)
        kept.add(adapter.digest)
        if number % 3 == 2:
            print("removes", adapter.digest, flush=True)
            kept.remove(adapter.digest)
            store.abort(upload_id)
            for _ in range(2):  # the first spares what came since the one before it
                store.collect(kept, set())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
