"""How the registry's database is opened: by many at once, of another version, and what is refused and left alone."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from motley_server.registry import connections
from motley_server.registry.database import Database, DatabaseError
from motley_server.registry.schema import VERSION, registry, tenants
from motley_server.registry.tenants import Tenants
from sqlalchemy import select, text

pytest_plugins = ["registry_databases"]

OPENERS = 4
ROUNDS = 5

# Waits until all are ready, then opens each database at the same instants as its like.
OPEN_TOGETHER = """
import sys, time
from motley_server.registry.database import Database
from motley_server.registry.tenants import Tenants
name, *urls = sys.argv[1:]
print("ready", flush=True)
begin = float(sys.stdin.readline())
for number, url in enumerate(urls):
    time.sleep(max(0, begin + number * 0.4 - time.time()))
    database = Database.open(url)
    Tenants(database).create(name)
    database.close()
"""


def refusal_of(url: str) -> DatabaseError:
    with pytest.raises(DatabaseError) as refused:
        Database.open(url)
    return refused.value


def test_what_was_written_is_there_when_it_is_opened_again(database_url: str) -> None:
    with closing(Database.open(database_url)) as database:
        made = Tenants(database).create("acme")
        secret = database.page_secret
    with closing(Database.open(database_url)) as database:
        assert Tenants(database).get("acme") == made
        assert database.page_secret == secret


def test_many_processes_may_open_an_empty_database_at_once(make_database_url: Callable[[], str]) -> None:
    urls = [make_database_url() for _ in range(ROUNDS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_TOGETHER, f"opener{number}", *urls],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(OPENERS)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    begin = time.time() + 0.2
    ends = [process.communicate(f"{begin}\n", timeout=60) for process in processes]
    assert [(process.returncode, error) for process, (_, error) in zip(processes, ends, strict=True)] == [(0, "")] * 4
    for url in urls:
        with closing(Database.open(url)) as database, database.reading() as connection:
            assert connection.execute(select(registry.c.version)).scalars().all() == [VERSION]
            found = connection.execute(select(tenants.c.id).order_by(tenants.c.id)).scalars().all()
            assert found == ["local", "opener0", "opener1", "opener2", "opener3"]


def test_a_file_that_another_process_writes_gets_its_log_once_that_ends(tmp_path: Path) -> None:
    file = tmp_path / "registry.sqlite3"
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as other:
        other.execute("begin immediate")
        end = threading.Timer(0.2, other.execute, ["commit"])
        end.start()
        with closing(Database.open(f"sqlite:///{file}")) as database:
            assert Tenants(database).get("local").id == "local"
        end.join()


@pytest.mark.parametrize("version", [VERSION + 1, VERSION - 1, 10**9])
def test_another_version_is_refused_with_both_numbers_and_left_alone(database_url: str, version: int) -> None:
    with closing(Database.open(database_url)) as database, database.writing() as connection:
        connection.execute(registry.update().values(version=version))
        connection.execute(text("drop table requests"))
    refused = refusal_of(database_url)
    assert refused.reason == "SCHEMA_VERSION"
    assert f"version {version}," in refused.message
    assert f"version {VERSION} " in refused.message
    assert ("newer" if version > VERSION else "older") in refused.message
    assert refusal_of(database_url).message == refused.message


def test_somebody_elses_database_is_refused_and_left_alone(backend: str, database_url: str) -> None:
    engine = connections.make_engine(connections.parse_url(database_url), 1)
    with engine.begin() as connection:
        connection.execute(text("create table bookmarks (address text)"))
    assert refusal_of(database_url).reason == "NO_REGISTRY"
    with engine.begin() as connection:
        if backend == "sqlite":
            assert connection.execute(text("pragma journal_mode")).scalar() == "delete"
        with pytest.raises(Exception, match="motley_registry"):
            connection.execute(select(registry))
    engine.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "", "nonsense", "registry.sqlite3", "mysql://host/db", "sqlite+aiosqlite:////tmp/x", "sqlite://", "sqlite:///",
        "sqlite:///:memory:", "sqlite:///relative.sqlite3", "sqlite:////tmp/x?mode=ro", "sqlite://host/x",
        "postgresql+asyncpg://host/db", "postgresql://host:port/db", "\x00", "://",
    ],
)  # fmt: skip
def test_a_url_that_names_no_such_database_is_refused(url: str) -> None:
    refused = refusal_of(url)
    assert refused.reason == "UNSUPPORTED_DATABASE"
    assert "sqlite:////absolute/path or postgresql://" in refused.message


@pytest.mark.parametrize("form", ["postgresql://u@h/d", "postgres://u@h/d", "postgresql+psycopg://u@h/d"])
def test_each_form_of_a_postgresql_url_means_one_driver(form: str) -> None:
    assert connections.parse_url(form).drivername == "postgresql+psycopg"


@pytest.mark.parametrize("place", ["user:HIDDEN@{host}/d", "{host}/d?user=u&password=HIDDEN"])
def test_a_password_is_not_told(tmp_path: Path, place: str) -> None:
    for scheme in ("postgresql", "mysql", "postgresql+nothing"):
        refused = refusal_of(f"{scheme}://{place.format(host='127.0.0.1:1')}")
        assert "HIDDEN" not in refused.message


def test_a_server_that_is_not_there_is_told() -> None:
    refused = refusal_of("postgresql://somebody@127.0.0.1:1/registry")
    assert refused.reason == "DATABASE_UNREACHABLE"
    assert "127.0.0.1" in refused.message


@pytest.mark.parametrize("what", ["a folder", "no folder", "not a database", "cut short"])
def test_a_file_that_cannot_be_a_database_is_told_and_left_alone(tmp_path: Path, what: str) -> None:
    file = tmp_path / "registry.sqlite3"
    if what == "a folder":
        file.mkdir()
    elif what == "no folder":
        file = tmp_path / "missing" / "registry.sqlite3"
    elif what == "not a database":
        file.write_bytes(b"PNG" * 1000)
    else:
        with closing(Database.open(f"sqlite:///{file}")):
            pass
        file.write_bytes(file.read_bytes()[:5000])
    before = file.read_bytes() if file.is_file() else None
    assert refusal_of(f"sqlite:///{file}").reason == "DATABASE_UNREACHABLE"
    assert (file.read_bytes() if file.is_file() else None) == before


def test_a_sqlite_file_and_its_log_are_for_their_owner(tmp_path: Path) -> None:
    with closing(Database.open(f"sqlite:///{tmp_path / 'registry.sqlite3'}")) as database:
        Tenants(database).create("acme")
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {f"registry.sqlite3{suffix}": 0o600 for suffix in ("", "-wal", "-shm")}


def test_a_path_with_odd_characters_is_that_path(tmp_path: Path) -> None:
    file = tmp_path / "a b%20ü'#&.sqlite3"
    with closing(Database.open(f"sqlite:///{file}")):
        assert file.is_file()
