"""Keys: who is let in and who is not, what is kept of a secret, and when a key counts no more."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest
from motley_server.asked import Role
from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.schema import METADATA
from motley_server.registry.tenants import Tenants
from sqlalchemy import select

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

FORM = re.compile(r"mk_(?P<id>[0-9a-f]{16})_(?P<secret>[A-Za-z0-9_-]{43})")


@pytest.mark.parametrize("role", list(Role))
def test_a_key_lets_its_tenant_in_by_its_role(keys: Keys, clock: SteppedClock, role: Role) -> None:
    key, text = keys.create("local", role)
    form = FORM.fullmatch(text)
    assert form is not None
    assert (key.id, key.tenant_id, key.role) == (form["id"], "local", role)
    assert (key.created_at, key.expires_at, key.revoked_at) == (clock(), None, None)
    assert keys.authenticate(text) == key == keys.list("local").items[0]


def test_of_a_secret_nothing_but_its_hash_is_kept(keys: Keys, database: Database) -> None:
    _, text = keys.create("local", Role.USER, request_id="once")
    secret = FORM.fullmatch(text)["secret"]
    with database.reading() as connection:
        kept = [str(row) for table in METADATA.tables.values() for row in connection.execute(select(table))]
    assert any("once" in row for row in kept)
    assert not any(secret in row for row in kept)


def test_a_changed_text_lets_nobody_in(keys: Keys) -> None:
    key, text = keys.create("local", Role.ADMIN)
    _, other = keys.create("local", Role.ADMIN)
    start = len("mk_") + len(key.id) + 1
    changed = [
        text[:place] + ("x" if text[place] != "x" else "y") + text[place + 1 :] for place in range(start, len(text))
    ]
    swapped = [text[:start] + other[start:], other[:start] + text[start:], f"mk_{'0' * 16}_{text[start:]}"]
    assert [keys.authenticate(wrong) for wrong in changed + swapped] == [None] * (len(changed) + 3)
    assert keys.authenticate(text) == key


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "mk_",
        lambda text: "mk__",
        lambda text: text[:-1],
        lambda text: text + "A",
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.upper(),
        lambda text: text.replace("mk_", "sk_"),
        lambda text: text[3:],
        lambda text: text[:-1] + "\x00",
        lambda text: text[:-1] + "ä",
        lambda text: text[:-1] + "\udc80",
        lambda text: text.replace("_", "-", 1),
        lambda text: "mk_" + "\N{ARABIC-INDIC DIGIT ONE}" * 16 + text[19:],
        lambda text: "mk_' or 1=1 --_" + text[20:],
        lambda text: "_" * 1_000_000,
    ],
)
def test_a_malformed_text_lets_nobody_in(keys: Keys, spoil: Callable[[str], str]) -> None:
    _, text = keys.create("local", Role.ADMIN)
    assert keys.authenticate(spoil(text)) is None


def test_an_unknown_id_costs_the_same_query_and_comparison(
    keys: Keys, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = keys.create("local", Role.USER)
    done: list[str] = []
    compare, reading = hmac.compare_digest, database.reading
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: done.append(f"compare {len(a)} {len(b)}") or compare(a, b))
    monkeypatch.setattr(database, "reading", lambda: done.append("read") or reading())
    work = []
    for shown in (text, text[:20] + "A" * 43, f"mk_{'0' * 16}_{text[20:]}"):
        keys.authenticate(shown)
        work.append(tuple(done))
        done.clear()
    assert set(work) == {("read", "compare 32 32")}


def test_a_key_expires_to_the_microsecond(keys: Keys, clock: SteppedClock) -> None:
    key, text = keys.create("local", Role.ADMIN, clock() + timedelta(hours=1, microseconds=1))
    clock.advance(hours=1)
    assert keys.authenticate(text) == key
    assert keys.has_admin()
    clock.advance(microseconds=1)
    assert keys.authenticate(text) is None
    assert not keys.has_admin()
    assert keys.list("local").items == (key,)


def test_times_are_utc_whatever_zone_they_came_in(keys: Keys) -> None:
    # In the hour that clocks in Berlin skip, or in Apia live twice, there is still one moment.
    zones = [timezone(timedelta(hours=14)), timezone(-timedelta(hours=11, minutes=30)), UTC]
    for zone in zones:
        moment = datetime(2030, 3, 31, 1, 30, 0, 1, tzinfo=UTC)
        key, text = keys.create("local", Role.USER, moment.astimezone(zone))
        for found in (key, keys.authenticate(text)):
            assert found.expires_at == moment
            assert (found.expires_at.tzinfo, found.created_at.tzinfo) == (UTC, UTC)


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2030, 1, 1),
        datetime(2026, 3, 29, tzinfo=UTC),
        datetime.min.replace(tzinfo=UTC),
        datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_an_expiry_without_a_zone_in_the_past_or_out_of_time_is_refused(keys: Keys, moment: datetime) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        keys.create("local", Role.USER, moment)
    assert (refusal.value.reason, refusal.value.field) == ("INVALID_EXPIRY", "expire_time")


def test_the_last_moment_of_all_can_be_an_expiry(keys: Keys) -> None:
    moment = datetime.max.replace(tzinfo=UTC)
    key, text = keys.create("local", Role.USER, moment)
    assert keys.authenticate(text) == key
    assert key.expires_at == moment


def test_a_revoked_key_counts_no_more_and_stays_on_the_list(keys: Keys, clock: SteppedClock) -> None:
    key, text = keys.create("local", Role.ADMIN)
    _, spare = keys.create("local", Role.USER)
    clock.advance(seconds=1)
    revoked = keys.revoke(key.id)
    assert revoked.revoked_at == clock()
    assert keys.authenticate(text) is None
    assert keys.authenticate(spare) is not None
    assert not keys.has_admin()
    clock.advance(seconds=1)
    assert keys.revoke(key.id) == revoked
    assert revoked in keys.list("local").items


@pytest.mark.parametrize("key_id", ["", "0" * 16, "0" * 15, "x\x00", "ä" * 16, "\udc80", "0" * 10_000_000])
def test_a_key_that_is_not_there_cannot_be_revoked(keys: Keys, key_id: str) -> None:
    with pytest.raises(NotFoundError) as missing:
        keys.revoke(key_id)
    assert (missing.value.reason, missing.value.field) == ("KEY_NOT_FOUND", "key_id")
    assert len(missing.value.message) < 1000


@pytest.mark.parametrize("tenant_id", ["nobody", "public", "", "a\x00", "\udc80"])
def test_nobody_has_no_keys(keys: Keys, tenant_id: str) -> None:
    for call in (lambda: keys.create(tenant_id, Role.USER), lambda: keys.list(tenant_id)):
        with pytest.raises(NotFoundError) as missing:
            call()
        assert (missing.value.reason, missing.value.field) == ("TENANT_NOT_FOUND", "tenant_id")


def test_only_an_admins_key_is_an_admin(keys: Keys) -> None:
    assert not keys.has_admin()
    for role in (Role.USER, Role.PUBLISHER, Role.WORKER):
        keys.create("local", role)
    assert not keys.has_admin()
    keys.create("local", Role.ADMIN)
    assert keys.has_admin()


def test_pages_hold_every_key_of_the_tenant_once_the_oldest_first(
    tenants: Tenants, keys: Keys, clock: SteppedClock
) -> None:
    tenants.create("other")
    made = []
    for number in range(7):
        keys.create("other", Role.USER)
        made.append(keys.create("local", Role.USER)[0])
        clock.advance(seconds=number % 3 // 2)  # three are made in the same instant
    listed, token = [], ""
    for _ in range(4):
        page = keys.list("local", 2, token)
        listed.extend(page.items)
        token = page.next_page_token
        keys.create("local", Role.PUBLISHER) if not token else clock.advance(microseconds=1)
    assert [key.id for key in listed] == [key.id for key in sorted(made, key=lambda key: (key.created_at, key.id))]
    assert token == ""


def test_ids_do_not_tell_the_order_in_which_they_were_made(keys: Keys) -> None:
    ids = [keys.create("local", Role.USER)[0].id for _ in range(12)]
    assert len(set(ids)) == 12
    assert ids not in (sorted(ids), sorted(ids, reverse=True))


def test_a_page_token_is_good_for_its_own_list_alone(tenants: Tenants, keys: Keys) -> None:
    tenants.create("other")
    for tenant in ("local", "other"):
        for _ in range(2):
            keys.create(tenant, Role.USER)
    of_keys, of_tenants = keys.list("local", 1).next_page_token, tenants.list(1).next_page_token
    calls = (
        lambda: keys.list("other", 1, of_keys),
        lambda: keys.list("local", 1, of_tenants),
        lambda: tenants.list(1, of_keys),
    )
    for call in calls:
        with pytest.raises(InvalidArgumentError) as refusal:
            call()
        assert (refusal.value.reason, refusal.value.field) == ("BAD_PAGE_TOKEN", "page_token")
