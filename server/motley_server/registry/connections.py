"""How a database is reached: what its URL may be, and what holds for every connection before anybody uses it.

It knows the two databases' ways, so that nothing else in the registry has to. Connections are opened on whichever
thread first needs one.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import ConnectionPoolEntry

FORMS = "sqlite:////absolute/path or postgresql://user:password@host/database"

WAIT_SECONDS = 10  # for a connection, or for another's transaction to end
STATEMENT_SECONDS = 30
WRITES = "motley_writes"  # the execution option of an engine whose transactions write

_SQLITE_FILE = "sqlite:///"
_WRITE_LOCK = 0x6D6F746C6579  # any number, the same in every server
_SQLITE_SETTINGS = ("foreign_keys = on", "synchronous = full", "trusted_schema = off")


def parse_url(text: str) -> URL:
    """Return a database's URL with the driver that reaches it; SQLite's path is taken as it is, without escapes.

    Raises: ValueError, without the URL's password.
    """
    if text.startswith(_SQLITE_FILE):
        path = text.removeprefix(_SQLITE_FILE)
        # In memory, each connection would have a database of its own; and a relative path moves with the process.
        if not os.path.isabs(path) or "?" in path or "\0" in path:
            raise ValueError(f"SQLite's database is a file by its absolute path, without options: write {FORMS}")
        return URL.create("sqlite", database=path)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(f"it is no URL of a database: write {FORMS}") from None
    if url.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise ValueError(f"there is no driver for {url.drivername!r}: write {FORMS}")
    return url.set(drivername="postgresql+psycopg")


def show_url(url: URL) -> str:
    """Return a URL as people may see it."""
    if is_sqlite(url):
        return f"{_SQLITE_FILE}{url.database}"
    shown = url.set(drivername="postgresql").difference_update_query(["password", "sslpassword"])
    return shown.render_as_string(hide_password=True)


def make_engine(url: URL, threads: int) -> Engine:
    """Return the connections of a database, none of which is open yet; what fails is told without its parameters."""
    if is_sqlite(url):
        waiting = {"timeout": WAIT_SECONDS}
        engine = create_engine(url, pool_size=threads, max_overflow=0, hide_parameters=True, connect_args=waiting)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    engine = create_engine(
        url,
        pool_size=threads,
        max_overflow=0,
        hide_parameters=True,
        connect_args={"connect_timeout": WAIT_SECONDS},
        pool_pre_ping=True,
        # A write must see what was committed while it waited for its turn.
        isolation_level="READ COMMITTED",
    )
    event.listen(engine, "connect", _prepare_postgresql)
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def is_sqlite(url: URL) -> bool:
    """Tell which of the two it is."""
    return url.get_backend_name() == "sqlite"


def touch_privately(url: URL) -> None:
    """Make a SQLite file that is not there, for its owner's eyes alone; what SQLite puts beside it follows it.

    Raises: OSError.
    """
    if is_sqlite(url) and url.database is not None:
        os.close(os.open(url.database, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def keep_write_ahead_log(url: URL) -> None:
    """Give a SQLite file its write-ahead log, for good; PostgreSQL has one.

    Raises: sqlite3.Error; ValueError where the file system allows none.
    """
    if not is_sqlite(url) or url.database is None:
        return
    patience = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            with closing(sqlite3.connect(url.database, timeout=WAIT_SECONDS)) as connection:
                (mode,) = connection.execute("pragma journal_mode = wal").fetchone()
        except sqlite3.OperationalError:
            # Whatever its timeout, SQLite does not wait here for another process that does the same just now.
            if time.monotonic() > patience:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise ValueError(f"its file system allows no write-ahead log (SQLite stays with {mode!r})")
        return


def _prepare_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself
    cursor = connection.cursor()
    for setting in _SQLITE_SETTINGS:
        cursor.execute(f"pragma {setting}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that first reads and then writes would fail, not wait, if another wrote in between.
    is_write = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql("begin immediate" if is_write else "begin")


def _prepare_postgresql(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # Whoever set the server up may have traded durability for speed; an answer of ours says that it is on disk.
    settings = f"""
        select set_config('lock_timeout', '{WAIT_SECONDS}s', false),
               set_config('statement_timeout', '{STATEMENT_SECONDS}s', false),
               set_config('idle_in_transaction_session_timeout', '{STATEMENT_SECONDS}s', false),
               case current_setting('synchronous_commit') when 'off' then set_config('synchronous_commit', 'on', false)
               end
    """
    cursor = connection.cursor()
    cursor.execute(settings)
    cursor.close()
    connection.commit()  # or the settings go with the transaction


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get(WRITES):
        connection.exec_driver_sql(f"select pg_advisory_xact_lock({_WRITE_LOCK})")
