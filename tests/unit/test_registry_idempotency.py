"""Request ids: a repeat is answered as before and changes nothing; the same id for something else is refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from threading import Barrier, Thread
from typing import TYPE_CHECKING

import pytest
from motley_server.asked import Role
from motley_server.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from motley_server.registry.database import Database
from motley_server.registry.idempotency import KEPT, Request
from motley_server.registry.keys import Keys
from motley_server.registry.records import Quota
from motley_server.registry.schema import requests
from motley_server.registry.tenants import Tenants
from sqlalchemy import func, select

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

QUOTA = Quota(adapters=2, weight=0.1)


def kept(database: Database) -> int:
    with database.reading() as connection:
        return connection.execute(select(func.count()).select_from(requests)).scalar_one()


def test_a_repeat_is_answered_as_before_whatever_happened_since(tenants: Tenants, clock: SteppedClock) -> None:
    create = partial(tenants.create, "acme", "Acme", QUOTA, request_id="one", scope="local")
    update = partial(tenants.update, "acme", display_name="New", request_id="two", scope="local")
    delete = partial(tenants.delete, "acme", request_id="three", scope="local")
    made = create()
    clock.advance(minutes=1)
    assert create() == made
    changed = update(etag=made.etag)
    assert update(etag=made.etag) == changed == tenants.get("acme")
    delete()
    assert (create(), update(etag=made.etag), delete()) == (made, changed, None)
    with pytest.raises(NotFoundError):
        tenants.get("acme")


def test_a_repeated_delete_spares_who_took_the_name_since(tenants: Tenants) -> None:
    tenants.create("acme")
    tenants.delete("acme", request_id="gone", scope="local")
    second = tenants.create("acme")
    tenants.delete("acme", request_id="gone", scope="local")
    assert tenants.get("acme") == second


def test_a_repeat_makes_no_second_key_and_shows_no_secret(keys: Keys, clock: SteppedClock) -> None:
    create = partial(keys.create, "local", Role.USER, clock() + timedelta(hours=1), request_id="one")
    key, text = create()
    clock.advance(hours=2)  # even once it has expired
    assert text
    assert create() == (key, "")
    assert keys.list("local").items == (key,)


def test_a_repeated_revocation_is_answered_as_before(keys: Keys, clock: SteppedClock) -> None:
    key, _ = keys.create("local", Role.USER)
    revoked = keys.revoke(key.id, request_id="one")
    clock.advance(seconds=1)
    assert keys.revoke(key.id, request_id="one") == revoked


def test_another_content_or_method_under_the_same_id_is_refused(
    tenants: Tenants, keys: Keys, clock: SteppedClock
) -> None:
    tenants.create("acme", "Acme", QUOTA, request_id="one")
    key, _ = keys.create("acme", Role.USER, request_id="two")
    others: list[Callable[..., object]] = [
        partial(tenants.create, "acme2", "Acme", QUOTA, request_id="one"),
        partial(tenants.create, "acme", "", QUOTA, request_id="one"),
        partial(tenants.create, "acme", "Acme", Quota(adapters=2), request_id="one"),
        partial(tenants.update, "acme", display_name="Acme", quota=QUOTA, request_id="one"),
        partial(tenants.delete, "acme", request_id="one"),
        partial(keys.create, "acme", Role.ADMIN, request_id="two"),
        partial(keys.create, "local", Role.USER, request_id="two"),
        partial(keys.create, "acme", Role.USER, clock() + timedelta(hours=1), request_id="two"),
        partial(keys.revoke, key.id, request_id="two"),
    ]
    for other in others:
        with pytest.raises(AlreadyExistsError) as refusal:
            other()
        assert (refusal.value.reason, refusal.value.field) == ("REQUEST_ID_REUSED", "request_id")
    assert len(tenants.list().items) == 2
    assert keys.list("acme").items == (key,)


def test_two_methods_of_one_content_are_two_requests() -> None:
    first, second = (Request.of(method, "local", "one", id="acme") for method in ("tenants.delete", "tenants.drain"))
    assert first.content_sha256 != second.content_sha256


def test_an_update_that_asks_for_something_else_is_no_repeat(tenants: Tenants) -> None:
    etag = tenants.get("local").etag
    tenants.update("local", quota=QUOTA, quota_fields=["adapters"], request_id="one")
    for other in ({"quota_fields": ["weight"]}, {"quota_fields": None}, {"quota_fields": ["adapters"], "etag": etag}):
        with pytest.raises(AlreadyExistsError):
            tenants.update("local", quota=QUOTA, request_id="one", **other)


def test_one_callers_id_is_not_anothers(tenants: Tenants) -> None:
    tenants.create("a", request_id="one", scope="local")
    assert tenants.create("b", request_id="one", scope="a").id == "b"
    assert tenants.create("c", request_id="one").id == "c"


def test_without_an_id_every_request_is_new(tenants: Tenants, keys: Keys, database: Database) -> None:
    keys.create("local", Role.USER)
    keys.create("local", Role.USER)
    tenants.update("local", display_name="a")
    tenants.update("local", display_name="b")
    assert len(keys.list("local").items) == 2
    assert kept(database) == 0


def test_what_failed_may_be_tried_again_under_its_id(tenants: Tenants, keys: Keys) -> None:
    with pytest.raises(NotFoundError):
        keys.create("acme", Role.USER, request_id="one")
    tenants.create("acme")
    assert keys.create("acme", Role.USER, request_id="one")[1]


def test_after_a_day_an_id_is_free_and_its_answer_forgotten(
    tenants: Tenants, database: Database, clock: SteppedClock
) -> None:
    tenants.create("a", request_id="one")
    tenants.create("b", request_id="two")
    clock.time += KEPT - timedelta(microseconds=1)
    tenants.create("a", request_id="one")
    with pytest.raises(AlreadyExistsError, match="this request id"):
        tenants.create("c", request_id="one")
    clock.advance(microseconds=1)
    assert tenants.create("c", request_id="one").id == "c"
    assert kept(database) == 1


def test_a_tenants_ids_go_with_it(tenants: Tenants) -> None:
    tenants.create("acme")
    tenants.create("a", request_id="one", scope="acme")
    tenants.delete("acme", request_id="two", scope="acme")
    tenants.delete("acme", request_id="two", scope="acme")
    tenants.create("acme")
    assert tenants.create("b", request_id="one", scope="acme").id == "b"


def test_repeats_at_once_are_one_request(keys: Keys) -> None:
    for round in range(10):
        barrier, results = Barrier(4), []

        def call(round: int = round, barrier: Barrier = barrier, results: list[object] = results) -> None:
            barrier.wait()
            results.append(keys.create("local", Role.USER, request_id=f"{round}"))

        threads = [Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({key.id for key, _ in results}) == 1
        assert sorted(bool(text) for _, text in results) == [False, False, False, True]
    assert len(keys.list("local").items) == 10


@pytest.mark.parametrize("request_id", ["a" * 129, "a\x00", "a\n", "\udc80", "\x1b"])
def test_a_request_id_is_printable_and_short(tenants: Tenants, keys: Keys, request_id: str) -> None:
    calls: list[Callable[..., object]] = [
        partial(tenants.create, "acme"), partial(tenants.update, "local"), partial(tenants.delete, "local"),
        partial(keys.create, "local", Role.USER), partial(keys.revoke, "0" * 16),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InvalidArgumentError) as refusal:
            call(request_id=request_id)
        assert (refusal.value.reason, refusal.value.field) == ("INVALID_REQUEST_ID", "request_id")


def test_the_longest_request_id_counts_in_whole(tenants: Tenants) -> None:
    made = tenants.create("acme", request_id="\U0001f9f5" * 128)
    assert tenants.create("acme", request_id="\U0001f9f5" * 128) == made
    assert tenants.create("other", request_id="\U0001f9f5" * 127).id == "other"
