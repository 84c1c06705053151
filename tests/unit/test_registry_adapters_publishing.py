"""Publishing twice, pinning, and what may be deleted: repeats by request id and by content, and what is kept apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
from adapter_registry import NO_LIMITS, content_of, meaning, publish
from motley_server.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError, ResourceExhaustedError
from motley_server.registry.adapters import Adapters
from motley_server.registry.names import parse_reference
from motley_server.registry.records import AdapterVersion, Quota
from motley_server.registry.tenants import Tenants
from motley_server.registry.uploads import Uploads

if TYPE_CHECKING:
    from registry_databases import SteppedClock

pytest_plugins = ["registry_databases"]

TEAM = {"team": "search"}


def test_the_newest_version_with_other_labels_is_another(adapters: Adapters) -> None:
    add = partial(adapters.publish, "local", "x", quota=NO_LIMITS)
    numbers = [add(content_of("a", labels=labels)).version for labels in ({}, TEAM, TEAM, {"team": "ads"}, {}, {})]
    assert numbers == [1, 2, 2, 3, 4, 4]


def test_the_newest_is_whatever_nobody_deleted(adapters: Adapters) -> None:
    assert adapters.newest("local", "x") is None
    made = [publish(adapters, "local", "x", letter, "at") for letter in "ab"]
    assert adapters.newest("local", "x") == made[1]
    adapters.set_alias("local", "local", "x", "at", 1)
    adapters.delete_version("local", "local", "x", 2)
    assert adapters.newest("local", "x") == made[0]
    for owner, name in (("public", "x"), ("local", "a\x00"), ("\udc80", "x")):
        assert adapters.newest(owner, name) is None


def test_an_earlier_publication_is_found_by_what_was_known_before_its_bytes(
    adapters: Adapters, clock: SteppedClock
) -> None:
    content = content_of("a", labels=TEAM)
    earlier = partial(adapters.earlier_publication, "local", "x", content.bundle, TEAM, ["default"])
    assert earlier(request_id="up", scope="local") is None
    made = adapters.publish("local", "x", content, ["default"], quota=NO_LIMITS, request_id="up", scope="local")
    publish(adapters, "local", "x", "b")
    assert earlier(request_id="up", scope="local") == made
    assert earlier(request_id="up", scope="acme") is None
    assert earlier(request_id="", scope="local") is None
    clock.advance(hours=25)
    assert earlier(request_id="up", scope="local") is None


def test_a_publication_whose_version_was_deleted_counts_no_more_and_is_made_anew(adapters: Adapters) -> None:
    def push(letter: str, *aliases: str) -> AdapterVersion:
        content = content_of(letter)
        return adapters.publish("local", "x", content, aliases, quota=NO_LIMITS, request_id=letter, scope="local")

    earlier = partial(
        adapters.earlier_publication,
        *("local", "x", content_of("b").bundle, {}, ["default"]),
        request_id="b",
        scope="local",
    )
    assert [push(letter, "default").version for letter in "ab"] == [1, 2]
    adapters.rollback_alias("local", "local", "x", "default")
    adapters.delete_version("local", "local", "x", 2)
    assert earlier() is None
    with pytest.raises(AlreadyExistsError):
        push("b", "default", "prod")
    made = push("b", "default")
    assert (made.version, meaning(adapters, "local", "x")) == (3, 3)
    adapters.rollback_alias("local", "local", "x", "default")
    assert push("b", "default") == earlier() == made
    assert meaning(adapters, "local", "x") == 1
    assert meaning(adapters, "local", "x@2") is None


def test_a_publication_is_the_same_whatever_its_validation_found_and_whoever_made_it(adapters: Adapters) -> None:
    content = content_of("a")
    add = partial(adapters.publish, "local", "x", quota=NO_LIMITS, request_id="up")
    made = add(content)
    found_otherwise = replace(content, digest=f"sha256:{'9' * 64}", device_bytes=1, ranks={}, created_by="other")
    assert add(found_otherwise) == made


@pytest.mark.parametrize(
    "other",
    [
        {"owner": "public"},
        {"name": "y"},
        {"bundle": content_of("b").bundle},
        {"labels": {}},
        {"aliases": []},
        {"aliases": ["prod"]},
    ],
)
def test_another_publication_under_the_same_request_id_is_refused_early_and_late(
    adapters: Adapters, other: dict[str, object]
) -> None:
    asked = {"owner": "local", "name": "x", "bundle": content_of("a").bundle, "labels": TEAM, "aliases": ["default"]}
    content = content_of("a", labels=TEAM)
    adapters.publish("local", "x", content, ["default"], quota=NO_LIMITS, request_id="up")
    changed = asked | other
    late = replace(content, bundle=changed["bundle"], labels=changed["labels"])
    calls: list[Callable[[], object]] = [
        lambda: adapters.earlier_publication(**changed, request_id="up", scope=""),
        lambda: adapters.publish(
            changed["owner"], changed["name"], late, changed["aliases"], quota=NO_LIMITS, request_id="up"
        ),
    ]
    for call in calls:
        with pytest.raises(AlreadyExistsError) as refusal:
            call()
        assert (refusal.value.reason, refusal.value.field) == ("REQUEST_ID_REUSED", "request_id")
    assert adapters.newest("local", "x").version == 1


def test_a_publication_takes_its_upload_off_the_record_in_one_step(adapters: Adapters, uploads: Uploads) -> None:
    for upload_id in ("up-1", "up-2", "up-3"):
        uploads.begin("local", upload_id, "x", 100, NO_LIMITS)
    add = partial(adapters.publish, "local", "x", upload_id="up-1")
    with pytest.raises(ResourceExhaustedError):
        add(content_of("a"), quota=Quota(adapter_bytes=99))
    assert uploads.get("local", "up-1").size_bytes == 100
    add(content_of("a"), quota=NO_LIMITS, request_id="one")
    assert len(uploads.store_ids()) == 2
    adapters.publish("local", "x", content_of("a"), quota=NO_LIMITS, upload_id="up-2")  # the newest already
    uploads.begin("local", "up-1", "x", 100, NO_LIMITS)
    add(content_of("a"), quota=NO_LIMITS, request_id="one")  # a repeat
    assert uploads.get("local", "up-3").size_bytes == 100
    assert len(uploads.store_ids()) == 1


def test_an_upload_that_is_not_on_record_publishes_nothing_but_is_told_what_it_became(
    adapters: Adapters, uploads: Uploads, tenants: Tenants
) -> None:
    tenants.create("acme")
    uploads.begin("acme", "up", "x", 100, NO_LIMITS)
    tenants.delete("acme")
    tenants.create("acme")  # somebody else, who knows of no upload
    add = partial(adapters.publish, "acme", "x", quota=NO_LIMITS, upload_id="up", request_id="up", scope="acme")
    for upload_id in ("up", "u\x00p"):
        with pytest.raises(NotFoundError) as refusal:
            add(content_of("a"), upload_id=upload_id)
        assert (refusal.value.reason, refusal.value.field) == ("UPLOAD_NOT_FOUND", "upload_id")
    assert adapters.newest("acme", "x") is None
    uploads.begin("acme", "up", "x", 100, NO_LIMITS)
    made = add(content_of("a"))
    assert add(content_of("a")) == made
    adapters.delete_version("acme", "acme", "x", 1)
    with pytest.raises(NotFoundError, match="no such upload"):
        add(content_of("a"))


def test_a_version_is_pinned_until_it_is_not(adapters: Adapters, tenants: Tenants, clock: SteppedClock) -> None:
    tenants.create("acme")
    made: list[AdapterVersion] = []
    for owner, name, letter in (("local", "x", "a"), ("acme", "x", "b"), ("local", "x", "c")):
        clock.advance(seconds=1)
        made.append(publish(adapters, owner, name, letter))
    assert adapters.pinned() == ()
    for version in reversed(made):
        pinned = adapters.set_pinned(version.owner, version.owner, version.name, version.version, True)
        assert pinned == replace(version, is_pinned=True)
        assert adapters.set_pinned(version.owner, version.owner, version.name, version.version, True) == pinned
    assert adapters.pinned() == tuple(replace(version, is_pinned=True) for version in made)
    assert adapters.resolve("local", parse_reference("x@1")).is_pinned
    adapters.delete_version("local", "local", "x", 1)
    assert not adapters.set_pinned("acme", "acme", "x", 1, False).is_pinned
    assert [version.version for version in adapters.pinned()] == [2]
    with pytest.raises(NotFoundError) as missing:
        adapters.set_pinned("local", "local", "x", 1, True)
    assert missing.value.reason == "VERSION_NOT_FOUND"


def test_whether_a_version_could_be_deleted_is_told_without_deleting_it(adapters: Adapters) -> None:
    publish(adapters, "local", "x", "a", "prod")
    second = publish(adapters, "local", "x", "b", "default")
    for call in (adapters.check_deletable, adapters.delete_version):
        with pytest.raises(FailedPreconditionError) as refusal:
            call("local", "local", "x", 1)
        assert (refusal.value.reason, refusal.value.field) == ("VERSION_HAS_ALIAS", "version")
        with pytest.raises(NotFoundError) as missing:
            call("local", "local", "x", 3)
        assert (missing.value.reason, missing.value.field) == ("VERSION_NOT_FOUND", "version")
    adapters.set_alias("local", "local", "x", "default", 1)
    assert adapters.check_deletable("local", "local", "x", 2) == second
    assert adapters.delete_version("local", "local", "x", 2) == second
