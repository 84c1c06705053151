"""Aliases: one step from one version to another, one step back, and nothing in between."""

from __future__ import annotations

from functools import partial
from threading import Event, Thread

import pytest
from adapter_registry import NO_LIMITS, at_once, content_of, meaning, publish
from motley_server.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidArgumentError,
    MotleyError,
    NotFoundError,
    ResourceExhaustedError,
)
from motley_server.registry.adapters import Adapters
from motley_server.registry.aliases import MAX_ALIASES
from motley_server.registry.records import Alias

pytest_plugins = ["registry_databases"]

WORKERS = 4


@pytest.fixture
def moved(adapters: Adapters) -> Adapters:
    """Return adapters of which `local/x` has three versions, `default` at the first."""
    for letter, alias in (("a", "default"), ("b", "second"), ("c", "third")):
        publish(adapters, "local", "x", letter, alias)
    return adapters


def point(adapters: Adapters, version: int, etag: str | None = None, alias: str = "default") -> Alias:
    return adapters.set_alias("local", "local", "x", alias, version, etag=etag)


def back(adapters: Adapters, etag: str | None = None, alias: str = "default") -> Alias:
    return adapters.rollback_alias("local", "local", "x", alias, etag=etag)


def seen(adapters: Adapters, alias: str = "default") -> Alias:
    return next(found for found in adapters.get("local", "local", "x").aliases if found.alias == alias)


def test_an_alias_moves_and_remembers_where_it_was(moved: Adapters) -> None:
    first = seen(moved)
    assert (first.version, first.previous_version) == (1, 0)
    second = point(moved, 3)
    assert (second.version, second.previous_version, meaning(moved, "local", "x")) == (3, 1, 3)
    third = back(moved)
    assert (third.version, third.previous_version, meaning(moved, "local", "x")) == (1, 3, 1)
    fourth = back(moved)
    assert (fourth.version, meaning(moved, "local", "x")) == (3, 3)
    assert seen(moved) == fourth
    assert len({alias.etag for alias in (first, second, third, fourth)} | {""}) == 5


def test_where_it_points_already_it_stays_as_it_was(moved: Adapters) -> None:
    there = point(moved, 2)
    assert point(moved, 2) == point(moved, 2, there.etag) == there
    assert back(moved).version == 1


def test_an_old_etag_moves_nothing(moved: Adapters) -> None:
    old = seen(moved).etag
    new = point(moved, 2, old)
    for etag in (old, "", "nonsense"):
        for call in (partial(point, moved, 3, etag), partial(point, moved, 0, etag), partial(back, moved, etag)):
            with pytest.raises(AbortedError) as aborted:
                call()
            assert (aborted.value.reason, aborted.value.field) == ("ETAG_MISMATCH", "etag")
    assert seen(moved) == new
    assert back(moved, new.etag).version == 1


def test_an_empty_etag_is_that_of_an_alias_that_is_not_there(moved: Adapters) -> None:
    with pytest.raises(AbortedError):
        point(moved, 1, "something", "new")
    made = point(moved, 1, "", "new")
    assert seen(moved, "new") == made
    with pytest.raises(AbortedError):
        point(moved, 2, "", "new")


def test_a_removed_alias_is_not_there(moved: Adapters) -> None:
    etag = seen(moved).etag
    assert point(moved, 0) == Alias("default", 0, 1, "")
    assert meaning(moved, "local", "x") is None
    assert [alias.alias for alias in moved.get("local", "local", "x").aliases] == ["second", "third"]
    for call in (partial(point, moved, 0), partial(back, moved)):
        with pytest.raises(NotFoundError) as missing:
            call()
        assert (missing.value.reason, missing.value.field) == ("ALIAS_NOT_FOUND", "alias")
    with pytest.raises(AbortedError):
        point(moved, 1, etag)
    assert point(moved, 1, "").etag != etag


