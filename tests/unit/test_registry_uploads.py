"""Uploads on record: whose they are, how many may be open, what a quota has for them, and when they are forgotten."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from adapter_registry import NO_LIMITS, at_once, content_of, publish, statements
from motley_server.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    MotleyError,
    NotFoundError,
    ResourceExhaustedError,
)
from motley_server.registry.adapters import Adapters
from motley_server.registry.aliases import MAX_ALIASES
from motley_server.registry.records import Quota
from motley_server.registry.tenants import Tenants
from motley_server.registry.uploads import MAX_OPEN_UPLOADS, UPLOAD_LIFETIME, UploadRecord, Uploads, store_id

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]


def refusal(kind: type[MotleyError], call: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(kind) as caught:
        call()
    assert len(caught.value.message) < 1000
    return caught.value.reason, caught.value.field


def test_an_upload_is_on_record_until_it_is_forgotten(uploads: Uploads, clock: SteppedClock) -> None:
    begun = clock()
    assert uploads.begin("local", "up-1", "x", 100, NO_LIMITS, "said") is True
    clock.advance(hours=1)
    uploads.touch("local", "up-1")
    record = uploads.get("local", "up-1")
    assert record == UploadRecord("local", "up-1", 100, sha256(b"said").digest(), begun, clock())
    assert record.expires_at == clock() + UPLOAD_LIFETIME
    assert uploads.store_ids() == {store_id("local", "up-1")}
    assert [uploads.forget("local", "up-1") for _ in range(2)] == [True, False]
    for call in (uploads.get, uploads.touch):
        assert refusal(NotFoundError, partial(call, "local", "up-1")) == ("UPLOAD_NOT_FOUND", "upload_id")
    assert uploads.store_ids() == set()


def test_an_upload_that_is_there_is_touched(uploads: Uploads, clock: SteppedClock) -> None:
    uploads.begin("local", "up-1", "x", 100, NO_LIMITS)
    begun = clock()
    clock.advance(hours=1)
    assert uploads.begin("local", "up-1", "x", 100, NO_LIMITS) is False
    assert (uploads.get("local", "up-1").created_at, uploads.get("local", "up-1").touched_at) == (begun, clock())
    again = partial(uploads.begin, "local", "up-1", "x", 99, NO_LIMITS)
    assert refusal(AlreadyExistsError, again) == ("UPLOAD_EXISTS", "upload_id")


def test_an_upload_goes_on_with_the_header_that_it_began_with_alone(uploads: Uploads, clock: SteppedClock) -> None:
    begin = partial(uploads.begin, "local", "up", "x", 100, NO_LIMITS)
    assert begin("one \N{SNOWMAN}") is True
    record = uploads.get("local", "up")
    clock.advance(hours=1)
    for other in ("two \N{SNOWMAN}", "one", ""):
        assert refusal(AlreadyExistsError, partial(begin, other)) == ("UPLOAD_EXISTS", "upload_id")
    assert uploads.get("local", "up") == record
    assert begin("one \N{SNOWMAN}") is False
    uploads.forget("local", "up")
    assert begin("two") is True


def test_two_owners_uploads_of_one_id_are_two(uploads: Uploads, tenants: Tenants) -> None:
    tenants.create("acme")
    for owner, size in (("local", 1), ("acme", 2), ("public", 3)):
        uploads.begin(owner, "up", "x", size, NO_LIMITS)
    assert [uploads.get(owner, "up").size_bytes for owner in ("local", "acme", "public")] == [1, 2, 3]
    assert uploads.forget("acme", "up")
    assert uploads.store_ids() == {store_id("local", "up"), store_id("public", "up")}


def test_what_the_store_calls_an_upload_is_nobody_elses() -> None:
    pairs = [("a", "b"), ("b", "a"), ("a-b", "c"), ("a", "b-c"), ("ab", ""), ("a", "B")]
    ids = {store_id(*pair) for pair in pairs}
    assert len(ids) == len(pairs)
    assert all(len(id) == 40 and set(id) <= set("0123456789abcdef") for id in ids)


def test_anothers_upload_is_missing_after_the_same_queries(uploads: Uploads, tenants: Tenants) -> None:
    tenants.create("acme")
    uploads.begin("acme", "up", "x", 1, NO_LIMITS)
    for call in (uploads.get, uploads.touch, uploads.forget):
        sent = {}
        for upload_id in ("up", "missing"):
            with statements() as sent[upload_id], suppress(NotFoundError):
                assert call("local", upload_id) is False
        assert sent["up"] == sent["missing"] != []
    assert uploads.get("acme", "up").size_bytes == 1


@pytest.mark.parametrize("upload_id", ["", "a/b", "a\x00", "\udc80", "a b", "ä", "a" * 65, "a" * 10_000_000, "a\n"])
def test_an_id_of_another_form_is_refused_or_not_found(uploads: Uploads, upload_id: str) -> None:
    begin = partial(uploads.begin, "local", upload_id, "x", 1, NO_LIMITS)
    assert refusal(InvalidArgumentError, begin) == ("INVALID_UPLOAD_ID", "upload_id")
    for call in (uploads.get, uploads.touch):
        assert refusal(NotFoundError, partial(call, "local", upload_id)) == ("UPLOAD_NOT_FOUND", "upload_id")
    assert not uploads.forget("local", upload_id)


@pytest.mark.parametrize("upload_id", ["-", "_a", "A" * 64, "0"])
def test_every_id_of_the_form_is_taken(uploads: Uploads, upload_id: str) -> None:
    assert uploads.begin("local", upload_id, "x", 1, NO_LIMITS)
    assert uploads.get("local", upload_id).upload_id == upload_id


def test_nobody_begins_for_a_tenant_that_is_gone_or_under_a_name_of_another_form(uploads: Uploads) -> None:
    for owner in ("acme", "a\x00"):
        begin = partial(uploads.begin, owner, "up", "x", 1, NO_LIMITS)
        assert refusal(NotFoundError, begin) == ("TENANT_NOT_FOUND", "owner")
        assert refusal(NotFoundError, partial(uploads.get, owner, "up")) == ("UPLOAD_NOT_FOUND", "upload_id")
    for name in ("", "A", "../a", "a" * 10_000_000):
        begin = partial(uploads.begin, "local", "up", name, 1, NO_LIMITS)
        assert refusal(InvalidArgumentError, begin) == ("INVALID_ADAPTER_NAME", "adapter_name")
    assert uploads.store_ids() == set()


def test_a_tenants_uploads_go_with_it(uploads: Uploads, tenants: Tenants) -> None:
    tenants.create("acme")
    uploads.begin("acme", "up", "x", 1, NO_LIMITS)
    uploads.begin("local", "up", "x", 1, NO_LIMITS)
    tenants.delete("acme")
    tenants.create("acme")
    assert uploads.store_ids() == {store_id("local", "up")}
    assert refusal(NotFoundError, partial(uploads.touch, "acme", "up")) == ("UPLOAD_NOT_FOUND", "upload_id")


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_an_owner_has_so_many_uploads_open(uploads: Uploads, tenants: Tenants) -> None:
    tenants.create("acme")
    for number in range(MAX_OPEN_UPLOADS):
        uploads.begin("local", f"up-{number}", "x", 1, NO_LIMITS)
    more = partial(uploads.begin, "local", "more", "x", 1, NO_LIMITS)
    assert refusal(ResourceExhaustedError, more) == ("TOO_MANY_UPLOADS", "upload_id")
    assert uploads.begin("local", "up-0", "x", 1, NO_LIMITS) is False
    assert uploads.begin("acme", "more", "x", 1, NO_LIMITS) is True
    uploads.forget("local", "up-3")
    assert more() is True


def test_a_quota_of_bytes_counts_versions_and_what_other_uploads_announced(
    uploads: Uploads, adapters: Adapters, tenants: Tenants
) -> None:
    tenants.create("acme")
    publish(adapters, "acme", "x")
    uploads.begin("acme", "up", "x", 100, NO_LIMITS)  # another's bytes are not mine
    quota = Quota(adapter_bytes=250)
    publish(adapters, "local", "x", "a")  # 100
    uploads.begin("local", "up-1", "x", 100, quota)
    begin = partial(uploads.begin, "local", "up-2", "y")
    assert refusal(ResourceExhaustedError, lambda: begin(51, quota)) == ("QUOTA_ADAPTER_BYTES", "quota.adapter_bytes")
    assert begin(50, quota) is True
    for _ in range(2):  # its own announcement does not count against itself
        assert begin(50, quota) is False
    lowered = partial(begin, 50, Quota(adapter_bytes=249))
    assert refusal(ResourceExhaustedError, lowered)[0] == "QUOTA_ADAPTER_BYTES"
    adapters.publish("local", "x", content_of("b", size_bytes=100), quota=quota, upload_id="up-1")
    assert begin(50, quota) is False


def test_a_quota_of_adapters_refuses_the_first_byte_of_a_new_name(uploads: Uploads, adapters: Adapters) -> None:
    quota = Quota(adapters=1)
    publish(adapters, "local", "x")
    other = partial(uploads.begin, "local", "up", "y", 1, quota)
    assert refusal(ResourceExhaustedError, other) == ("QUOTA_ADAPTERS", "quota.adapters")
    assert uploads.store_ids() == set()
    assert uploads.begin("local", "up", "x", 1, quota)


def test_aliases_that_would_be_too_many_refuse_the_first_byte(uploads: Uploads, adapters: Adapters) -> None:
    names = [f"a{number}" for number in range(MAX_ALIASES - 1)]
    publish(adapters, "local", "x", "a", *names)
    publish(adapters, "local", "y", "a", "other")
    begin = partial(uploads.begin, "local", "up", "x", 100, NO_LIMITS)
    assert refusal(ResourceExhaustedError, partial(begin, aliases=["b", "c"])) == ("TOO_MANY_ALIASES", "aliases")
    assert uploads.store_ids() == set()
    for aliases in ([*names, "b"], ["b", "b"], names[:5], []):
        begin(aliases=aliases)
        adapters.publish("local", "x", content_of("b"), aliases, quota=NO_LIMITS, upload_id="up")
    begin(aliases=["b"])
    assert refusal(ResourceExhaustedError, partial(begin, aliases=["c"])) == ("TOO_MANY_ALIASES", "aliases")


def test_those_who_begin_at_once_do_not_pass_a_bound_together(uploads: Uploads) -> None:
    begin = partial(uploads.begin, "local", name="x", size_bytes=100, quota=Quota(adapter_bytes=250))
    results = at_once(*(partial(begin, f"up-{number}") for number in range(4)))
    assert sorted(map(repr, map(type, results))) == sorted(map(repr, [bool] * 2 + [ResourceExhaustedError] * 2))


# --- expiry ----------------------------------------------------------------------------------------------------------


def test_what_nobody_touched_is_forgotten_but_for_what_somebody_streams(uploads: Uploads, clock: SteppedClock) -> None:
    for upload_id in ("old", "streamed", "touched"):
        uploads.begin("local", upload_id, "x", 1, NO_LIMITS)
    clock.advance(hours=1)
    uploads.touch("local", "touched")
    uploads.begin("local", "new", "x", 1, NO_LIMITS)
    moment = clock() - timedelta(minutes=30)
    assert uploads.forget_untouched(moment, {store_id("local", "streamed")}) == 1
    assert uploads.store_ids() == {store_id("local", id) for id in ("streamed", "touched", "new")}
    assert uploads.forget_untouched(clock(), set()) == 1
    assert uploads.forget_untouched(clock() + timedelta(microseconds=1), set()) == 2
