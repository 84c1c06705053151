"""Lists of adapters and of versions: pages that hold everything once, and filters that say what they cannot read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from adapter_registry import NO_LIMITS, as_listed, content_of, publish, statements
from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry.adapters import Adapters
from motley_server.registry.database import Database
from motley_server.registry.records import Visibility
from motley_server.registry.schema import adapter_versions, aliases
from motley_server.registry.schema import adapters as table
from motley_server.registry.tenants import Tenants

pytest_plugins = ["registry_databases"]


def read_all(adapters: Adapters, tenant_id: str, page_size: int, filter: str = "") -> list[list[str]]:
    pages, token = [], ""
    while True:
        page = adapters.list(tenant_id, page_size, token, filter)
        pages.append([record.latest.name_for(tenant_id) for record in page.items])
        token = page.next_page_token
        if not token:
            return pages


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (0, [7])])
def test_pages_hold_every_adapter_once(adapters: Adapters, tenants: Tenants, size: int, lengths: list[int]) -> None:
    tenants.create("acme")
    for name in ("ab", "a_b", "a.b", "a-b", "b"):  # a locale would sort these otherwise
        publish(adapters, "local", name)
    publish(adapters, "public", "a")
    publish(adapters, "acme", "z")
    publish(adapters, "acme", "hidden")
    adapters.share("acme", "acme", "z", Visibility.PUBLIC)
    pages = read_all(adapters, "local", size)
    assert [len(page) for page in pages] == lengths
    assert [name for page in pages for name in page] == ["acme/z", "a-b", "a.b", "a_b", "ab", "b", "public/a"]


def test_a_record_has_its_own_aliases_and_its_newest_version(adapters: Adapters) -> None:
    for name, letters in (("x", "abc"), ("y", "de")):
        for letter in letters:
            publish(adapters, "local", name, letter, f"to-{letter}")
    adapters.set_alias("local", "local", "x", "to-c", 0)
    adapters.delete_version("local", "local", "x", 3)
    x, y = adapters.list("local").items
    assert ([alias.alias for alias in x.aliases], x.latest.version) == (["to-a", "to-b"], 2)
    assert ([alias.alias for alias in y.aliases], y.latest.version) == (["to-d", "to-e"], 2)
    got = [adapters.get("local", "local", name) for name in "xy"]
    assert [replace(record, latest=as_listed(record.latest)) for record in got] == [x, y]


def test_pages_are_read_without_what_is_long_of_every_version(adapters: Adapters) -> None:
    made = publish(adapters, "local", "x")
    with statements() as sent:
        versions = [record.latest for record in adapters.list("local").items]
    assert not any("ranks" in statement or "files" in statement for statement in sent)
    versions += adapters.list_versions("local", "local", "x").items
    assert versions == [as_listed(made)] * 2
    assert made.ranks
    assert made.files


def test_what_was_there_is_listed_once_while_others_come_and_go(adapters: Adapters) -> None:
    for name in "bdfhj":
        adapters.publish("local", name, content_of(), quota=NO_LIMITS)
    first = adapters.list("local", 2)
    publish(adapters, "local", "a")
    publish(adapters, "local", "e")
    adapters.delete_version("local", "local", "d", 1)
    second = adapters.list("local", 2, first.next_page_token)
    third = adapters.list("local", 2, second.next_page_token)
    assert [[r.name for r in page.items] for page in (first, second, third)] == [["b", "d"], ["e", "f"], ["h", "j"]]
    assert third.next_page_token == ""


def test_a_page_holds_1000_with_all_that_belongs_to_them(adapters: Adapters, database: Database) -> None:
    made = adapters.publish("local", "x0000", content_of(), quota=NO_LIMITS)
    keys = [{"owner": "local", "name": f"x{number:04}"} for number in range(1, 1001)]
    with database.writing() as connection:
        columns = connection.execute(adapter_versions.select()).mappings().one()
        now = made.created_at
        connection.execute(
            table.insert(), [key | {"visibility": "private", "last_version": 1, "created_at": now} for key in keys]
        )
        connection.execute(adapter_versions.insert(), [dict(columns) | key for key in keys])
        connection.execute(aliases.insert(), [key | {"alias": key["name"], "version": 1, "etag": ""} for key in keys])
    page = adapters.list("local", 5000)
    assert [record.name for record in page.items] == [f"x{number:04}" for number in range(1000)]
    assert [record.aliases[0].alias for record in page.items[1:]] == [f"x{number:04}" for number in range(1, 1000)]
    assert [record.name for record in adapters.list("local", 5000, page.next_page_token).items] == ["x1000"]


def test_versions_come_newest_first_without_the_deleted(adapters: Adapters) -> None:
    for letter in "abcdef":
        adapters.publish("local", "x", content_of(letter), quota=NO_LIMITS)
    adapters.delete_version("local", "local", "x", 4)
    numbers, token = [], ""
    while True:
        page = adapters.list_versions("local", "local", "x", 2, token)
        numbers.append([version.version for version in page.items])
        token = page.next_page_token
        if not token:
            break
    assert numbers == [[6, 5], [3, 2], [1]]


def test_a_token_is_for_its_list_its_filter_and_its_tenant(adapters: Adapters, tenants: Tenants) -> None:
    tenants.create("acme")
    for name in ("x", "y"):
        for letter in "ab":
            publish(adapters, "local", name, letter)
        adapters.share("local", "local", name, Visibility.PUBLIC)
    listing = adapters.list("local", 1).next_page_token
    versions = adapters.list_versions("local", "local", "x", 1).next_page_token
    wrong = (
        lambda: adapters.list("acme", 1, listing),
        lambda: adapters.list("local", 1, listing, "kind=lora"),
        lambda: adapters.list("local", 1, versions),
        lambda: adapters.list_versions("local", "local", "y", 1, versions),
        lambda: adapters.list_versions("local", "local", "x", 1, listing),
    )
    for call in wrong:
        with pytest.raises(InvalidArgumentError) as refusal:
            call()
        assert (refusal.value.reason, refusal.value.field) == ("BAD_PAGE_TOKEN", "page_token")


def test_a_token_shows_nothing_that_was_hidden_since(adapters: Adapters, tenants: Tenants) -> None:
    tenants.create("acme")
    for letter in "ab":
        publish(adapters, "acme", "x", letter)
    adapters.share("acme", "acme", "x", Visibility.PUBLIC)
    token = adapters.list_versions("local", "acme", "x", 1).next_page_token
    adapters.share("acme", "acme", "x", Visibility.PRIVATE)
    with pytest.raises(NotFoundError):
        adapters.list_versions("local", "acme", "x", 1, token)


# --- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filter", "names"),
    [
        ("", ["acme/z", "x", "y"]),
        ("  ", ["acme/z", "x", "y"]),
        ("owner=local", ["x", "y"]),
        ("owner=nobody", []),
        ("name=z", ["acme/z"]),
        ("kind=goat", ["y"]),
        ("kind=lora  owner=local", ["x"]),
        ("labels.team=search", ["x"]),
        ("labels.team=search kind=goat", []),
        ('labels.a.b="two words"', ["y"]),
        (r"labels.a.b=two\ words", ["y"]),
        ('labels.quote="it\'s"', ["y"]),
        ("labels.empty=", ["y"]),
        ("labels.team=old", []),  # that of a version before the newest
        ("labels.none=x", []),
        ("labels.team=% labels.team=search", []),
    ],
)
def test_a_filter_keeps_what_holds_all_its_terms(
    adapters: Adapters, tenants: Tenants, filter: str, names: list[str]
) -> None:
    tenants.create("acme")
    odd = {"a.b": "two words", "quote": "it's", "empty": ""}
    adapters.publish("local", "x", content_of("a", labels={"team": "old"}), quota=NO_LIMITS)
    adapters.publish("local", "x", content_of("b", labels={"team": "search"}), quota=NO_LIMITS)
    adapters.publish("local", "y", content_of("c", kind="goat", labels=odd), quota=NO_LIMITS)
    adapters.publish("acme", "z", content_of("d"), quota=NO_LIMITS)
    adapters.share("acme", "acme", "z", Visibility.PUBLIC)
    assert read_all(adapters, "local", 0, filter) == [names]
    assert [name for page in read_all(adapters, "local", 1, filter) for name in page] == names


@pytest.mark.parametrize(
    "filter",
    [
        "lora", "=", "=x", "colour=red", "kind=", "kind=Lora", "state=ready", "name=a/b", "owner=a\x00b",
        "name=a\nowner=b", 'labels.a="x', "labels.=x", "labels.A=x", "labels.a", "name=x\\", "\udc80=x",
        "labels.a=" + "x" * 201, "name=" + "x" * 10_000_000, "kind=lora " * 21, "name==x", "' or 1=1 --",
    ],
)  # fmt: skip
def test_a_filter_that_cannot_be_read_is_refused(adapters: Adapters, filter: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        adapters.list("local", filter=filter)
    assert (refusal.value.reason, refusal.value.field) == ("BAD_FILTER", "filter")
    assert len(refusal.value.message) < 1000
