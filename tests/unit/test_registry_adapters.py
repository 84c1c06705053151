"""Adapters: numbers that are never given twice, what a repeat does, what a quota holds, and what deleting leaves."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
from adapter_registry import NO_LIMITS, at_once, content_of, meaning, publish
from motley_server.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from motley_server.registry.adapters import Adapters
from motley_server.registry.database import Database
from motley_server.registry.names import parse_reference
from motley_server.registry.records import AdapterVersion, Quota, Visibility
from motley_server.registry.schema import adapter_versions
from motley_server.registry.tenants import Tenants
from sqlalchemy import select

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

WORKERS = 4


def test_what_was_published_is_what_is_found(adapters: Adapters, clock: SteppedClock) -> None:
    content = content_of("a", labels={"team": "search", "a.b": "\N{SNOWMAN} 'two' \"words\""})
    made = adapters.publish("local", "legal", content, ["prod"], quota=NO_LIMITS)
    assert adapters.resolve("local", parse_reference("legal@prod")) == made
    assert {name: value for name, value in asdict(made).items() if name in asdict(content)} == asdict(content)
    assert made.files == content.files
    assert (made.owner, made.name, made.version, made.created_at) == ("local", "legal", 1, clock())
    assert (made.name_for("local"), made.name_for("acme")) == ("legal", "local/legal")


def test_every_form_of_a_name_finds_its_version(adapters: Adapters) -> None:
    publish(adapters, "local", "x", "a")
    publish(adapters, "local", "x", "b", "prod")
    publish(adapters, "local", "x", "a", "old")  # the content of the first once more
    wanted = {
        "x": 1, "x@default": 1, "x@prod": 2, "x@old": 3, "x@2": 2, "local/x@1": 1, "x@4": None, "x@none": None,
        "y": None,
        f"x@{content_of('a').digest}": 3, f"x@{content_of('b').digest}": 2, f"x@{content_of('c').digest}": None,
        "x@" + "9" * 18: None,
    }  # fmt: skip
    assert {text: meaning(adapters, "local", text) for text in wanted} == wanted


def test_a_name_without_aliases_is_found_by_its_number_alone(adapters: Adapters) -> None:
    adapters.publish("local", "x", content_of(), quota=NO_LIMITS)
    assert (meaning(adapters, "local", "x"), meaning(adapters, "local", "x@1")) == (None, 1)


def test_two_names_and_two_owners_count_by_themselves(adapters: Adapters, tenants: Tenants) -> None:
    tenants.create("acme")
    names = [("local", "x"), ("local", "y"), ("acme", "x"), ("public", "x"), ("local", "x")]
    numbers = [
        publish(adapters, owner, name, letter).version for letter, (owner, name) in zip("abcde", names, strict=True)
    ]
    assert numbers == [1, 1, 1, 1, 2]


def test_the_newest_version_once_more_is_that_version(adapters: Adapters) -> None:
    first = publish(adapters, "local", "x", "a")
    assert publish(adapters, "local", "x", "a", "prod") == first
    assert meaning(adapters, "local", "x@prod") == 1
    other_files = replace(content_of("a"), bundle=content_of("b").bundle)
    other_digest = replace(other_files, digest=content_of("b").digest)
    for number, content in enumerate((other_files, other_digest, content_of("a")), 2):
        assert adapters.publish("local", "x", content, quota=NO_LIMITS).version == number


def test_publishers_at_once_get_numbers_in_a_row(adapters: Adapters) -> None:
    letters = "0123456789ab"
    for start in range(0, len(letters), WORKERS):
        chosen = letters[start : start + WORKERS]
        results = at_once(*(partial(publish, adapters, "local", "x", letter) for letter in chosen))
        numbers = sorted(result.version for result in results if isinstance(result, AdapterVersion))
        assert numbers == list(range(start + 1, start + WORKERS + 1))


def test_a_name_of_another_form_is_refused(adapters: Adapters) -> None:
    for name in ("", "A", "a/b", "a\x00", "../a", "a@b", "a" * 129, "a" * 10_000_000):
        with pytest.raises(InvalidArgumentError) as refusal:
            publish(adapters, "local", name)
        assert (refusal.value.reason, refusal.value.field) == ("INVALID_ADAPTER_NAME", "adapter_name")
        assert len(refusal.value.message) < 1000


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"A": ""}, "labels"),
        ({"": ""}, "labels"),
        ({"a\x00": ""}, "labels"),
        ({'a"b': ""}, "labels"),
        ({"a": "\x00"}, "labels[a]"),
        ({"a": "\udc80"}, "labels[a]"),
        ({"a": "x" * 201}, "labels[a]"),
        ({f"a{number}": "" for number in range(33)}, "labels"),
    ],
)
def test_labels_are_few_short_and_printable(adapters: Adapters, labels: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        adapters.publish("local", "x", content_of(labels=labels), quota=NO_LIMITS)
    assert (refusal.value.reason, refusal.value.field) == ("INVALID_LABEL", field)
    assert adapters.live_bundles() == set()


def test_nobody_publishes_for_a_tenant_that_is_gone(adapters: Adapters, tenants: Tenants) -> None:
    for owner in ("acme", "a\x00"):
        with pytest.raises(NotFoundError) as refusal:
            publish(adapters, owner, "x")
        assert refusal.value.reason == "TENANT_NOT_FOUND"


# --- quotas ----------------------------------------------------------------------------------------------------------


def test_a_quota_of_adapters_counts_names_that_have_a_version(adapters: Adapters) -> None:
    quota = Quota(adapters=2)
    add = partial(adapters.publish, "local", quota=quota)
    add("x", content_of("a"))
    add("y", content_of("b"))
    with pytest.raises(ResourceExhaustedError) as refusal:
        add("z", content_of("c"))
    assert (refusal.value.reason, refusal.value.field) == ("QUOTA_ADAPTERS", "quota.adapters")
    assert add("x", content_of("c")).version == 2
    adapters.delete_version("local", "local", "y", 1)
    assert add("z", content_of("c")).version == 1
    with pytest.raises(ResourceExhaustedError):
        add("y", content_of("b"))


def test_a_quota_of_bytes_counts_every_version_whole(adapters: Adapters, tenants: Tenants) -> None:
    tenants.create("acme")
    publish(adapters, "acme", "x")  # another's bytes are not mine
    quota = Quota(adapter_bytes=250)
    add = partial(adapters.publish, "local", quota=quota)
    add("x", content_of("a"))
    add("y", content_of("a"))
    with pytest.raises(ResourceExhaustedError) as refusal:
        add("x", content_of("c", size_bytes=51))
    assert (refusal.value.reason, refusal.value.field) == ("QUOTA_ADAPTER_BYTES", "quota.adapter_bytes")
    add("x", content_of("c", size_bytes=50))
    add("x", content_of("c", size_bytes=50))  # is the newest already, and takes nothing
    adapters.delete_version("local", "local", "y", 1)
    add("z", content_of("d"))


def test_publishers_at_once_do_not_pass_a_quota_together(adapters: Adapters) -> None:
    add = partial(adapters.publish, "local", quota=Quota(adapters=1))
    results = at_once(*(partial(add, f"x{letter}", content_of(letter)) for letter in "abcd"))
    assert sorted(type(result).__name__ for result in results) == ["AdapterVersion"] + ["ResourceExhaustedError"] * 3


# --- deleting --------------------------------------------------------------------------------------------------------


def test_a_number_is_not_given_twice(adapters: Adapters) -> None:
    for number, letter in enumerate("abab", 1):
        assert adapters.publish("local", "x", content_of(letter), quota=NO_LIMITS).version == number
        adapters.delete_version("local", "local", "x", number)
        assert meaning(adapters, "local", f"x@{number}") is None
        assert meaning(adapters, "local", f"x@{content_of(letter).digest}") is None
    with pytest.raises(NotFoundError) as missing:
        adapters.get("local", "local", "x")
    assert missing.value.reason == "ADAPTER_NOT_FOUND"


def test_what_an_alias_points_at_is_not_deleted(adapters: Adapters) -> None:
    publish(adapters, "local", "x", "a", "prod", "default")
    publish(adapters, "local", "x", "b", "default")
    with pytest.raises(FailedPreconditionError) as refusal:
        adapters.delete_version("local", "local", "x", 1)
    assert (refusal.value.reason, refusal.value.field) == ("VERSION_HAS_ALIAS", "version")
    assert "prod" in refusal.value.message
    adapters.set_alias("local", "local", "x", "prod", 0)
    assert adapters.delete_version("local", "local", "x", 1).digest == content_of("a").digest
    for number in (1, 3, 0, -1):
        with pytest.raises(NotFoundError) as missing:
            adapters.delete_version("local", "local", "x", number)
        assert (missing.value.reason, missing.value.field) == ("VERSION_NOT_FOUND", "version")


def test_a_bundle_lives_as_long_as_one_version_of_anybody_needs_it(adapters: Adapters, tenants: Tenants) -> None:
    tenants.create("acme")
    for owner, name, letter in (("local", "x", "a"), ("acme", "x", "a"), ("acme", "y", "b")):
        adapters.publish(owner, name, content_of(letter), quota=NO_LIMITS)
    first, second = content_of("a").bundle, content_of("b").bundle
    assert adapters.live_bundles() == {first, second}
    adapters.delete_version("local", "local", "x", 1)
    adapters.delete_version("acme", "acme", "y", 1)
    assert adapters.live_bundles() == {first}
    adapters.delete_version("acme", "acme", "x", 1)
    assert adapters.live_bundles() == set()


def test_a_name_that_comes_back_is_private(adapters: Adapters, tenants: Tenants) -> None:
    tenants.create("acme")
    for visibility, shared_with in ((Visibility.TENANTS, ["acme"]), (Visibility.PUBLIC, [])):
        number = publish(adapters, "local", "x", "a").version
        adapters.share("local", "local", "x", visibility, shared_with)
        assert meaning(adapters, "acme", "local/x") == number
        adapters.set_alias("local", "local", "x", "default", 0)
        adapters.delete_version("local", "local", "x", number)
        publish(adapters, "local", "x", "a")
        assert meaning(adapters, "acme", "local/x") is None
        assert adapters.get("local", "local", "x").shared_with == ()


def test_a_tenant_with_adapters_stays(adapters: Adapters, tenants: Tenants) -> None:
    tenants.create("acme")
    publish(adapters, "acme", "x", "a")
    adapters.share("acme", "acme", "x", Visibility.TENANTS, ["local"])
    with pytest.raises(FailedPreconditionError) as refusal:
        tenants.delete("acme")
    assert (refusal.value.reason, refusal.value.field) == ("TENANT_OWNS_ADAPTERS", "id")
    assert meaning(adapters, "local", "acme/x") == 1
    adapters.set_alias("acme", "acme", "x", "default", 0)
    adapters.delete_version("acme", "acme", "x", 1)
    tenants.delete("acme")


def test_who_takes_a_tenants_name_goes_on_with_its_numbers_and_with_nothing_else(
    adapters: Adapters, tenants: Tenants, clock: SteppedClock
) -> None:
    tenants.create("acme")
    for letter in "ab":
        adapters.publish("acme", "x", content_of(letter), quota=NO_LIMITS)
    adapters.share("acme", "acme", "x", Visibility.TENANTS, ["local"])
    for number in (1, 2):
        adapters.delete_version("acme", "acme", "x", number)
    tenants.delete("acme")
    tenants.create("acme")  # somebody else
    clock.advance(hours=1)
    assert adapters.list("acme").items == ()
    made = adapters.publish("acme", "x", content_of("b"), quota=Quota(adapters=1, adapter_bytes=100))
    assert (made.version, made.created_at) == (3, clock())
    record = adapters.get("acme", "acme", "x")
    assert (record.visibility, record.shared_with, record.created_at) == (Visibility.PRIVATE, (), clock())
    assert [meaning(adapters, tenant, "acme/x@3") for tenant in ("acme", "local")] == [3, None]


def test_nothing_stays_of_a_version_that_was_deleted(adapters: Adapters, database: Database) -> None:
    for letter in "ab":
        adapters.publish("local", "x", content_of(letter), quota=NO_LIMITS)
    first = adapters.resolve("local", parse_reference("x@1"))
    assert adapters.delete_version("local", "local", "x", 1) == first
    with database.reading() as connection:
        assert connection.execute(select(adapter_versions.c.version)).scalars().all() == [2]


def test_who_takes_a_tenants_name_inherits_no_share(adapters: Adapters, tenants: Tenants) -> None:
    tenants.create("acme")
    publish(adapters, "local", "x")
    adapters.share("local", "local", "x", Visibility.TENANTS, ["acme"])
    tenants.delete("acme")
    tenants.create("acme")
    assert meaning(adapters, "acme", "local/x") is None
    assert adapters.get("local", "local", "x").shared_with == ()


# --- repeats ---------------------------------------------------------------------------------------------------------


def test_a_repeat_changes_nothing_whatever_happened_since(
    adapters: Adapters, tenants: Tenants, clock: SteppedClock
) -> None:
    tenants.create("acme")
    content = content_of("a", labels={"team": "search"})
    add = partial(adapters.publish, "local", "x", content, ["default"], quota=NO_LIMITS, request_id="add")
    point = partial(adapters.set_alias, "local", "local", "x", "default", 2, request_id="point")
    back = partial(adapters.rollback_alias, "local", "local", "x", "default", request_id="back")
    share = partial(adapters.share, "local", "local", "x", Visibility.TENANTS, ["acme"], request_id="share")
    remove = partial(adapters.delete_version, "local", "local", "x", 2, request_id="remove")
    added = add()
    publish(adapters, "local", "x", "b", "other")
    pointed, returned, shared = point(), back(), share()
    adapters.share("local", "local", "x", Visibility.PRIVATE)
    adapters.set_alias("local", "local", "x", "other", 0)
    removed = remove()
    clock.advance(hours=23)
    assert (add(), point(), back(), share(), remove()) == (added, pointed, returned, shared, removed)
    assert meaning(adapters, "local", "x") == 1
    assert (meaning(adapters, "local", "x@2"), meaning(adapters, "acme", "local/x")) == (None, None)
    assert [version.version for version in adapters.list_versions("local", "local", "x").items] == [1]


def test_another_content_under_the_same_request_id_is_refused(adapters: Adapters) -> None:
    def add(letter: str, *aliases: str, created_by: str = "") -> AdapterVersion:
        content = replace(content_of(letter), created_by=created_by)
        return adapters.publish("local", "x", content, aliases, quota=NO_LIMITS, request_id="one")

    made = add("a", "prod")
    assert add("a", "prod", created_by="another key") == made
    for letter, alias in (("b", "prod"), ("a", "default")):
        with pytest.raises(AlreadyExistsError) as refusal:
            add(letter, alias)
        assert refusal.value.reason == "REQUEST_ID_REUSED"
    with pytest.raises(AlreadyExistsError):
        adapters.delete_version("local", "local", "x", 1, request_id="one")
