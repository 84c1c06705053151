"""The registry's tables, and the version that a database says it has.

It knows SQL's shapes, not what they mean: rules about tenants, keys and adapters live with their classes. Every
statement runs inside a transaction that somebody else began, on the database's threads.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    inspect,
    select,
)
from sqlalchemy.dialects.postgresql import VARCHAR
from sqlalchemy.engine.interfaces import Dialect

from motley_server.registry.names import LOCAL_TENANT

VERSION = 5

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_microseconds(moment: datetime) -> int:
    """Return a moment's distance from the beginning of 1970; one without a zone is a TypeError."""
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(microseconds: int) -> datetime:
    """Return a moment in UTC."""
    return _EPOCH + microseconds * _MICROSECOND


class UtcTime(TypeDecorator[datetime]):
    """Keep a moment as microseconds since 1970, exactly and alike in every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Return what is stored."""
        return None if value is None else to_microseconds(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Return the moment that was stored."""
        return None if value is None else from_microseconds(value)


# Compared byte by byte: what comes first must not depend on a server's locale.
_Id = String(128).with_variant(VARCHAR(128, collation="C"), "postgresql")

METADATA = MetaData()

# One row.
registry = Table(
    "motley_registry",
    METADATA,
    Column("version", Integer, nullable=False),
    Column("page_secret", LargeBinary, nullable=False),
)

tenants = Table(
    "tenants",
    METADATA,
    Column("id", _Id, primary_key=True),
    Column("display_name", Text, nullable=False),
    Column("quota_adapters", BigInteger),
    Column("quota_adapter_bytes", BigInteger),
    Column("quota_requests_in_flight", BigInteger),
    Column("quota_requests_per_minute", BigInteger),
    Column("quota_tokens_per_minute", BigInteger),
    Column("quota_training_jobs", BigInteger),
    Column("quota_weight", Double, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("etag", String(32), nullable=False),
)

keys = Table(
    "keys",
    METADATA,
    Column("id", _Id, primary_key=True),
    Column("tenant_id", _Id, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("role", String(16), nullable=False),
    Column("secret_sha256", LargeBinary(32), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Index("keys_by_tenant", "tenant_id", "created_at", "id"),
)

requests = Table(
    "requests",
    METADATA,
    Column("scope", _Id, primary_key=True),
    Column("request_id", String(128), primary_key=True),
    Column("content_sha256", LargeBinary(32), nullable=False),
    Column("answer", Text, nullable=False),
    Column("answered_at", UtcTime, nullable=False),
    Index("requests_by_time", "answered_at"),
)

# A row outlives its last version, and its owner too, so that no number is ever given twice. The owner is a tenant, or
# `public`, which is none.
adapters = Table(
    "adapters",
    METADATA,
    Column("owner", _Id, primary_key=True),
    Column("name", _Id, primary_key=True),
    Column("visibility", String(16), nullable=False),
    Column("last_version", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

adapter_versions = Table(
    "adapter_versions",
    METADATA,
    Column("owner", _Id, primary_key=True),
    Column("name", _Id, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", String(71), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("trained_on", Text, nullable=False),
    Column("serves_on", Text, nullable=False),
    Column("ranks", JSON, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("device_bytes", BigInteger, nullable=False),
    Column("bundle", String(71), nullable=False),
    Column("files", JSON, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("is_pinned", Boolean, nullable=False),
    ForeignKeyConstraint(["owner", "name"], ["adapters.owner", "adapters.name"], ondelete="CASCADE"),
)

aliases = Table(
    "aliases",
    METADATA,
    Column("owner", _Id, primary_key=True),
    Column("name", _Id, primary_key=True),
    Column("alias", _Id, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("previous_version", BigInteger),
    Column("etag", String(32), nullable=False),
    ForeignKeyConstraint(["owner", "name"], ["adapters.owner", "adapters.name"], ondelete="CASCADE"),
    ForeignKeyConstraint(
        ["owner", "name", "version"],
        ["adapter_versions.owner", "adapter_versions.name", "adapter_versions.version"],
    ),
)

shares = Table(
    "shares",
    METADATA,
    Column("owner", _Id, primary_key=True),
    Column("name", _Id, primary_key=True),
    Column("tenant", _Id, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    ForeignKeyConstraint(["owner", "name"], ["adapters.owner", "adapters.name"], ondelete="CASCADE"),
    Index("shares_by_tenant", "tenant", "owner", "name"),
)

# Uploads that have become no version yet. Whose they are is as with adapters.
uploads = Table(
    "uploads",
    METADATA,
    Column("owner", _Id, primary_key=True),
    Column("upload_id", _Id, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("header_sha256", LargeBinary(32), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("touched_at", UtcTime, nullable=False),
    Index("uploads_by_time", "touched_at"),
)

datasets = Table(
    "datasets",
    METADATA,
    Column("owner", _Id, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("digest", String(71), primary_key=True),
    Column("display_name", Text, nullable=False),
    Column("format", String(16), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("num_samples", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

# Uploads that have become no dataset yet.
dataset_uploads = Table(
    "dataset_uploads",
    METADATA,
    Column("owner", _Id, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("digest", String(71), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("touched_at", UtcTime, nullable=False),
)

jobs = Table(
    "jobs",
    METADATA,
    Column("id", _Id, primary_key=True),
    Column("owner", _Id, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("created_by", Text, nullable=False),
    Column("method", String(16), nullable=False),
    Column("adapter_name", _Id),
    Column("datasets", JSON, nullable=False),
    Column("reads", JSON, nullable=False),
    Column("base_fingerprint", Text, nullable=False),
    Column("spec", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("ended_at", UtcTime),
    Column("attempts", Integer, nullable=False),
    Column("num_lost_leases", Integer, nullable=False),
    Column("held_seconds", Double, nullable=False),
    Column("worker", Text, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("progress", Text),
    Column("data", Text),
    Column("evaluation", Text),
    Column("version", Text),
    Column("base", Text),
    Column("last_sequence", BigInteger, nullable=False),
    Index("jobs_by_owner", "owner", "created_at", "id"),
    Index("jobs_by_state", "state", "created_at", "id"),
)

job_events = Table(
    "job_events",
    METADATA,
    Column("job_id", _Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("time", UtcTime, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("body", Text, nullable=False),
)

workers = Table(
    "workers",
    METADATA,
    Column("name", _Id, primary_key=True),
    Column("key_id", Text, nullable=False),
    Column("methods", JSON, nullable=False),
    Column("base_fingerprint", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("seen_at", UtcTime, nullable=False),
)

# A row goes when its lease ends, so that the database itself allows no second one for a job.
leases = Table(
    "leases",
    METADATA,
    Column("id", _Id, primary_key=True),
    Column("job_id", _Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, unique=True),
    Column("worker", _Id, nullable=False),
    Column("key_id", _Id, nullable=False),
    Column("secret_sha256", LargeBinary(32), nullable=False),
    Column("began_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Column("num_reported", BigInteger, nullable=False),
)

# How far each tenant has come in the tenants' taking of turns.
training_turns = Table(
    "training_turns",
    METADATA,
    Column("owner", _Id, ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("turn", Double, nullable=False),
)


def is_empty(connection: Connection) -> bool:
    """Tell whether a database has no table at all, ours or another's."""
    return not inspect(connection).get_table_names()


def version_of(connection: Connection) -> int | None:
    """Return the version that a database says it has; None if it is no registry."""
    if not inspect(connection).has_table(registry.name):
        return None
    return connection.execute(select(registry.c.version)).scalar()


def page_secret_of(connection: Connection) -> bytes:
    """Return what the page tokens of this registry are signed with."""
    page_secret: bytes = connection.execute(select(registry.c.page_secret)).scalar_one()
    return page_secret


def create(connection: Connection, now: datetime) -> None:
    """Make the tables of an empty database, and the tenant that needs no key."""
    METADATA.create_all(connection)
    connection.execute(registry.insert().values(version=VERSION, page_secret=secrets.token_bytes(32)))
    connection.execute(
        tenants.insert().values(
            id=LOCAL_TENANT, display_name="", quota_weight=1.0, created_at=now, etag=secrets.token_hex(8)
        )
    )
