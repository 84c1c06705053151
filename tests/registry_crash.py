"""The registry's work, done by processes of which each dies at another point, and what must hold of what it leaves.

Run as a program, it has a process of its own do the work for each chosen point, up to that point, and another one look
at the outcome; it tells on its last line how that went. It is a small process without torch that forks, so that a
hundred lives take seconds. What is left must be what tenants saw before the act in which it happened, or after
it; after it if the act was acknowledged.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from adapter_registry import as_listed, meaning
from bundle_uploads import Adapter, bundles_in, paths_in
from dying_registry import DIED, KILLED, DyingDatabase, DyingDisk, in_a_child
from in_memory import MEMORY
from motley_server.errors import NotFoundError
from motley_server.registry.database import Database
from motley_server.registry.disk import Disk
from motley_server.registry.names import parse_reference
from motley_server.registry.records import Visibility
from registry_house import STORE, House

CHUNK = 20  # bytes: a file at once
ONE, TWO, THREE, HALF = (Adapter(mark) for mark in ("one", "two", "three", "half"))

State = dict[str, object]


class Clock:
    """Say the time that the work has come to; every process begins at the same."""

    def __init__(self) -> None:
        self.time = datetime(2026, 3, 29, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


# --- the work --------------------------------------------------------------------------------------------------------


def upload(house: House, upload_id: str, name: str, adapter: Adapter, *aliases: str) -> None:
    house.upload("acme", upload_id, name, adapter, aliases or ("default",), chunk=CHUNK)


def begin_half(house: House, upload_id: str) -> None:
    house.begin("acme", upload_id, "half", HALF)
    house.send("acme", upload_id, Adapter(HALF.mark, 13), CHUNK)


def abort(house: House, clock: Clock) -> None:
    begin_half(house, "up-half")
    house.publication.abort("acme", "up-half")


def expire(house: House, clock: Clock) -> None:
    begin_half(house, "up-left")
    clock.time += timedelta(hours=25)
    house.collect()


def share(house: House, clock: Clock) -> None:
    house.adapters.share("acme", "acme", "legal", Visibility.TENANTS, ["friend"], request_id="share")


def point(house: House, clock: Clock) -> None:
    house.adapters.set_alias("acme", "acme", "legal", "prod", 1, request_id="point")


def roll_back(house: House, clock: Clock) -> None:
    house.adapters.rollback_alias("acme", "acme", "legal", "prod", request_id="back")


def remove_alias(house: House, clock: Clock) -> None:
    house.adapters.set_alias("acme", "acme", "support", "default", 0, request_id="remove")


def delete(house: House, clock: Clock) -> None:
    house.adapters.delete_version("acme", "acme", "support", 1, request_id="delete")


# Each may be done again by whoever did not hear of its end.
ACTS: dict[str, Callable[[House, Clock], object]] = {
    "upload": lambda house, clock: upload(house, "up-1", "legal", ONE),
    "upload another": lambda house, clock: upload(house, "up-2", "support", TWO),
    "upload a second version": lambda house, clock: upload(house, "up-3", "legal", THREE, "default", "prod"),
    "upload bytes that are there": lambda house, clock: upload(house, "up-4", "copy", ONE),
    "point an alias": point,
    "roll it back": roll_back,
    "share": share,
    "pin": lambda house, clock: house.adapters.set_pinned("acme", "acme", "legal", 2, True),
    "remove an alias": remove_alias,
    "delete": delete,
    "abort": abort,
    "collect": lambda house, clock: house.collect(),
    "collect again": lambda house, clock: house.collect(),
    "upload bytes that were removed": lambda house, clock: upload(house, "up-5", "support", TWO),
    "expire": expire,
}
UPLOADS = {"upload": "up-1", "upload another": "up-2", "upload a second version": "up-3"}
UPLOADS |= {"upload bytes that are there": "up-4", "upload bytes that were removed": "up-5"}
# Where a loss of power can take what a killed process leaves, each kind once.
ACTS_ON_DISK = [
    "upload", "upload bytes that are there", "abort", "collect", "collect again", "upload bytes that were removed",
    "expire",
]  # fmt: skip


def work(root: Path, disk: DyingDisk, say: Callable[[str], None]) -> None:
    """Do everything, and say of each act when it is acknowledged."""
    database = DyingDatabase.open(f"sqlite:///{root / 'registry.sqlite3'}", clock=(clock := Clock()))
    assert isinstance(database, DyingDatabase)
    database.disk = disk
    house = House.of(root, database, clock, disk)
    for name, act in ACTS.items():
        act(house, clock)
        say(name)


# --- looking ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened(root: Path, clock: Clock, disk: Disk | None = None) -> Iterator[House]:
    database = Database.open(f"sqlite:///{root / 'registry.sqlite3'}", clock=clock)
    house = House.of(root, database, clock, disk)
    try:
        yield house
    finally:
        house.store.close()
        database.close()


def state_of(house: House) -> State:
    """Return what tenants see, as JSON has it."""
    state: State = {}
    for record in house.adapters.list("acme").items:
        versions = house.adapters.list_versions("acme", "acme", record.name).items
        seen = {
            "sharing": [record.visibility.value, record.shared_with],
            "aliases": [(alias.alias, alias.version, alias.previous_version) for alias in record.aliases],
            "versions": [(version.version, version.digest, version.bundle, version.is_pinned) for version in versions],
            "a friend's": meaning(house.adapters, "friend", f"acme/{record.name}"),
        }
        state[record.name] = json.loads(json.dumps(seen))
    return state


def is_on_record(house: House, upload_id: str) -> bool:
    try:
        house.uploads.get("acme", upload_id)
    except NotFoundError:
        return False
    return True


def check_whole(house: House) -> None:
    """See that every version is there with each of its bytes."""
    for record in house.adapters.list("acme").items:
        for listed in house.adapters.list_versions("acme", "acme", record.name).items:
            version = house.adapters.resolve("acme", parse_reference(f"{listed.name}@{listed.version}"))
            assert version is not None
            assert as_listed(version) == listed
            names = {path.name for path in house.store.directory(version.bundle).iterdir()}
            assert names == {file.name for file in version.files}
    assert house.adapters.live_bundles() <= bundles_in(house.root / STORE)  # which hashes them


def check_collected(root: Path, state: State) -> None:
    """See that after expiry and two collections nothing is left but what versions need."""
    with opened(root, clock := Clock()) as house:
        clock.time += timedelta(days=3)
        for _ in range(2):
            house.collect()
        store = root / STORE
        assert house.uploads.store_ids() == set()
        assert paths_in(store / "staging") == paths_in(store / "trash") == []
        assert bundles_in(store) == house.adapters.live_bundles()
        assert state_of(house) == state


def check(root: Path, done: list[str], states: list[State]) -> None:
    """See that what was acknowledged holds, that the rest is there wholly or not at all, and that it can be done."""
    aside = root.with_name(f"{root.name}-aside")
    shutil.copytree(root, aside)
    under_way = list(ACTS)[len(done) : len(done) + 1]
    before, after = states[len(done)], states[len(done) + len(under_way)]
    with opened(root, clock := Clock()) as house:
        state = state_of(house)
        assert state in (before, after), f"{state} is neither {before} nor {after}"
        check_whole(house)
        for name in [*done, *(under_way if state == after else [])]:
            assert name not in UPLOADS or not is_on_record(house, UPLOADS[name]), f"{name}: still on record"
        for name in under_way:  # who did not hear of its end does it again
            ACTS[name](house, clock)
        assert state_of(house) == after
        check_whole(house)
    check_collected(aside, state)


# --- the program -----------------------------------------------------------------------------------------------------


def furnish(root: Path) -> None:
    root.mkdir()
    with opened(root, Clock()) as house:
        for tenant in ("acme", "friend"):
            house.tenants.create(tenant)


def states_of_all_acts(root: Path) -> list[State]:
    """Return what tenants see before the first act and after each."""
    with opened(root, clock := Clock()) as house:
        states = [state_of(house)]
        for act in ACTS.values():
            act(house, clock)
            states.append(state_of(house))
    return states


def points_of(root: Path) -> list[tuple[str, str]]:
    """Return every point that there is, each with the act that it comes in."""
    disk = DyingDisk(None, root / STORE, KILLED)
    points: list[tuple[str, str]] = []

    def note(act: str) -> None:
        points.extend((act, change) for change in disk.changes[len(points) :])

    def work_and_tell(say: Callable[[str], None]) -> None:
        work(root, disk, note)
        say(json.dumps(points))

    status, lines = in_a_child(work_and_tell)
    assert status == 0, "\n".join(lines)
    return [(act, change) for act, change in json.loads(lines[0])]


def chosen_points(points: list[tuple[str, str]], way: str, is_thorough: bool) -> list[int]:
    """Return the numbers of all points; else of so many that every change is tried, and each kind of it in each act."""
    numbers, tried = [], set[object]()
    for number, (act, change) in enumerate(points):
        if way == KILLED or act in ACTS_ON_DISK:
            marks = {change, (act, change.split()[0])}
            if is_thorough or not marks <= tried:
                numbers.append(number)
            tried |= marks
    return numbers


def try_points(folder: Path, way: str, is_thorough: bool) -> dict[str, object]:
    """Let a process die at each chosen point in turn, and return where they died and what was wrong then."""
    template = folder / "template"
    # In this process, so that its children have all that is loaded on first use; nothing stays open.
    furnish(template)
    shutil.copytree(template, folder / "golden")
    states = states_of_all_acts(folder / "golden")
    shutil.copytree(template, folder / "points")
    tried: list[tuple[str, str]] = []
    failures: list[str] = []
    points = points_of(folder / "points")
    for number in chosen_points(points, way, is_thorough):
        act, change = points[number]
        root = folder / str(number)
        shutil.copytree(template, root)
        disk = DyingDisk(number, root / STORE, way)
        status, done = in_a_child(lambda say, root=root, disk=disk: work(root, disk, say))
        if (status, done) != (DIED, list(ACTS)[: list(ACTS).index(act)]):
            failures.append(f"{act}, {change}: it ended with {status} after {done}")
            continue
        problem, lines = in_a_child(lambda say, root=root, done=done: check(root, done, states))
        if problem:
            failures.append(f"{act}, {change}: " + "\n".join(lines))
        tried.append((act, change))
        for used in (root, root.with_name(f"{root.name}-aside")):
            shutil.rmtree(used)
    return {"acts": list(ACTS if way == KILLED else ACTS_ON_DISK), "points": tried, "failures": failures}


def main() -> None:
    assert "torch" not in sys.modules
    # The death of a process asks nothing of a disk; and what power takes is taken back by hand.
    with tempfile.TemporaryDirectory(prefix="motley-crash-", dir=MEMORY) as folder:
        told = json.dumps(try_points(Path(folder), sys.argv[1], "thorough" in sys.argv[2:]))
    assert "torch" not in sys.modules
    print(told)


if __name__ == "__main__":
    main()
