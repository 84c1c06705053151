"""The database that the registry is kept in: SQLite or PostgreSQL, its transactions and the threads they run on.

It knows when what was written is safe, not what was written. A write that has returned is on disk. Writes happen one
at a time, whoever makes them, so that what a transaction has checked still holds when it commits. Transactions block:
on the event loop's thread there is `run`, which takes them to the threads here.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import ParamSpec, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from motley_server.errors import UnavailableError
from motley_server.registry import schema
from motley_server.registry.connections import (
    WRITES,
    keep_write_ahead_log,
    make_engine,
    parse_url,
    show_url,
    touch_privately,
)

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4
RETRY_AFTER_SECONDS = 1.0


class DatabaseError(Exception):
    """Say why a database cannot be used; `reason` is a stable word, as in the tree of errors."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


def utc_now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


class Database:
    """Run transactions on one database, from any thread."""

    def __init__(self, engine: Engine, page_secret: bytes, clock: Callable[[], datetime]) -> None:
        self.page_secret = page_secret
        self.now = clock
        self._reader = engine
        self._writer = engine.execution_options(**{WRITES: True})
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="motley-registry")

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], datetime] = utc_now) -> Database:
        """Open a database, and make the tables of one that is empty.

        Effects: a SQLite file is made, its folder is not. Nothing is changed in a database that is refused.
        Raises: DatabaseError (reason=UNSUPPORTED_DATABASE, DATABASE_UNREACHABLE, SCHEMA_VERSION or NO_REGISTRY).
        """
        try:
            parsed = parse_url(url)
            shown = show_url(parsed)
        except ValueError as error:
            raise DatabaseError(f"database: {error}", reason="UNSUPPORTED_DATABASE") from None
        engine = make_engine(parsed, THREADS)
        try:
            touch_privately(parsed)
            with engine.begin() as connection:
                _check(connection, shown)
            keep_write_ahead_log(parsed)
            with engine.execution_options(**{WRITES: True}).begin() as connection:
                if _check(connection, shown) is None:
                    schema.create(connection, clock())
                return cls(engine, schema.page_secret_of(connection), clock)
        except (DBAPIError, sqlite3.Error, OSError) as error:
            engine.dispose()
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise DatabaseError(f"database {shown} cannot be used: {cause}", reason="DATABASE_UNREACHABLE") from error
        except ValueError as error:
            engine.dispose()
            raise DatabaseError(f"database {shown}: {error}", reason="UNSUPPORTED_DATABASE") from error
        except DatabaseError:
            engine.dispose()
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction that only reads.

        Raises: UnavailableError (reason=DATABASE_UNAVAILABLE), as `writing` does.
        """
        with _transaction(self._reader) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that writes, while no other does; on disk when it ends, undone if it raises."""
        with _transaction(self._writer) as connection:
            yield connection

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function of the registry on one of the database's threads.

        Semantics: a caller who is cancelled stops waiting; the transaction goes on to its end.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))

    def close(self) -> None:
        """Let running transactions end, and close every connection. A second time does nothing."""
        self._threads.shutdown()
        self._reader.dispose()


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    try:
        with engine.begin() as connection:
            yield connection
    except (OperationalError, InterfaceError, PoolTimeoutError) as error:
        message = "the registry's database does not answer"
        raise UnavailableError(
            message, reason="DATABASE_UNAVAILABLE", retry_after_seconds=RETRY_AFTER_SECONDS
        ) from error


def _check(connection: Connection, shown: str) -> int | None:
    """Return the version of a registry; None for a database that is empty."""
    version = schema.version_of(connection)
    if version is None and not schema.is_empty(connection):
        message = f"database {shown} has tables, but is no registry: name an empty one"
        raise DatabaseError(message, reason="NO_REGISTRY")
    if version not in (None, schema.VERSION):
        age = "newer" if version > schema.VERSION else "older"
        message = (
            f"database {shown} has schema version {version}, and this program knows version {schema.VERSION} only: "
            f"it was written by {age} software"
        )
        raise DatabaseError(message, reason="SCHEMA_VERSION")
    return version
