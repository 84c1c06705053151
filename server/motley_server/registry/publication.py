"""Publication: what becomes of an upload, in steps between which the process may stop.

Account and bytes are kept in two places, a database and a folder. They are changed in an order in which bytes without
an account can be there, for the next collection, and never a version without its bytes. Methods block: they run on the
database's threads. Of one upload, one stream at a time may call them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from motley_server.registry.adapters import Adapters, Guard
from motley_server.registry.bundle_files import BundleFile, checked_files
from motley_server.registry.bundles import BundleStore
from motley_server.registry.records import AdapterVersion, NewVersion, Quota
from motley_server.registry.uploads import Uploads, store_id


class Publication:
    """Take uploads from their beginning to a version, or to nothing. Each step may be repeated after a crash."""

    def __init__(self, store: BundleStore, adapters: Adapters, uploads: Uploads) -> None:
        self._store = store
        self._adapters = adapters
        self._uploads = uploads

    def begin(
        self,
        owner: str,
        upload_id: str,
        name: str,
        files: Iterable[BundleFile],
        quota: Quota,
        header: str = "",
        aliases: Sequence[str] = (),
    ) -> None:
        """Begin an upload for an adapter; one that was begun with the same header and files goes on as it is.

        Raises: what `Uploads.begin` and `BundleStore.begin` do.
        """
        wanted = checked_files(files)
        id = store_id(owner, upload_id)
        size_bytes = sum(file.size_bytes for file in wanted)
        if self._uploads.begin(owner, upload_id, name, size_bytes, quota, header, aliases):
            self._store.abort(id)  # what an earlier one of that id, off the record by now, may have left
        self._store.begin(id, wanted)

    def publish(
        self,
        owner: str,
        upload_id: str,
        name: str,
        content: NewVersion,
        aliases: Sequence[str] = (),
        *,
        quota: Quota,
        request_id: str = "",
        scope: str = "",
        guard: Guard | None = None,
    ) -> AdapterVersion:
        """Make a version of an upload that is complete; `content` is what its validation found.

        Semantics: `guard` is asked in the moment in which it becomes one, and can refuse it; see `Adapters.publish`.
        Raises: what `BundleStore.commit` and `Adapters.publish` do; after those of the latter, the upload is as it was.
        """
        id = store_id(owner, upload_id)
        bundle = self._store.commit(id)
        if bundle != content.bundle:
            raise ValueError(f"upload {id} is bundle {bundle}, and {content.bundle} was validated")
        version = self._adapters.publish(
            owner, name, content, aliases,
            quota=quota, upload_id=upload_id, request_id=request_id, scope=scope, guard=guard,
        )  # fmt: skip
        self._store.abort(id)
        return version

    def abort(self, owner: str, upload_id: str) -> bool:
        """Give an upload up, and tell whether it was on record."""
        # The account goes last: who was cut off and comes again finds it, and what it stands for goes then.
        self._store.abort(store_id(owner, upload_id))
        return self._uploads.forget(owner, upload_id)
