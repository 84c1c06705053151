"""Bundles in any order of calls and restarts: the store has what a plain account of the calls says it has."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from bundle_uploads import Adapter, bundles_in
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from in_memory import MEMORY
from motley_server.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError, OutOfRangeError
from motley_server.registry.bundles import BundleStore

ADAPTERS = [Adapter("a", 9), Adapter("b", 9)]
IDS = st.sampled_from(["u", "v", "w"])
WHICH = st.sampled_from(ADAPTERS)
NAMES = st.sampled_from(sorted(ADAPTERS[0].contents))


class Account:
    """What was said of one upload: the adapter, and how far each of its files has come."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.written = dict.fromkeys(adapter.contents, 0)
        self.synced = dict(self.written)
        self.is_committed = False

    @property
    def is_complete(self) -> bool:
        return all(size == len(self.adapter.contents[name]) for name, size in self.written.items())


class Bundles(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY))
        self.store = BundleStore(self.root)
        self.uploads: dict[str, Account] = {}
        self.bundles: set[str] = set()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    @rule(upload_id=IDS, adapter=WHICH)
    def begin(self, upload_id: str, adapter: Adapter) -> None:
        try:
            self.store.begin(upload_id, adapter.files)
        except AlreadyExistsError:
            assert self.uploads[upload_id].adapter != adapter
        else:
            assert self.uploads.setdefault(upload_id, Account(adapter)).adapter == adapter

    @rule(upload_id=IDS, name=NAMES, offset=st.integers(0, 14), length=st.integers(0, 14))
    def append(self, upload_id: str, name: str, offset: int, length: int) -> None:
        account = self.uploads.get(upload_id)
        data = b"" if account is None else account.adapter.contents[name][offset : offset + length]
        try:
            written = self.store.append(upload_id, name, offset, data)
        except NotFoundError:
            assert account is None
        except OutOfRangeError:
            assert account is not None
            assert offset > account.written[name]
        else:
            assert account is not None
            account.written[name] = max(account.written[name], offset + len(data))
            assert written == account.written[name]

    @rule(upload_id=IDS)
    def send_the_rest_and_sync(self, upload_id: str) -> None:
        if (account := self.uploads.get(upload_id)) is None:
            return
        for name, data in account.adapter.contents.items():
            self.store.append(upload_id, name, account.written[name], data[account.written[name] :])
            account.written[name] = account.synced[name] = len(data)
        self.store.sync(upload_id)

    @rule(upload_id=IDS)
    def commit(self, upload_id: str) -> None:
        account = self.uploads.get(upload_id)
        try:
            digest = self.store.commit(upload_id)
        except NotFoundError:
            assert account is None
        except FailedPreconditionError:
            assert account is not None
            assert not account.is_complete
        else:
            assert account is not None
            assert account.is_complete
            assert digest == account.adapter.digest
            account.synced, account.is_committed = dict(account.written), True
            self.bundles.add(digest)

    @rule(upload_id=IDS, adapter=WHICH)
    def upload_to_the_end(self, upload_id: str, adapter: Adapter) -> None:
        self.begin(upload_id, adapter)
        self.send_the_rest_and_sync(upload_id)
        self.commit(upload_id)

    @rule(upload_id=IDS)
    def abort(self, upload_id: str) -> None:
        self.store.abort(upload_id)
        self.uploads.pop(upload_id, None)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = BundleStore(self.root)
        for account in self.uploads.values():
            account.synced = dict(account.written)

    @rule(adapters=st.sets(WHICH), uploads=st.sets(IDS))
    def restart_and_collect(self, adapters: set[Adapter], uploads: set[str]) -> None:
        self.restart()
        self.store.collect({adapter.digest for adapter in adapters}, uploads)
        self.uploads = {name: account for name, account in self.uploads.items() if name in uploads}
        self.bundles &= {adapter.digest for adapter in adapters} | {
            account.adapter.digest for account in self.uploads.values()
        }
        assert {path.name for path in (self.root / "staging").iterdir()} <= uploads

    @invariant()
    def has_what_was_committed_and_no_more(self) -> None:
        assert bundles_in(self.root) == self.bundles
        assert list((self.root / "trash").iterdir()) == []
        for upload_id, account in self.uploads.items():
            assert dict(self.store.committed(upload_id)) == account.synced


Bundles.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
TestBundles = Bundles.TestCase
