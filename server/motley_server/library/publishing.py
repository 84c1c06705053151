"""Publishing: what an upload becomes, once all of it is there: checked, committed, numbered and named.

It also answers who asks for what was done before, so that an upload happens once. It knows no streams and no wire. Runs
on the event loop's thread; what blocks is run where the caller says.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from motley_adapters.errors import AdapterError

from motley_server.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    MotleyError,
    NotFoundError,
)
from motley_server.library.holds import Holds, key_of
from motley_server.registry.adapters import Adapters, Guard
from motley_server.registry.bundle_files import BundleFile, bundle_digest, checked_files
from motley_server.registry.bundles import BundleStore
from motley_server.registry.database import Database
from motley_server.registry.names import DEFAULT_ALIAS
from motley_server.registry.publication import Publication
from motley_server.registry.records import AdapterVersion, NewVersion, Quota
from motley_server.registry.uploads import Uploads, store_id

if TYPE_CHECKING:  # torch comes with them
    from motley_adapters.reader import Inspection
    from motley_adapters.spec import AdapterSpec

    from motley_server.library.intake import AdapterIntake

Run = Callable[..., Awaitable[Any]]
"""Calls a function with its arguments on a thread that may block."""


@dataclass(frozen=True, slots=True)
class AskedUpload:
    """What the header of an upload says, and for whom; an empty `kind` takes what the files say."""

    owner: str
    upload_id: str
    name: str
    kind: str = ""
    files: tuple[BundleFile, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = (DEFAULT_ALIAS,)

    @property
    def store_id(self) -> str:
        """Return what the upload is called where tenants' ids must not meet."""
        return store_id(self.owner, self.upload_id)

    @property
    def bundle(self) -> str:
        """Return the digest that its files have together."""
        return bundle_digest(self.files)

    @property
    def text(self) -> str:
        """Return the header in one spelling: the same for the same upload, and for no other."""
        files = [asdict(file) for file in checked_files(self.files)]
        return json.dumps([self.name, self.kind, files, dict(self.labels), self.aliases], sort_keys=True)


@dataclass(frozen=True, slots=True)
class Publisher:
    """By which key an upload is made, in which namespace its id counts, and what its owner may have.

    Semantics: `guard` can still refuse in the moment in which it becomes a version.
    """

    tenant_id: str
    key_id: str
    quota: Quota
    guard: Guard | None = None


@dataclass(frozen=True, slots=True)
class AdapterRegistry:
    """Where adapters are kept: their rows, those of uploads, and the bytes of both."""

    database: Database
    adapters: Adapters
    uploads: Uploads
    store: BundleStore


class Publishing:
    """Make versions of uploads."""

    def __init__(self, registry: AdapterRegistry, intake: AdapterIntake, holds: Holds) -> None:
        self._registry = registry
        self._store = registry.store
        self._publication = Publication(registry.store, registry.adapters, registry.uploads)
        self._intake = intake
        self._holds = holds

    async def find_or_repeat(self, asked: AskedUpload, publisher: Publisher) -> AdapterVersion | None:
        """Return what this upload was made before; or point its aliases at the newest version, if that is its bytes.

        Semantics: None where bytes have to come, also if this server does not have those of the newest version.
        Raises: AlreadyExistsError (reason=REQUEST_ID_REUSED); FailedPreconditionError (reason=VERSION_NOT_READY); and
        what `Adapters.publish` does.
        """
        run, adapters = self._registry.database.run, self._registry.adapters
        scope, labels = publisher.tenant_id, dict(asked.labels)
        same = (asked.owner, asked.name, asked.bundle, labels, asked.aliases)
        made = await run(partial(adapters.earlier_publication, *same, request_id=asked.upload_id, scope=scope))
        if made is not None:
            return made
        newest = await run(adapters.newest, asked.owner, asked.name)
        if newest is None or not self._is_what_is_asked(newest, asked):
            return None
        if self._holds.is_deleting(key_of(newest)):
            message = f"these bytes are version {newest.version} of adapter {asked.name!r}, which is being deleted"
            raise FailedPreconditionError(message, reason="VERSION_NOT_READY", field="files")
        content = NewVersion(**{name: getattr(newest, name) for name in NewVersion.__dataclass_fields__})
        return await run(
            adapters.publish, asked.owner, asked.name, content, asked.aliases,
            quota=publisher.quota, request_id=asked.upload_id, scope=scope, guard=publisher.guard,
        )  # fmt: skip

    def begin(self, asked: AskedUpload, publisher: Publisher) -> None:
        """Begin an upload, or go on with it; blocks. Raises: what `Publication.begin` does."""
        self._publication.begin(
            asked.owner, asked.upload_id, asked.name, asked.files, publisher.quota,
            aliases=asked.aliases, header=asked.text,
        )  # fmt: skip

    def abort(self, owner: str, upload_id: str) -> None:
        """Forget an upload and its bytes; blocks."""
        self._publication.abort(owner, upload_id)

    async def publish(self, asked: AskedUpload, publisher: Publisher, run: Run) -> AdapterVersion:
        """Check an upload and make it a version.

        Raises: FailedPreconditionError (reason=UPLOAD_INCOMPLETE or BASE_UNDECLARED); DataLossError;
        AdapterFormatError; AdapterMismatchError; InvalidArgumentError (reason=KIND_MISMATCH); and what
        `Adapters.publish` does. What is refused for what it is, is forgotten.
        """
        try:
            await run(self._store.verify, asked.store_id)
        except DataLossError:
            await run(self.abort, asked.owner, asked.upload_id)
            raise
        try:
            inspection = await self._intake.inspect(self._store.directory_of_upload(asked.store_id))
            _check_kind(asked, inspection)
        except (AdapterError, MotleyError):
            await run(self.abort, asked.owner, asked.upload_id)
            raise
        content = content_of(inspection.spec, asked.files, asked.labels, publisher.key_id)
        version: AdapterVersion = await run(
            self._publication.publish, asked.owner, asked.upload_id, asked.name, content, asked.aliases,
            quota=publisher.quota, request_id=asked.upload_id, scope=publisher.tenant_id, guard=publisher.guard,
        )  # fmt: skip
        self._intake.accept(version, inspection)
        return version

    def _is_what_is_asked(self, newest: AdapterVersion, asked: AskedUpload) -> bool:
        if newest.bundle != asked.bundle or newest.labels != asked.labels or asked.kind not in ("", newest.kind):
            return False
        try:
            self._store.directory(newest.bundle)
        except NotFoundError:
            return False
        return True


def content_of(
    spec: AdapterSpec, files: Iterable[BundleFile], labels: Mapping[str, str] | None = None, created_by: str = ""
) -> NewVersion:
    """Return what the registry keeps of an adapter that was checked and of its files."""
    kept = checked_files(files)
    return NewVersion(
        digest=spec.digest,
        kind=spec.kind,
        trained_on=spec.trained_on,
        serves_on=spec.serves_on,
        ranks=dict(spec.ranks),
        size_bytes=sum(file.size_bytes for file in kept),
        device_bytes=spec.nbytes,
        bundle=bundle_digest(kept),
        files=kept,
        labels=dict(labels or {}),
        created_by=created_by,
    )


def _check_kind(asked: AskedUpload, inspection: Inspection) -> None:
    if asked.kind not in ("", inspection.spec.kind):
        message = f"the header says {asked.kind}, and the files are {inspection.spec.kind}"
        raise InvalidArgumentError(message, reason="KIND_MISMATCH", field="kind")
