"""Who sees which adapter; what is missing, deleted or another's cannot be told apart, not by its cost either."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from adapter_registry import as_listed, content_of, meaning, publish, statements
from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry.adapters import Adapters
from motley_server.registry.names import parse_reference
from motley_server.registry.records import Visibility
from motley_server.registry.tenants import Tenants

pytest_plugins = ["registry_databases"]

DIGEST = content_of("a").digest


@pytest.fixture
def owned(adapters: Adapters, tenants: Tenants) -> Adapters:
    """Return adapters of which `acme` has `private`, `shared` with `friend`, `open` and `deleted`; public has `all`."""
    for tenant in ("acme", "friend", "stranger"):
        tenants.create(tenant)
    for owner, name in (
        ("acme", "private"),
        ("acme", "shared"),
        ("acme", "open"),
        ("acme", "deleted"),
        ("public", "all"),
    ):
        publish(adapters, owner, name)
    adapters.share("acme", "acme", "shared", Visibility.TENANTS, ["friend"])
    adapters.share("acme", "acme", "open", Visibility.PUBLIC)
    adapters.share("acme", "acme", "deleted", Visibility.PUBLIC)
    adapters.set_alias("acme", "acme", "deleted", "default", 0)
    adapters.delete_version("acme", "acme", "deleted", 1)
    return adapters


@pytest.mark.parametrize(
    ("tenant", "names"),
    [
        ("acme", ["acme/open", "acme/private", "acme/shared", "public/all"]),
        ("friend", ["acme/open", "acme/shared", "public/all"]),
        ("stranger", ["acme/open", "public/all"]),
        ("public", ["acme/open", "public/all"]),
    ],
)
def test_each_tenant_sees_its_own_and_what_is_shared_with_it(owned: Adapters, tenant: str, names: list[str]) -> None:
    every = ["acme/open", "acme/private", "acme/shared", "acme/deleted", "public/all"]
    listed = [f"{record.owner}/{record.name}" for record in owned.list(tenant).items]
    assert listed == names
    for suffix in ("", "@default", "@1", f"@{DIGEST}"):
        assert [name for name in sorted(every) if meaning(owned, tenant, name + suffix) == 1] == names
    got = []
    for name in sorted(every):
        try:
            record = owned.get(tenant, *name.split("/"))
            assert owned.list_versions(tenant, *name.split("/")).items == (as_listed(record.latest),)
            got.append(f"{record.owner}/{record.name}")
        except NotFoundError:
            with pytest.raises(NotFoundError):
                owned.list_versions(tenant, *name.split("/"))
    assert got == names


def test_a_name_without_an_owner_is_never_anothers(owned: Adapters) -> None:
    for name in ("open", "shared", "all"):
        assert meaning(owned, "friend", name) is None


def test_every_version_is_shared_and_later_ones_too(owned: Adapters) -> None:
    publish(owned, "acme", "shared", "b")
    assert [meaning(owned, "friend", f"acme/shared@{number}") for number in (1, 2)] == [1, 2]
    assert meaning(owned, "friend", "acme/shared") == 2


def test_what_is_no_longer_shared_is_gone_at_once(owned: Adapters) -> None:
    assert owned.share("acme", "acme", "shared", Visibility.TENANTS, ["stranger"]).shared_with == ("stranger",)
    assert (meaning(owned, "friend", "acme/shared"), meaning(owned, "stranger", "acme/shared")) == (None, 1)
    for visibility in (Visibility.PUBLIC, Visibility.PRIVATE):
        record = owned.share("acme", "acme", "shared", visibility)
        assert (record.visibility, record.shared_with) == (visibility, ())
    assert (meaning(owned, "stranger", "acme/shared"), meaning(owned, "acme", "shared")) == (None, 1)


def test_who_else_may_use_it_is_for_its_owners_eyes_alone(owned: Adapters) -> None:
    owned.share("acme", "acme", "shared", Visibility.TENANTS, ["stranger", "friend"])
    assert owned.get("acme", "acme", "shared").shared_with == ("friend", "stranger")
    seen = [owned.get("friend", "acme", "shared"), *owned.list("friend").items]
    assert {record.shared_with for record in seen} == {()}


def test_who_made_a_version_is_for_its_owners_eyes_alone(owned: Adapters) -> None:
    maker = content_of().created_by
    for tenant, wanted in (("acme", {maker}), ("friend", {""}), ("public", {""})):
        record = owned.get(tenant, "acme", "open")
        listed = [record.latest for record in owned.list(tenant, filter="owner=acme").items]
        seen = [record.latest, *listed, *owned.list_versions(tenant, "acme", "open").items]
        assert {version.created_by for version in seen} == wanted
    assert owned.get("public", "public", "all").latest.created_by == maker
    assert owned.share("acme", "acme", "open", Visibility.PRIVATE).latest.created_by == maker


# --- one answer, one cost --------------------------------------------------------------------------------------------

NOT_THERE = {
    "a stranger's": "acme/private",
    "a friend's that is shared with others": "acme/shared",
    "deleted": "acme/deleted",
    "missing": "acme/missing",
    "of nobody": "nobody/missing",
    "one's own that is missing": "stranger/missing",
}


@pytest.mark.parametrize("suffix", ["", "@default", "@1", "@7", f"@{DIGEST}"])
def test_what_is_not_there_costs_the_same_queries_to_resolve(owned: Adapters, suffix: str) -> None:
    sent = {}
    for case, name in NOT_THERE.items():
        with statements() as sent[case]:
            assert meaning(owned, "stranger", name + suffix) is None
    with statements() as found:
        meaning(owned, "stranger", f"acme/open{suffix}")
    assert len(found) >= 1
    assert {case: texts for case, texts in sent.items() if texts != found} == {}


@pytest.mark.parametrize("suffix", ["", "@default", "@1", "@7", f"@{DIGEST}"])
def test_what_is_not_ones_own_costs_the_same_queries_to_ask_for(owned: Adapters, suffix: str) -> None:
    costs, answers = set(), set()
    for name in [*NOT_THERE.values(), "acme/open", "public/all"]:
        with statements() as sent, pytest.raises(NotFoundError) as missing:
            owned.own("stranger", parse_reference(name + suffix))
        costs.add(tuple(sent))
        answers.add((missing.value.reason, missing.value.field, missing.value.message.replace(name, "")))
    assert (len(costs), len(answers)) == (1, 1)


@pytest.mark.parametrize("suffix", ["", "@default", "@1", f"@{DIGEST}"])
def test_ones_own_is_what_the_name_means(owned: Adapters, suffix: str) -> None:
    for tenant, name in (("acme", "private"), ("acme", "acme/open"), ("public", "all"), ("public", "public/all")):
        reference = parse_reference(name + suffix)
        assert owned.own(tenant, reference) == owned.resolve(tenant, reference)


def test_what_is_not_there_has_one_answer_and_one_cost_in_every_method(owned: Adapters) -> None:
    calls: dict[str, Callable[..., object]] = {
        "get": owned.get,
        "list_versions": owned.list_versions,
        "set_alias": partial(owned.set_alias, alias="default", version=1),
        "remove_alias": partial(owned.set_alias, alias="default", version=0, etag="x"),
        "rollback_alias": partial(owned.rollback_alias, alias="default"),
        "share": partial(owned.share, visibility=Visibility.TENANTS, tenants=["friend"]),
        "delete_version": partial(owned.delete_version, version=1),
        "check_deletable": partial(owned.check_deletable, version=1),
        "set_pinned": partial(owned.set_pinned, version=1, is_pinned=True),
    }
    changing = set(calls) - {"get", "list_versions"}
    for method, call in calls.items():
        costs, answers = set(), set()
        # What may be used is no more one's own than what may not.
        cases = [*NOT_THERE.values(), *(["acme/open", "public/all"] if method in changing else [])]
        for name in cases:
            with statements() as sent, pytest.raises(NotFoundError) as missing:
                call("stranger", *name.split("/"))
            costs.add(tuple(sent))
            shown = name.removeprefix("stranger/")
            answers.add(
                (missing.value.reason, missing.value.field, missing.value.message.replace(name, "").replace(shown, ""))
            )
        assert (method, len(costs), len(answers)) == (method, 1, 1)
        assert {reason for reason, _, _ in answers} == {"ADAPTER_NOT_FOUND"}
    assert meaning(owned, "acme", "private") == 1


def test_names_that_nobody_can_have_are_not_found(owned: Adapters) -> None:
    for owner, name in (("a\x00", "x"), ("acme", "\udc80"), ("", ""), ("acme", "a" * 10_000_000)):
        calls = (
            partial(owned.get, "acme", owner, name),
            partial(owned.list_versions, "acme", owner, name),
            partial(owned.share, "acme", owner, name, Visibility.PUBLIC),
        )
        for call in calls:
            with pytest.raises(NotFoundError) as missing:
                call()
            assert len(missing.value.message) < 1000


# --- whom it is shared with ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visibility", "named"),
    [
        (Visibility.PRIVATE, ["friend"]),
        (Visibility.PUBLIC, ["friend"]),
        (Visibility.TENANTS, []),
        (Visibility.TENANTS, ["friend", "friend"]),
        (Visibility.TENANTS, ["friend", "acme"]),
        (Visibility.TENANTS, [f"t{number}" for number in range(1001)]),
    ],
)
def test_a_share_that_says_two_things_is_refused(owned: Adapters, visibility: Visibility, named: list[str]) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        owned.share("acme", "acme", "private", visibility, named)
    assert (refusal.value.reason, refusal.value.field) == ("INVALID_SHARING", "tenants")
    assert owned.get("acme", "acme", "private").visibility is Visibility.PRIVATE


@pytest.mark.parametrize("nobody", ["nobody", "", "a\x00", "\udc80", "x" * 10_000_000, "public"])
def test_a_share_with_nobody_changes_nothing(owned: Adapters, nobody: str) -> None:
    with pytest.raises(NotFoundError) as missing:
        owned.share("acme", "acme", "shared", Visibility.TENANTS, ["stranger", nobody])
    assert (missing.value.reason, missing.value.field) == ("TENANT_NOT_FOUND", "tenants[1]")
    assert owned.get("acme", "acme", "shared").shared_with == ("friend",)
