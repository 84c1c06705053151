"""Adapters and their versions between three shapes: the database's rows, our records, and answers kept as JSON.

It knows no rules. Every function runs on the database's threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, RowMapping, select, tuple_

from motley_server.registry.bundle_files import BundleFile
from motley_server.registry.idempotency import Answer
from motley_server.registry.records import AdapterRecord, AdapterVersion, Alias, NewVersion, Visibility
from motley_server.registry.schema import aliases, from_microseconds, shares, to_microseconds

_PLAIN_FIELDS = (
    *("digest", "kind", "trained_on", "serves_on"),
    *("size_bytes", "device_bytes", "bundle", "created_by"),
)  # fmt: skip


def columns_of(content: NewVersion) -> dict[str, Any]:
    """Return what a row holds of a version's content."""
    columns: dict[str, Any] = {name: getattr(content, name) for name in _PLAIN_FIELDS}
    columns |= {"ranks": dict(content.ranks), "labels": dict(content.labels)}
    return columns | {"files": [asdict(file) for file in content.files]}


def version_of(columns: RowMapping | Mapping[str, Any]) -> AdapterVersion:
    """Return the version of a row; of one that was read in brief, without ranks and files."""
    return AdapterVersion(
        owner=columns["owner"],
        name=columns["name"],
        version=columns["version"],
        ranks=columns.get("ranks", {}),
        files=tuple(BundleFile(**file) for file in columns.get("files", ())),
        labels=columns["labels"],
        created_at=columns["created_at"],
        is_pinned=columns["is_pinned"],
        **{name: columns[name] for name in _PLAIN_FIELDS},
    )


def version_seen_by(tenant_id: str, columns: RowMapping | Mapping[str, Any]) -> AdapterVersion:
    """Return the version of a row as a tenant may see it: who made it is its owner's business."""
    version = version_of(columns)
    return version if version.owner == tenant_id else replace(version, created_by="")


def alias_of(columns: RowMapping | Mapping[str, Any]) -> Alias:
    """Return the alias of a row."""
    return Alias(columns["alias"], columns["version"], columns["previous_version"] or 0, columns["etag"])


def records_of(connection: Connection, rows: Sequence[RowMapping], tenant_id: str) -> list[AdapterRecord]:
    """Return adapters from rows of `latest_seen_by`, with the aliases and shares of all of them in two queries."""
    keys = [(row["owner"], row["name"]) for row in rows]
    named: dict[tuple[str, str], list[Alias]] = {key: [] for key in keys}
    shared: dict[tuple[str, str], list[str]] = {key: [] for key in keys}
    query = select(aliases).where(tuple_(aliases.c.owner, aliases.c.name).in_(keys)).order_by(aliases.c.alias)
    for row in connection.execute(query):
        named[row.owner, row.name].append(alias_of(row._mapping))
    own = [key for key in keys if key[0] == tenant_id]
    query = select(shares).where(tuple_(shares.c.owner, shares.c.name).in_(own)).order_by(shares.c.tenant)
    for row in connection.execute(query):
        shared[row.owner, row.name].append(row.tenant)
    return [
        AdapterRecord(
            owner=row["owner"],
            name=row["name"],
            visibility=Visibility(row["visibility"]),
            shared_with=tuple(shared[key]),
            aliases=tuple(named[key]),
            latest=version_seen_by(tenant_id, row),
            created_at=row["adapter_created_at"],
        )
        for key, row in zip(keys, rows, strict=True)
    ]


def version_answer(version: AdapterVersion) -> Answer:
    """Return a version in values that JSON has."""
    return asdict(version) | {"created_at": to_microseconds(version.created_at)}


def version_answered(answer: Answer) -> AdapterVersion:
    """Return the version that `version_answer` was made from."""
    values: dict[str, Any] = dict(answer)
    return version_of(values | {"created_at": from_microseconds(values["created_at"])})


def alias_answered(answer: Answer) -> Alias:
    """Return the alias whose fields are an answer."""
    values: dict[str, Any] = dict(answer)
    return Alias(**values)


def record_answer(record: AdapterRecord) -> Answer:
    """Return an adapter in values that JSON has."""
    return asdict(record) | {
        "visibility": record.visibility.value,
        "latest": version_answer(record.latest),
        "created_at": to_microseconds(record.created_at),
    }


def record_answered(answer: Answer) -> AdapterRecord:
    """Return the adapter that `record_answer` was made from."""
    values: dict[str, Any] = dict(answer)
    return AdapterRecord(
        owner=values["owner"],
        name=values["name"],
        visibility=Visibility(values["visibility"]),
        shared_with=tuple(values["shared_with"]),
        aliases=tuple(Alias(**alias) for alias in values["aliases"]),
        latest=version_answered(values["latest"]),
        created_at=from_microseconds(values["created_at"]),
    )
