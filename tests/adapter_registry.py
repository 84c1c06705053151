"""Adapters for a test of the registry: contents that differ by a letter, and calls that are made together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Barrier, Thread

from motley_server.errors import MotleyError
from motley_server.registry.adapters import Adapters
from motley_server.registry.bundle_files import BundleFile, bundle_digest
from motley_server.registry.names import parse_reference
from motley_server.registry.records import AdapterVersion, NewVersion, Quota
from sqlalchemy import Engine, event

NO_LIMITS = Quota()


def content_of(
    letter: str = "a", *, size_bytes: int = 100, kind: str = "lora", labels: Mapping[str, str] | None = None
) -> NewVersion:
    """Return a version's content, as different from others as its letter is from theirs: one of 0-9 and a-f."""
    files = (
        BundleFile("adapter_config.json", 10, letter * 64),
        BundleFile("adapter_model.safetensors", size_bytes - 10, letter * 64),
    )
    return NewVersion(
        digest=f"sha256:{letter * 64}",
        kind=kind,
        trained_on="undeclared",
        serves_on=f"sha256:{'b' * 64}",
        ranks={"model.layers.0.mlp.down_proj": 4, 'model."quoted".\N{SNOWMAN}': 1},
        size_bytes=size_bytes,
        device_bytes=size_bytes * 2,
        bundle=bundle_digest(files),
        files=files,
        labels=labels or {},
        created_by="0123456789abcdef",
    )


def publish(adapters: Adapters, owner: str, name: str, letter: str = "a", *aliases: str) -> AdapterVersion:
    """Publish without a quota, under the default alias unless others are named."""
    return adapters.publish(owner, name, content_of(letter), aliases or ("default",), quota=NO_LIMITS)


def as_listed(version: AdapterVersion) -> AdapterVersion:
    """Return a version as pages have it."""
    return replace(version, ranks={}, files=())


def meaning(adapters: Adapters, tenant_id: str, text: str) -> int | None:
    """Return the number of the version that a text means to a tenant."""
    found = adapters.resolve(tenant_id, parse_reference(text))
    return None if found is None else found.version


def at_once(*calls: Callable[[], object]) -> list[object]:
    """Call each on a thread of its own, all together, and return what each returned or was refused with."""
    barrier = Barrier(len(calls))
    results: list[object] = [None] * len(calls)

    def call(number: int) -> None:
        barrier.wait()
        try:
            results[number] = calls[number]()
        except MotleyError as error:
            results[number] = error

    threads = [Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@contextmanager
def statements() -> Iterator[list[str]]:
    """Collect the text of every statement that any database is sent."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)
