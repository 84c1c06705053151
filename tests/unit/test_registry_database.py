"""The database itself: what was answered is on disk, writes take turns, and trouble is told."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from motley_server.errors import UnavailableError
from motley_server.registry import connections
from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.schema import tenants
from motley_server.registry.tenants import Tenants
from sqlalchemy import Connection, func, select

pytest_plugins = ["registry_databases"]

# Says what was answered, then waits to be killed.
ANSWER_AND_WAIT = """
import sys, time
from motley_server.asked import Role
from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.tenants import Tenants
database = Database.open(sys.argv[1])
tenants, keys = Tenants(database), Keys(database)
tenants.create("acme", "Acme")
print(tenants.update("acme", display_name="New").etag, flush=True)
print(keys.create("acme", Role.USER)[1], flush=True)
doomed, text = keys.create("acme", Role.USER)
print(keys.revoke(doomed.id) and text, flush=True)
with database.writing() as connection:
    connection.exec_driver_sql("update tenants set display_name = 'never answered'")
    print("inside", flush=True)
    time.sleep(600)
"""


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_what_was_answered_outlives_kill_minus_nine(database_url: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", ANSWER_AND_WAIT, database_url], stdout=subprocess.PIPE, text=True)
    etag, good, revoked, inside = (process.stdout.readline().strip() for _ in range(4))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert inside == "inside"
    with closing(Database.open(database_url)) as database:
        acme = Tenants(database).get("acme")
        assert (acme.display_name, acme.etag) == ("New", etag)
        assert Keys(database).authenticate(good) is not None
        assert Keys(database).authenticate(revoked) is None


def test_every_connection_waits_for_the_disk(backend: str, database_url: str) -> None:
    unsafe = (
        database_url if backend == "sqlite" else database_url.replace("-csearch", "-csynchronous_commit=off%20-csearch")
    )
    with closing(Database.open(unsafe)) as database, database.reading() as first, database.reading() as second:
        for connection in (first, second):
            if backend == "sqlite":
                names = ("journal_mode", "synchronous", "foreign_keys")
                values = [connection.exec_driver_sql(f"pragma {name}").scalar() for name in names]
                assert values == ["wal", 2, 1]
            else:
                assert connection.exec_driver_sql("show synchronous_commit").scalar() == "on"


def test_a_write_that_raises_leaves_nothing(database: Database) -> None:
    def write() -> None:
        with database.writing() as connection:
            connection.execute(tenants.update().values(display_name="half"))
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert Tenants(database).get("local").display_name == ""


def test_writes_take_turns_and_reads_do_not_wait(database_url: str) -> None:
    with closing(Database.open(database_url)) as database, closing(Database.open(database_url)) as other:
        order: list[str] = []

        def write() -> None:
            with other.writing() as connection:
                order.append(connection.execute(select(tenants.c.display_name)).scalar_one())

        with database.writing() as connection:
            connection.execute(tenants.update().values(display_name="first"))
            thread = threading.Thread(target=write)
            thread.start()
            thread.join(0.2)
            order.append(Tenants(other).get("local").display_name)
        thread.join()
        assert order == ["", "first"]


# --- trouble ---------------------------------------------------------------------------------------------------------


def test_who_waits_too_long_for_a_turn_is_told_to_come_back(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WAIT_SECONDS", 1)
    with (
        closing(Database.open(database_url)) as database,
        closing(Database.open(database_url)) as other,
        database.writing(),
    ):
        with pytest.raises(UnavailableError) as unavailable:
            Tenants(other).create("acme")
        assert unavailable.value.reason == "DATABASE_UNAVAILABLE"
        assert unavailable.value.retry_after_seconds == 1.0
        assert "sql" not in unavailable.value.message.lower()


def cut(killer: Connection, process_ids: list[int]) -> None:
    for number in process_ids:
        killer.execute(select(func.pg_terminate_backend(number, 5000)))


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_connections_cut_while_idle_are_made_anew_unseen(database: Database, database_url: str) -> None:
    with database.reading() as first, database.reading() as second:
        idle = [connection.exec_driver_sql("select pg_backend_pid()").scalar_one() for connection in (first, second)]
    with closing(Database.open(database_url)) as other, other.reading() as connection:
        cut(connection, idle)
    assert Tenants(database).create("acme") == Tenants(database).get("acme")


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_connection_cut_in_a_transaction_undoes_it(database: Database, database_url: str) -> None:
    def write() -> None:
        with closing(Database.open(database_url)) as other, other.reading() as killer, database.writing() as connection:
            connection.execute(tenants.update().values(display_name="half"))
            cut(killer, [connection.exec_driver_sql("select pg_backend_pid()").scalar_one()])
            connection.execute(select(1))

    with pytest.raises(UnavailableError):
        write()
    assert Tenants(database).get("local").display_name == ""


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_full_disk_is_told_and_nothing_is_half_written(database: Database) -> None:
    with database.reading() as connection:
        pages = connection.exec_driver_sql("pragma page_count").scalar()

    def write() -> None:
        with database.writing() as connection:
            connection.exec_driver_sql(f"pragma max_page_count = {pages}")
            for number in range(200):
                values = {"id": f"t{number}", "display_name": "private" * 300, "quota_weight": 1.0, "etag": ""}
                connection.execute(tenants.insert().values(created_at=database.now(), **values))

    with pytest.raises(UnavailableError) as unavailable:
        write()
    assert [tenant.id for tenant in Tenants(database).list().items] == ["local"]
    assert "private" not in f"{unavailable.value} {unavailable.value.__cause__}"


# --- threads ---------------------------------------------------------------------------------------------------------


def test_run_leaves_the_event_loop_free(database: Database) -> None:
    held, free = threading.Event(), threading.Event()

    def wait(number: int, *, more: int) -> tuple[int, str]:
        held.set()
        assert free.wait(10)
        return number + more, threading.current_thread().name

    async def main() -> tuple[int, str]:
        task = asyncio.create_task(database.run(wait, 1, more=2))
        while not held.is_set():
            await asyncio.sleep(0.001)
        assert not task.done()
        free.set()
        return await task

    result, thread = asyncio.run(main())
    assert result == 3
    assert thread.startswith("motley-registry")


def test_run_raises_what_the_function_raised(database: Database) -> None:
    with pytest.raises(KeyError, match="mine"):
        asyncio.run(database.run({}.__getitem__, "mine"))


def test_a_write_whose_caller_left_goes_on_to_its_end(database: Database) -> None:
    begun, free = threading.Event(), threading.Event()

    def write() -> None:
        with database.writing() as connection:
            begun.set()
            assert free.wait(10)
            connection.execute(tenants.update().values(display_name="done"))

    async def main() -> None:
        task = asyncio.create_task(database.run(write))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        free.set()

    asyncio.run(main())
    assert Tenants(database).update("local").display_name == "done"


def test_close_waits_for_what_runs_and_may_be_repeated(database_url: str) -> None:
    database = Database.open(database_url)
    begun = threading.Event()

    def write() -> None:
        with database.writing() as connection:
            begun.set()
            time.sleep(0.1)
            connection.execute(tenants.update().values(display_name="done"))

    async def main() -> None:
        task = asyncio.create_task(database.run(write))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        database.close()
        database.close()
        await task

    asyncio.run(main())
    with closing(Database.open(database_url)) as again:
        assert Tenants(again).get("local").display_name == "done"


def test_the_registry_imports_neither_torch_nor_the_wire() -> None:
    program = (
        "import sys\nfrom motley_server.registry import collection, keys, publication\n"
        "print(sorted({'torch', 'numpy', 'grpc', 'google.protobuf', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
