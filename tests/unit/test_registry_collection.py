"""Publication and collection together: what a stopped upload leaves, who keeps a bundle, and when its bytes go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
from adapter_registry import NO_LIMITS, meaning
from bundle_uploads import EMPTY, Adapter, bundles_in, paths_in
from motley_server.errors import (
    AlreadyExistsError,
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from motley_server.registry.bundle_files import BundleFile
from motley_server.registry.database import Database
from motley_server.registry.records import Quota
from motley_server.registry.uploads import store_id
from registry_house import STORE, House, found_in

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

ONE, TWO = Adapter("one"), Adapter("two")


@pytest.fixture
def house(tmp_path: Path, database: Database, clock: SteppedClock) -> Iterator[House]:
    house = House.of(tmp_path, database, clock)
    yield house
    house.store.close()


def reopened(house: House, database: Database, clock: SteppedClock) -> House:
    house.store.close()
    return House.of(house.root, database, clock)


def delete(house: House, name: str, version: int) -> None:
    house.adapters.set_alias("local", "local", name, "default", 0)
    house.adapters.delete_version("local", "local", name, version)


# --- publication -----------------------------------------------------------------------------------------------------


def test_an_upload_becomes_a_version_and_leaves_nothing_else(house: House) -> None:
    version = house.upload("local", "up", "x", ONE)
    assert (version.version, version.bundle) == (1, ONE.digest)
    assert house.uploads.store_ids() == set()
    assert paths_in(house.root / STORE / "staging") == paths_in(house.root / STORE / "trash") == []
    assert bundles_in(house.root / STORE) == {ONE.digest}
    assert house.upload("local", "up", "x", ONE) == version


def test_what_was_not_validated_is_not_published(house: House) -> None:
    house.begin("local", "up", "x", ONE)
    house.send("local", "up", ONE)
    with pytest.raises(ValueError, match="was validated"):
        house.publication.publish("local", "up", "x", found_in(TWO), quota=NO_LIMITS)
    assert house.adapters.newest("local", "x") is None


def test_an_upload_that_may_not_be_published_is_as_it_was_and_is_published_later(house: House) -> None:
    house.begin("local", "up", "x", ONE)
    house.send("local", "up", ONE)
    with pytest.raises(ResourceExhaustedError):
        house.publication.publish("local", "up", "x", found_in(ONE), quota=Quota(adapters=0))
    house.collect()
    assert house.uploads.store_ids() == {store_id("local", "up")}
    assert house.upload("local", "up", "x", ONE).version == 1


def test_a_refused_beginning_leaves_no_upload(house: House) -> None:
    cases: list[tuple[type[Exception], Callable[[], object]]] = [
        (InvalidArgumentError, lambda: house.publication.begin("local", "up", "x", [], NO_LIMITS)),
        (
            InvalidArgumentError,
            lambda: house.publication.begin("local", "up", "x", [BundleFile("../x", 1, "a" * 64)], NO_LIMITS),
        ),
        (InvalidArgumentError, lambda: house.publication.begin("local", "u/p", "x", ONE.files, NO_LIMITS)),
        (ResourceExhaustedError, lambda: house.publication.begin("local", "up", "x", ONE.files, Quota(adapters=0))),
        (NotFoundError, lambda: house.publication.begin("acme", "up", "x", ONE.files, NO_LIMITS)),
    ]
    for kind, call in cases:
        with pytest.raises(kind):
            call()
    assert house.uploads.store_ids() == set()
    assert paths_in(house.root / STORE) == EMPTY


def test_an_id_is_one_uploads_until_it_is_given_up(house: House) -> None:
    house.begin("local", "up", "x", ONE)
    house.send("local", "up", Adapter("one", 4))
    for other in (TWO, Adapter("one", 21)):
        with pytest.raises(AlreadyExistsError) as refusal:
            house.begin("local", "up", "x", other)
        assert (refusal.value.reason, store_id("local", "up") in refusal.value.message) == ("UPLOAD_EXISTS", False)
    assert [house.publication.abort("local", "up") for _ in range(2)] == [True, False]
    assert paths_in(house.root / STORE) == EMPTY
    assert house.upload("local", "up", "x", TWO).bundle == TWO.digest


def test_an_upload_goes_on_under_its_header_alone_and_with_as_many_aliases_as_there_may_be(house: House) -> None:
    begin = partial(house.publication.begin, "local", "up", "x", ONE.files, NO_LIMITS)
    begin("one", ["default"])
    house.send("local", "up", ONE)
    with pytest.raises(AlreadyExistsError):
        begin("two", ["default"])
    with pytest.raises(ResourceExhaustedError) as refusal:
        begin("one", [f"a{number}" for number in range(101)])
    assert refusal.value.reason == "TOO_MANY_ALIASES"
    begin("one", ["default"])
    assert house.publish("local", "up", "x", ONE).version == 1


def test_who_takes_a_tenants_name_finds_none_of_its_bytes(house: House) -> None:
    house.tenants.create("acme")
    house.begin("acme", "up", "x", ONE)
    house.send("acme", "up", ONE)
    house.tenants.delete("acme")
    with pytest.raises(NotFoundError) as gone:
        house.publish("acme", "up", "x", ONE)
    assert gone.value.reason == "TENANT_NOT_FOUND"
    house.tenants.create("acme")
    house.begin("acme", "up", "x", ONE)
    assert set(house.store.committed(store_id("acme", "up")).values()) == {0}


def test_a_deleted_tenants_upload_publishes_nothing_for_who_takes_its_name(house: House) -> None:
    house.tenants.create("acme")
    house.begin("acme", "up", "x", ONE)
    house.send("acme", "up", ONE)
    house.tenants.delete("acme")
    house.tenants.create("acme")
    with pytest.raises(NotFoundError) as gone:
        house.publish("acme", "up", "x", ONE)
    assert gone.value.reason == "UPLOAD_NOT_FOUND"
    assert house.adapters.newest("acme", "x") is None
    for _ in range(3):
        house.collect()
    assert paths_in(house.root / STORE) == EMPTY


def test_two_tenants_with_one_id_and_one_adapter_share_its_bytes_alone(house: House) -> None:
    house.tenants.create("acme")
    house.begin("acme", "up", "x", ONE)
    house.begin("local", "up", "x", ONE)
    house.send("acme", "up", ONE)
    assert set(house.store.committed(store_id("local", "up")).values()) == {0}
    with pytest.raises(DataLossError):
        house.store.append(store_id("acme", "up"), "adapter_config.json", 0, b"!")
    house.publish("acme", "up", "x", ONE)
    house.send("local", "up", ONE)
    assert house.publish("local", "up", "x", ONE).bundle == ONE.digest
    assert house.store.bundles() == {ONE.digest}


# --- collection ------------------------------------------------------------------------------------------------------


def test_a_bundle_goes_in_the_second_round_in_a_row_that_nobody_needs_it(house: House) -> None:
    house.upload("local", "up", "x", ONE)
    house.collect()
    delete(house, "x", 1)
    first = house.collect()
    assert (first.freed_bytes, first.removed) == (0, frozenset())
    second = house.collect()
    assert (second.freed_bytes, second.removed) == (found_in(ONE).size_bytes, {ONE.digest})
    assert paths_in(house.root / STORE) == EMPTY
    third = house.collect()
    assert (third.freed_bytes, third.removed) == (0, frozenset())


def test_a_bundle_that_was_needed_again_in_between_begins_anew(house: House) -> None:
    house.upload("local", "up", "x", ONE)
    house.collect()
    delete(house, "x", 1)
    for _ in range(2):
        assert house.collect().removed == set()
        assert house.collect(held=frozenset({ONE.digest})).removed == set()
    house.upload("local", "again", "x", ONE)
    delete(house, "x", 2)
    assert house.collect().removed == set()  # it came since
    assert house.collect().removed == {ONE.digest}


def test_what_a_version_a_hold_or_an_upload_needs_stays(house: House) -> None:
    house.upload("local", "up-1", "x", ONE)
    held, coming = Adapter("held"), Adapter("coming")
    house.upload("local", "up-2", "y", held)
    delete(house, "y", 1)
    house.begin("local", "up-3", "z", coming)
    house.send("local", "up-3", coming)
    house.store.commit(store_id("local", "up-3"))
    for _ in range(4):
        collected = house.collect(held=frozenset({held.digest}))
        assert (collected.freed_bytes, collected.removed) == (0, frozenset())
    assert house.publish("local", "up-3", "z", coming).version == 1
    house.collect()
    assert house.collect().removed == {held.digest}
    assert house.store.bundles() == {ONE.digest, coming.digest}


def test_an_upload_expires_a_day_after_it_was_last_touched_unless_somebody_streams_it(
    house: House, clock: SteppedClock
) -> None:
    for upload_id in ("left", "streamed", "touched"):
        house.begin("local", upload_id, "x", ONE)
        house.send("local", upload_id, ONE)
    house.collect()
    clock.advance(hours=12)
    house.uploads.touch("local", "touched")
    clock.advance(hours=12, seconds=1)
    streamed, touched = store_id("local", "streamed"), store_id("local", "touched")
    assert house.collect(active=frozenset({streamed})).freed_bytes > 0
    assert house.uploads.store_ids() == {streamed, touched}
    assert sorted(path.name for path in (house.root / STORE / "staging").iterdir()) == sorted({streamed, touched})
    house.collect()
    assert house.uploads.store_ids() == {touched}
    with pytest.raises(NotFoundError):
        house.publish("local", "left", "x", ONE)
    assert house.publish("local", "touched", "x", ONE).version == 1


def test_bytes_that_no_account_speaks_for_go_at_once_after_a_restart(
    house: House, database: Database, clock: SteppedClock
) -> None:
    house.begin("local", "kept", "x", ONE)
    house.begin("local", "orphan", "x", TWO)
    house.send("local", "orphan", TWO)
    house.uploads.forget("local", "orphan")
    again = reopened(house, database, clock)
    assert again.collect().freed_bytes > 0
    assert [path.name for path in (house.root / STORE / "staging").iterdir()] == [store_id("local", "kept")]
    again.store.close()


def test_a_bundle_whose_publication_was_cut_short_goes_with_its_upload(
    house: House, database: Database, clock: SteppedClock
) -> None:
    house.begin("local", "up", "x", ONE)
    house.send("local", "up", ONE)
    house.store.commit(store_id("local", "up"))
    again = reopened(house, database, clock)
    again.collect()
    assert again.store.bundles() == {ONE.digest}
    clock.advance(hours=25)
    assert again.collect().removed == {ONE.digest}
    assert paths_in(house.root / STORE) == EMPTY
    again.store.close()


def test_collections_among_publishers_take_nothing_that_a_version_needs(house: House) -> None:
    adapters = [Adapter(f"a{number}", 300) for number in range(3)]
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(9):
                adapter = adapters[(number + ord(name)) % 3]
                version = house.upload("local", f"{name}-{number}", name, adapter)
                files = {file.name: file.read_bytes() for file in house.store.directory(version.bundle).iterdir()}
                assert files == adapter.contents
                if number % 2:
                    delete(house, name, version.version)
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=work, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        house.collect()
        threads[-1].join(0.002)
    for thread in threads:
        thread.join()
    assert failed == []
    assert [meaning(house.adapters, "local", f"{name}@9") for name in "xyz"] == [9] * 3
    for _ in range(3):
        house.collect()
    assert house.store.bundles() == bundles_in(house.root / STORE) == house.adapters.live_bundles()