def test_an_alias_points_at_what_is_there(moved: Adapters) -> None:
    point(moved, 0, alias="third")
    moved.delete_version("local", "local", "x", 3)
    for version in (3, 4, -1):
        with pytest.raises(NotFoundError) as missing:
            point(moved, version)
        assert (missing.value.reason, missing.value.field) == ("VERSION_NOT_FOUND", "version")
    assert meaning(moved, "local", "x") == 1


def test_there_is_no_way_back_to_nowhere_or_to_what_was_deleted(moved: Adapters) -> None:
    with pytest.raises(FailedPreconditionError) as never:
        back(moved)
    point(moved, 2)
    moved.delete_version("local", "local", "x", 1)
    with pytest.raises(FailedPreconditionError) as gone:
        back(moved)
    assert (never.value.reason, gone.value.reason) == ("NO_PREVIOUS_VERSION",) * 2
    assert "deleted" in gone.value.message
    assert meaning(moved, "local", "x") == 2


@pytest.mark.parametrize("alias", ["", "3", "007", "Prod", "a b", "a\x00", "sha256:ab", "a/b", "a@b", "a" * 129])
def test_an_alias_is_a_name_and_no_number(moved: Adapters, alias: str) -> None:
    refusals = []
    for call in (partial(point, moved, 1, alias=alias), partial(back, moved, alias=alias)):
        with pytest.raises(InvalidArgumentError) as refusal:
            call()
        refusals.append((refusal.value.reason, refusal.value.field))
    with pytest.raises(InvalidArgumentError) as refusal:
        moved.publish("local", "x", content_of("d"), ["good", alias], quota=NO_LIMITS)
    refusals.append((refusal.value.reason, refusal.value.field))
    assert refusals == [("INVALID_ALIAS", "alias")] * 2 + [("INVALID_ALIAS", "aliases[1]")]
    assert meaning(moved, "local", "x@4") is None


def test_aliases_are_bounded_and_a_publication_that_needs_more_is_undone(moved: Adapters) -> None:
    room = MAX_ALIASES - 3
    with pytest.raises(ResourceExhaustedError) as refusal:
        publish(moved, "local", "x", "d", *(f"a{number}" for number in range(room + 1)))
    assert (refusal.value.reason, refusal.value.field) == ("TOO_MANY_ALIASES", "alias")
    assert (meaning(moved, "local", "x@4"), meaning(moved, "local", "x@a0")) == (None, None)
    publish(moved, "local", "x", "d", *(f"a{number}" for number in range(room)))
    assert point(moved, 3, alias="a0").version == 3


def test_of_two_moves_of_what_both_read_one_wins(moved: Adapters) -> None:
    for _ in range(10):
        before = seen(moved)
        others = [version for version in (1, 2, 3) if version != before.version]
        results = at_once(*(partial(point, moved, others[number % 2], before.etag) for number in range(WORKERS)))
        won = [result for result in results if not isinstance(result, MotleyError)]
        assert won == [seen(moved)]
        assert {result.reason for result in results if isinstance(result, MotleyError)} == {"ETAG_MISMATCH"}


def test_while_an_alias_moves_it_is_always_somewhere(moved: Adapters) -> None:
    is_over = Event()
    found: list[set[int | None]] = [set() for _ in range(2)]

    def look(number: int) -> None:
        while not is_over.is_set():
            found[number].add(meaning(moved, "local", "x"))

    threads = [Thread(target=look, args=(number,)) for number in range(len(found))]
    for thread in threads:
        thread.start()
    for _ in range(40):
        point(moved, 2)
        back(moved)
    is_over.set()
    for thread in threads:
        thread.join()
    assert set.union(*found) == {1, 2}


def test_a_version_is_not_deleted_under_an_alias_that_comes_to_it(moved: Adapters) -> None:
    for version in (2, 3):
        point(moved, 0, alias="second" if version == 2 else "third")
        removing = partial(moved.delete_version, "local", "local", "x", version)
        results = at_once(removing, partial(point, moved, version, alias="late"))
        assert sum(isinstance(result, MotleyError) for result in results) == 1
        assert meaning(moved, "local", "x@late") == meaning(moved, "local", f"x@{version}")
        if meaning(moved, "local", "x@late") is not None:
            point(moved, 0, alias="late")
