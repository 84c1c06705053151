"""Control: what publishers do with versions that are there and may be in use: name, delete, pin and send them back.

Each action is the registry's, with what has to happen around it: a deletion waits for requests, a pin for the device. A
tenant acts on what it owns; whoever acts for `public` is the tenant `public` here. It knows no wire. Runs on the
event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from motley_adapters.errors import AdapterError

from motley_server.engine.api import EngineFront
from motley_server.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    MotleyError,
    NotFoundError,
    OutOfRangeError,
    UnavailableError,
)
from motley_server.library.files import find_files, read_part
from motley_server.library.holds import Holds, Revoke
from motley_server.library.publishing import AdapterRegistry
from motley_server.library.uploads import MAX_CHUNK_BYTES
from motley_server.registry.bundle_files import BundleFile
from motley_server.registry.names import AdapterReference
from motley_server.registry.ownership import adapter_not_found
from motley_server.registry.records import AdapterVersion, Alias

if TYPE_CHECKING:  # torch comes with it
    from motley_server.library.intake import AdapterIntake

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileChunk:
    """Bytes of a stored file, from an offset on."""

    file: str
    offset: int
    data: bytes


DownloadPart = AdapterVersion | BundleFile | FileChunk


class AdapterControl:
    """Change and read versions that may be in use."""

    def __init__(
        self,
        registry: AdapterRegistry,
        holds: Holds,
        intake: AdapterIntake,
        engine: EngineFront,
        on_deleted: Callable[[], None],
    ) -> None:
        """Make a control; `on_deleted` is called when a version has gone."""
        self._run = registry.database.run
        self._adapters = registry.adapters
        self._store = registry.store
        self._holds = holds
        self._intake = intake
        self._engine = engine
        self._on_deleted = on_deleted

    async def set_alias(
        self, tenant_id: str, owner: str, name: str, alias: str, version: int, etag: str | None, once: Mapping[str, str]
    ) -> Alias:
        """Point an alias at a version; see `Adapters.set_alias`.

        Raises: FailedPreconditionError (reason=VERSION_NOT_READY).
        """
        if owner == tenant_id:
            self._check_stays(owner, name, version, "version")
        return await self._run(
            partial(self._adapters.set_alias, tenant_id, owner, name, alias, version, etag=etag, **once)
        )

    async def rollback_alias(
        self, tenant_id: str, owner: str, name: str, alias: str, etag: str | None, once: Mapping[str, str]
    ) -> Alias:
        """Point an alias where it pointed before; see `Adapters.rollback_alias`.

        Raises: FailedPreconditionError (reason=VERSION_NOT_READY).
        """
        if owner == tenant_id:
            record = await self._run(self._adapters.get, tenant_id, owner, name)
            for known in record.aliases:
                if known.alias == alias:
                    self._check_stays(owner, name, known.previous_version, "alias")
        return await self._run(partial(self._adapters.rollback_alias, tenant_id, owner, name, alias, etag=etag, **once))

    async def digest_of(self, owner: str, name: str, version: int) -> str:
        """Return the digest of a version for the audit, or nothing if it cannot be told: what was done stays done."""
        if version < 1:
            return ""
        try:
            found = await self._run(self._adapters.resolve, owner, AdapterReference(owner, name, version=version))
        except UnavailableError as error:
            log.warning("the audit lacks the digest of %s/%s@%d: %s", owner, name, version, error.message)
            return ""
        return "" if found is None else found.digest

    async def delete(
        self,
        tenant_id: str,
        owner: str,
        name: str,
        version: int,
        *,
        timeout_seconds: float,
        force: bool,
        once: Mapping[str, str],
    ) -> AdapterVersion:
        """Delete a version once no request holds it; no new one can name it meanwhile.

        Raises: NotFoundError; FailedPreconditionError (reason=VERSION_HAS_ALIAS); and what `Holds.emptied` does.
        """
        delete = partial(self._adapters.delete_version, tenant_id, owner, name, version, **once)
        try:
            found = await self._run(self._adapters.check_deletable, tenant_id, owner, name, version)
        except NotFoundError:
            return await self._run(delete)  # the repeat of a deletion that was done, or the same error
        check = partial(self._run, self._adapters.check_deletable, tenant_id, owner, name, version)
        async with self._holds.emptied(found, timeout_seconds, check, force=force):
            deleted = await _to_its_end(self._delete(delete))
        self._on_deleted()
        return deleted

    async def pin(self, tenant_id: str, reference: AdapterReference) -> AdapterVersion:
        """Load a version of a tenant's own onto the device and keep it there, over restarts too.

        Raises: NotFoundError; and what `AdapterIntake.introduce` and `EngineFront.keep` do.
        """
        version = await self._run(self._adapters.own, tenant_id, reference)
        try:
            await self._keep(version)
            return await _to_its_end(self._run(self._pinning(tenant_id, version, is_pinned=True)))
        except BaseException:
            await _to_its_end(self._let_go(version.digest))
            raise

    async def unpin(self, tenant_id: str, reference: AdapterReference) -> AdapterVersion:
        """Let a version be evicted again.

        Raises: NotFoundError.
        """
        version = await self._run(self._adapters.own, tenant_id, reference)
        return await _to_its_end(self._unpin(tenant_id, version))

    async def restore_pins(self) -> None:
        """Keep on the device what was pinned before the server started, as far as it fits now."""
        for version in await self._run(self._adapters.pinned):
            try:
                await self._keep(version)
            except (MotleyError, AdapterError) as error:
                log.warning(
                    "adapter %s/%s@%d is pinned, and is not kept on the device: %s",
                    version.owner, version.name, version.version, error.message,
                )  # fmt: skip

    async def download(
        self, tenant_id: str, reference: AdapterReference, offsets: Mapping[str, int]
    ) -> AsyncGenerator[DownloadPart, None]:
        """Yield a version of a tenant's own, and then each of its files followed by the file's bytes.

        Semantics: `offsets` are where to go on, by file; the version stays while it is sent.
        Raises: NotFoundError; InvalidArgumentError (reason=FILE_NOT_IN_ADAPTER); OutOfRangeError (reason=PAST_END);
        FailedPreconditionError (reason=ADAPTER_FILES_MISSING); AbortedError (reason=ADAPTER_DELETED).
        """
        version = await self._run(self._adapters.own, tenant_id, reference)
        lost: list[MotleyError] = []
        with ExitStack() as held:

            def give_up(error: MotleyError) -> None:  # at once: whoever reads may have stopped to
                lost.append(error)
                held.close()

            self._hold(version, held, give_up)
            directory = find_files(self._store, version)
            _check_offsets(version, offsets)
            yield version
            for file in version.files:
                yield file
                position = offsets.get(file.name, 0)
                while position < file.size_bytes:
                    if lost:
                        raise lost[0]
                    data = await asyncio.to_thread(read_part, directory / file.name, position, MAX_CHUNK_BYTES)
                    yield FileChunk(file.name, position, data)
                    position += len(data)

    async def _delete(self, delete: Callable[[], AdapterVersion]) -> AdapterVersion:
        deleted = await self._run(delete)
        if deleted.is_pinned:
            await self._let_go(deleted.digest)
        return deleted

    async def _unpin(self, tenant_id: str, version: AdapterVersion) -> AdapterVersion:
        unpinned = await self._run(self._pinning(tenant_id, version, is_pinned=False))
        await self._let_go(version.digest)
        return unpinned

    async def _keep(self, version: AdapterVersion) -> None:
        lost: list[MotleyError] = []
        with ExitStack() as held:
            keeping = asyncio.get_running_loop().create_task(self._bring(version))
            held.callback(keeping.cancel)

            def give_up(error: MotleyError) -> None:
                lost.append(error)
                held.close()

            self._hold(version, held, give_up)
            try:
                await keeping
            except asyncio.CancelledError:
                if lost:
                    raise lost[0] from None
                raise

    async def _bring(self, version: AdapterVersion) -> None:
        await self._intake.introduce(version)
        await self._engine.keep(version.digest)

    async def _let_go(self, digest: str) -> None:
        """Let an adapter be evicted, unless it is another pinned version too."""
        if all(version.digest != digest for version in await self._run(self._adapters.pinned)):
            self._engine.unkeep(digest)

    def _hold(self, version: AdapterVersion, held: ExitStack, give_up: Revoke) -> None:
        hold = self._holds.hold(version)
        if hold is None:
            raise adapter_not_found(f"{version.owner}/{version.name}", "name")
        hold.on_revoked = give_up
        held.callback(hold.release)

    def _check_stays(self, owner: str, name: str, version: int, field: str) -> None:
        if self._holds.is_deleting((owner, name, version)):
            message = f"version {version} of adapter {name!r} is being deleted"
            raise FailedPreconditionError(message, reason="VERSION_NOT_READY", field=field)

    def _pinning(self, tenant_id: str, version: AdapterVersion, *, is_pinned: bool) -> partial[AdapterVersion]:
        key = (version.owner, version.name, version.version)
        return partial(self._adapters.set_pinned, tenant_id, *key, is_pinned=is_pinned)


async def _to_its_end(action: Coroutine[Any, Any, T]) -> T:
    """Await what must not stop halfway, though whoever asked for it may be gone."""
    return await asyncio.shield(asyncio.get_running_loop().create_task(action))


def _check_offsets(version: AdapterVersion, offsets: Mapping[str, int]) -> None:
    sizes = {file.name: file.size_bytes for file in version.files}
    for name, offset in offsets.items():
        if name not in sizes:
            message = f"the adapter has no file {name[:80]!r}; its files are {', '.join(sizes)}"
            raise InvalidArgumentError(message, reason="FILE_NOT_IN_ADAPTER", field="offsets")
        if not 0 <= offset <= sizes[name]:
            message = f"{name} has {sizes[name]} bytes, and offset {offset} is not among them"
            raise OutOfRangeError(message, reason="PAST_END", field=f"offsets[{name}]")
