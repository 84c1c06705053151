"""Adapters that the configuration names: directories of this machine that become versions of the tenant `local`.

Their files are copied into the store, so that what is served stays what it was when it was checked. A directory that
is the adapter's newest version already changes nothing, and moves no alias. It runs before anything is served, and
blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from motley_adapters.cache import AdapterCache
from motley_adapters.directories import AdapterDirectories
from motley_adapters.spec import Adapter

from motley_server.library.files import read_part
from motley_server.library.publishing import AdapterRegistry, content_of
from motley_server.library.uploads import MAX_CHUNK_BYTES
from motley_server.registry.bundle_files import FILE_NAMES, BundleFile, bundle_digest
from motley_server.registry.names import DEFAULT_ALIAS, LOCAL_TENANT
from motley_server.registry.publication import Publication
from motley_server.registry.records import Quota
from motley_server.registry.uploads import store_id


def publish_directory(
    name: str, directory: Path, registry: AdapterRegistry, source: AdapterDirectories, cache: AdapterCache
) -> Adapter:
    """Make a directory the newest version of an adapter and what its default alias points at, and put it in memory.

    Raises: AdapterFormatError, AdapterMismatchError; MotleyError for what the registry refuses; OSError.
    """
    spec = source.read(directory).spec  # not mapped: whoever owns the directory may write into it meanwhile
    source.forget(directory)
    files = tuple(_described(directory / file) for file in FILE_NAMES if (directory / file).exists())
    bundle, newest = bundle_digest(files), registry.adapters.newest(LOCAL_TENANT, name)
    is_newest = newest is not None and (newest.bundle, newest.labels) == (bundle, {})
    if not is_newest or bundle not in registry.store.bundles():
        publication = Publication(registry.store, registry.adapters, registry.uploads)
        upload_id = hashlib.sha256(f"{name} {bundle}".encode()).hexdigest()[:40]
        publication.begin(LOCAL_TENANT, upload_id, name, files, Quota())
        for file in files:
            for offset, data in _chunks(directory / file.name):
                registry.store.append(store_id(LOCAL_TENANT, upload_id), file.name, offset, data)
        aliases = () if is_newest else (DEFAULT_ALIAS,)
        content = content_of(spec, files)
        publication.publish(LOCAL_TENANT, upload_id, name, content, aliases, quota=Quota())
    adapter = source.read(registry.store.directory(bundle))
    cache.put(adapter)
    return adapter


def _described(path: Path) -> BundleFile:
    hasher, size_bytes = hashlib.sha256(), 0
    for _, data in _chunks(path):
        hasher.update(data)
        size_bytes += len(data)
    return BundleFile(path.name, size_bytes, hasher.hexdigest())


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while data := read_part(path, offset, MAX_CHUNK_BYTES):
        yield offset, data
        offset += len(data)
