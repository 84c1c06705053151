"""Tenants: what an id may be, who wins, what an etag sees, and what a list shows while it changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC
from functools import partial
from threading import Barrier, Thread
from typing import TYPE_CHECKING

import pytest
from motley_server.asked import Role
from motley_server.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    MotleyError,
    NotFoundError,
)
from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.records import Quota
from motley_server.registry.schema import tenants as table
from motley_server.registry.tenants import Tenants

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

# A different number in each field, so that none can stand in another's place.
QUOTA = Quota(2, 2**62, 3, 4, 5, 6, 7.25)
WORKERS = 4


def at_once(*calls: Callable[[], object]) -> list[object]:
    """Call each on a thread of its own, all together, and return what each returned or raised."""
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


def test_what_was_created_is_what_is_read(tenants: Tenants, clock: SteppedClock) -> None:
    made = tenants.create("acme", "Ácmé \U0001f469\u200d\U0001f52c \u0645\u06cc\u200c\u062e\u0648", QUOTA)
    assert tenants.get("acme") == made
    assert (made.id, made.quota, made.created_at) == ("acme", QUOTA, clock())
    assert tenants.get("acme").created_at.tzinfo is UTC


def test_the_quota_of_these_tests_has_every_field() -> None:
    values = [getattr(QUOTA, field.name) for field in fields(Quota)]
    assert len(set(values)) == len(values)
    assert not set(values) & {None, Quota().weight}


@pytest.mark.parametrize("name", ["a", "0", "a" * 128, "a.b-c_d"])
def test_an_id_is_a_name(tenants: Tenants, name: str) -> None:
    assert tenants.create(name).id == tenants.get(name).id == name


@pytest.mark.parametrize(
    "name", ["", "A", "-a", "a" * 129, "a/b", "a b", "a\x00", "a\n", "á", "../a", "a\udc80", "a" * 10_000_000]
)
def test_what_is_no_id_is_refused_and_there_is_none(tenants: Tenants, name: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        tenants.create(name)
    assert (refusal.value.reason, refusal.value.field) == ("INVALID_TENANT_ID", "id")
    assert len(refusal.value.message) < 1000
    calls = (lambda: tenants.get(name), lambda: tenants.update(name), lambda: tenants.delete(name))
    for call in calls:
        with pytest.raises(NotFoundError) as missing:
            call()
        assert (missing.value.reason, missing.value.field) == ("TENANT_NOT_FOUND", "id")
        assert len(missing.value.message) < 1000


def test_public_can_be_nobody(tenants: Tenants) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        tenants.create("public")
    assert refusal.value.reason == "RESERVED_TENANT_ID"
    with pytest.raises(NotFoundError):
        tenants.get("public")


def test_local_is_there_and_stays(tenants: Tenants) -> None:
    assert tenants.get("local").quota == Quota()
    with pytest.raises(AlreadyExistsError) as taken:
        tenants.create("local")
    with pytest.raises(FailedPreconditionError) as refusal:
        tenants.delete("local")
    assert (taken.value.reason, refusal.value.reason) == ("TENANT_EXISTS", "TENANT_NEEDED")
    assert tenants.update("local", quota=QUOTA).quota == tenants.get("local").quota == QUOTA


@pytest.mark.parametrize("name", ["a\x00", "a\n", "\x1b[31m", "a\u202eb", "\udc80", "\x7f", "\u2028", "a" * 201])
def test_a_display_name_is_printable_and_short(tenants: Tenants, name: str) -> None:
    for call in (lambda: tenants.create("acme", name), lambda: tenants.update("local", display_name=name)):
        with pytest.raises(InvalidArgumentError) as refusal:
            call()
        assert (refusal.value.reason, refusal.value.field) == ("INVALID_DISPLAY_NAME", "display_name")
    assert [tenant.display_name for tenant in tenants.list().items] == [""]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapters", -1),
        ("adapter_bytes", 2**63),
        ("tokens_per_minute", -(2**70)),
        ("weight", 0.0),
        ("weight", -1.0),
        ("weight", math.nan),
        ("weight", math.inf),
        ("weight", 0.001),
        ("weight", 101.0),
    ],
)
def test_a_quota_is_in_range(tenants: Tenants, field: str, value: float) -> None:
    quota = replace(Quota(), **{field: value})
    for call in (lambda: tenants.create("acme", "", quota), lambda: tenants.update("local", quota=quota)):
        with pytest.raises(InvalidArgumentError) as refusal:
            call()
        assert (refusal.value.reason, refusal.value.field) == ("OUT_OF_RANGE", f"quota.{field}")


def test_the_greatest_quota_and_none_at_all_are_kept(tenants: Tenants) -> None:
    most = Quota(2**63 - 1, 2**63 - 1, 2**63 - 1, 2**63 - 1, 2**63 - 1, 2**63 - 1, 100.0)
    none = Quota(0, 0, 0, 0, 0, 0, 0.01)
    tenants.create("most", "", most)
    tenants.create("none", "", none)
    assert (tenants.get("most").quota, tenants.get("none").quota) == (most, none)


# --- changes ---------------------------------------------------------------------------------------------------------


def test_every_update_changes_the_etag_and_nothing_that_was_not_named(tenants: Tenants, clock: SteppedClock) -> None:
    made = tenants.create("acme", "Acme", QUOTA)
    clock.advance(hours=1)
    named = tenants.update("acme", display_name="")
    limited = tenants.update("acme", quota=Quota(adapters=9))
    same = tenants.update("acme", quota=Quota(adapters=9))
    assert replace(named, etag="") == replace(made, display_name="", etag="")
    assert replace(limited, etag="") == replace(named, quota=Quota(adapters=9), etag="")
    assert len({tenant.etag for tenant in (made, named, limited, same)}) == 4
    assert tenants.get("acme") == same


def test_some_fields_of_a_quota_change_without_the_others(tenants: Tenants) -> None:
    tenants.create("acme", "", QUOTA)
    changed = tenants.update("acme", quota=Quota(adapters=9, weight=2.0), quota_fields=["adapters", "adapter_bytes"])
    assert changed.quota == replace(QUOTA, adapters=9, adapter_bytes=None)


def test_an_old_etag_changes_nothing(tenants: Tenants) -> None:
    old = tenants.create("acme")
    new = tenants.update("acme", display_name="first", etag=old.etag)
    for etag in (old.etag, "", "nonsense"):
        with pytest.raises(AbortedError) as aborted:
            tenants.update("acme", display_name="second", etag=etag)
        assert (aborted.value.reason, aborted.value.field) == ("ETAG_MISMATCH", "etag")
    assert tenants.get("acme") == new


def test_a_deleted_tenant_is_gone_and_its_keys_with_it(tenants: Tenants, keys: Keys) -> None:
    first = tenants.create("acme")
    _, text = keys.create("acme", Role.ADMIN)
    tenants.delete("acme")
    for call in (lambda: tenants.get("acme"), lambda: tenants.update("acme"), lambda: tenants.delete("acme")):
        with pytest.raises(NotFoundError):
            call()
    assert keys.authenticate(text) is None
    second = tenants.create("acme")
    assert keys.authenticate(text) is None
    assert (keys.list("acme").items, keys.has_admin()) == ((), False)
    assert first.etag != second.etag


def test_of_two_creators_at_once_one_wins(tenants: Tenants) -> None:
    for round in range(10):
        results = at_once(*(partial(tenants.create, f"t{round}", str(number)) for number in range(WORKERS)))
        won = [result for result in results if not isinstance(result, MotleyError)]
        assert won == [tenants.get(f"t{round}")]
        assert {result.reason for result in results if isinstance(result, MotleyError)} == {"TENANT_EXISTS"}


def test_of_two_changes_to_what_both_read_one_wins(tenants: Tenants) -> None:
    for round in range(10):
        etag = tenants.get("local").etag
        change = partial(tenants.update, "local", etag=etag)
        results = at_once(*(partial(change, display_name=f"{round}.{number}") for number in range(WORKERS)))
        won = [result for result in results if not isinstance(result, MotleyError)]
        assert won == [tenants.get("local")]
        assert {result.reason for result in results if isinstance(result, MotleyError)} == {"ETAG_MISMATCH"}


# --- lists -----------------------------------------------------------------------------------------------------------


def read_all(tenants: Tenants, page_size: int) -> list[list[str]]:
    pages, token = [], ""
    while True:
        page = tenants.list(page_size, token)
        pages.append([tenant.id for tenant in page.items])
        token = page.next_page_token
        if not token:
            return pages


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 6), (4, [4, 2]), (6, [6]), (2, [2, 2, 2]), (0, [6])])
def test_pages_hold_everybody_once_by_id(tenants: Tenants, size: int, lengths: list[int]) -> None:
    ids = ["b", "a-b", "a.b", "a_b", "ab"]  # a locale would sort these otherwise
    for id in ids:
        tenants.create(id)
    pages = read_all(tenants, size)
    assert [len(page) for page in pages] == lengths
    assert [id for page in pages for id in page] == sorted([*ids, "local"])


def test_who_was_there_is_listed_once_while_others_come_and_go(tenants: Tenants) -> None:
    for id in "bdfhj":
        tenants.create(id)
    first = tenants.list(2)
    tenants.create("a")
    tenants.create("e")
    tenants.delete("d")
    second = tenants.list(2, first.next_page_token)
    third = tenants.list(2, second.next_page_token)
    pages = [[tenant.id for tenant in page.items] for page in (first, second, third)]
    assert pages == [["b", "d"], ["e", "f"], ["h", "j"]]


def test_a_page_is_100_unless_asked_and_1000_at_most(tenants: Tenants, database: Database) -> None:
    rows = [
        {"id": f"t{number:04}", "display_name": "", "quota_weight": 1.0, "etag": "", "created_at": database.now()}
        for number in range(1001)
    ]
    with database.writing() as connection:
        connection.execute(table.insert(), rows)
    sizes = {asked: len(tenants.list(asked).items) for asked in (0, 999, 1000, 1001, 2**31 - 1, 2**63)}
    assert sizes == {0: 100, 999: 999, 1000: 1000, 1001: 1000, 2**31 - 1: 1000, 2**63: 1000}


def test_a_negative_page_size_is_refused(tenants: Tenants) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        tenants.list(-1)
    assert (refusal.value.reason, refusal.value.field) == ("OUT_OF_RANGE", "page_size")
