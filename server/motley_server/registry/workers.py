"""Workers: who has said that it trains, what it can do, and when it was last heard of.

They belong to no tenant: whoever has a key of the role takes jobs of all. It knows no jobs. Methods block: they run on
the database's threads.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, delete, exists, select, update

from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry.database import Database
from motley_server.registry.job_records import NewWorker, WorkerRecord
from motley_server.registry.schema import leases, workers

MAX_WORD_CHARACTERS = 200
FORGOTTEN_AFTER = timedelta(days=1)

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Workers:
    """Keep workers. One that is not heard of for a day is forgotten, when another comes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def register(self, worker: NewWorker) -> WorkerRecord:
        """Note what a worker can do, in the place of what was said under its name before.

        Raises: InvalidArgumentError (reason=INVALID_WORKER).
        """
        _check(worker)
        columns: dict[str, Any] = {name: getattr(worker, name) for name in NewWorker.__dataclass_fields__}
        with self._database.writing() as connection:
            now = self._database.now()
            is_old = workers.c.seen_at <= now - FORGOTTEN_AFTER
            connection.execute(delete(workers).where((workers.c.name == worker.name) | is_old))
            connection.execute(workers.insert().values(columns | {"seen_at": now}))
            return require_worker(connection, worker.name)

    def list(self, within: timedelta) -> tuple[WorkerRecord, ...]:
        """Return the workers that were heard of within a time, by name."""
        query = _workers().where(workers.c.seen_at > self._database.now() - within).order_by(workers.c.name)
        with self._database.reading() as connection:
            return tuple(_record_of(row) for row in connection.execute(query).mappings())


def require_worker(connection: Connection, name: str) -> WorkerRecord:
    """Return a worker.

    Raises: NotFoundError (reason=WORKER_NOT_REGISTERED).
    """
    row = None
    if _NAME.fullmatch(name):
        row = connection.execute(_workers().where(workers.c.name == name)).mappings().one_or_none()
    if row is None:
        message = f"no worker {name[:70]!r} is registered, or it was not heard of for a day: register it again"
        raise NotFoundError(message, reason="WORKER_NOT_REGISTERED", field="worker")
    return _record_of(row)


def note_seen(connection: Connection, name: str, now: datetime) -> None:
    """Note that a worker was heard of."""
    connection.execute(update(workers).where(workers.c.name == name).values(seen_at=now))


def _workers() -> Select[Any]:
    is_busy = exists().where(leases.c.worker == workers.c.name)
    return select(workers, is_busy.label("is_busy"))


def _record_of(row: RowMapping) -> WorkerRecord:
    return WorkerRecord(**{**row, "methods": tuple(row["methods"])})


def _check(worker: NewWorker) -> None:
    if not _NAME.fullmatch(worker.name):
        message = f"{worker.name[:70]!r} is no worker's name: 1 to 64 letters, digits, `_`, `.` and `-`"
        raise InvalidArgumentError(message, reason="INVALID_WORKER", field="name")
    for field in ("device", "version"):
        text = getattr(worker, field)
        if len(text) > MAX_WORD_CHARACTERS or not text.isprintable():
            message = f"it is at most {MAX_WORD_CHARACTERS} printable characters on one line"
            raise InvalidArgumentError(message, reason="INVALID_WORKER", field=field)
