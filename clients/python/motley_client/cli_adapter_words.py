"""What `motley adapters` prints, for people and as JSON.

Owns the shapes of that JSON (scripts rely on them). Knows no server. Pure functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Any

from motley_client.cli_table import moment, table
from motley_client.types_adapters import Adapter, AdapterVersion, Alias, ResolvedAdapter

_WIDTH = 14


def adapter_json(adapter: Adapter) -> dict[str, Any]:
    """Return what `--json` prints of an adapter; what there is not is null."""
    return {
        "owner": adapter.owner,
        "name": adapter.name,
        "aliases": [_alias_json(one) for one in adapter.aliases],
        "latest": None if adapter.latest is None else version_json(adapter.latest),
        "visibility": _value(adapter.visibility),
        "shared_with": list(adapter.shared_with),
    }


def version_json(version: AdapterVersion) -> dict[str, Any]:
    """Return what `--json` prints of a version; what a list does not tell is left out."""
    facts = {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "kind": _value(version.kind),
        "state": _value(version.state),
        "size_bytes": version.size_bytes,
        "ranks": None if version.ranks is None else dict(version.ranks),
        "device_bytes": version.device_bytes,
        "trained_on": version.trained_on,
        "serves_on": version.serves_on,
        "residency": _value(version.residency),
        "pinned": version.pinned,
        "labels": dict(version.labels),
        "create_time": moment(version.create_time),
        "created_by": version.created_by,
    }
    if version.ranks is None:
        del facts["ranks"]
    return facts


def adapter_table(adapters: Sequence[Adapter]) -> str:
    """Write one line for each adapter."""
    rows = []
    for one in adapters:
        aliases = " ".join(f"{alias.name}={alias.version}" for alias in one.aliases)
        latest = ("", "", "") if one.latest is None else _latest_cells(one.latest)
        rows.append((one.owner, one.name, *latest, _word(one.visibility), aliases))
    return table(("owner", "name", "latest", "kind", "created", "visibility", "aliases"), rows)


def adapter_words(found: ResolvedAdapter, versions: Sequence[AdapterVersion]) -> str:
    """Write what a name means, then the adapter's aliases, then its versions."""
    adapter, version = found.adapter, found.version
    facts = {
        "name": adapter.name,
        "owner": adapter.owner,
        "visibility": _word(adapter.visibility),
        "shared with": " ".join(adapter.shared_with),
        "version": str(version.version),
        "digest": version.digest,
        "kind": _word(version.kind),
        "state": _word(version.state),
        "residency": _word(version.residency) + (", pinned" if version.pinned else ""),
        "size bytes": str(version.size_bytes),
        "device bytes": str(version.device_bytes),
        "ranks": _ranks_words(version),
        "trained on": version.trained_on,
        "serves on": version.serves_on,
        "labels": " ".join(f"{key}={value}" for key, value in sorted(version.labels.items())),
        "created": moment(version.create_time),
        "created by": version.created_by,
    }
    lines = [f"{name:<{_WIDTH}}{value}".rstrip() for name, value in facts.items()]
    aliases = [(one.name, str(one.version), str(one.previous_version or ""), one.etag) for one in adapter.aliases]
    lines += ["", table(("alias", "version", "previous", "etag"), aliases)]
    rows = [
        (str(one.version), _word(one.kind), _word(one.state), _word(one.residency), "pinned" if one.pinned else "",
         str(one.size_bytes), moment(one.create_time), one.digest)
        for one in versions
    ]  # fmt: skip
    headings = ("version", "kind", "state", "residency", "", "size bytes", "created", "digest")
    return "\n".join([*lines, "", table(headings, rows)])


def alias_words(name: str, alias: Alias) -> str:
    """Write where an alias points now."""
    before = f", before it {alias.previous_version}" if alias.previous_version else ""
    return f"{name}@{alias.name} is version {alias.version}{before}, etag {alias.etag}"


def _latest_cells(latest: AdapterVersion) -> tuple[str, str, str]:
    return str(latest.version), _word(latest.kind), moment(latest.create_time)


def _alias_json(alias: Alias) -> dict[str, Any]:
    return {
        "name": alias.name,
        "version": alias.version,
        "previous_version": alias.previous_version,
        "etag": alias.etag,
    }


def _ranks_words(version: AdapterVersion) -> str:
    """Write how many modules have which rank; S2FT's have none."""
    counts = sorted(Counter((version.ranks or {}).values()).items())
    return ", ".join(f"{rank} in {number} modules" for rank, number in counts)


def _value(member: Enum | None) -> str | None:
    return None if member is None else str(member.value)


def _word(member: Enum | None) -> str:
    return _value(member) or "unknown"
