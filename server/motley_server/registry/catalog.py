"""The catalog: which adapters exist, whose they are, and what a name means just now.

In memory, filled when the server starts. Versions are immutable and never reused; aliases move. It knows digests and
facts, not files or tensors. Every method runs on the event loop's thread, but for those called before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from motley_server.errors import InvalidArgumentError, NotFoundError
from motley_server.registry.names import DEFAULT_ALIAS, AdapterReference, is_name, parse_reference

PUBLIC_OWNER = "public"


class AdapterFacts(Protocol):
    """What is kept of an adapter's content: frozen facts without tensors, as its reader found them.

    Semantics: `channels` are an S2FT adapter's by module path, and nothing for other kinds; what one looks like is not
    the catalog's business.
    """

    @property
    def digest(self) -> str:
        """Return the identity of the content."""

    @property
    def kind(self) -> str:
        """Return the adapter's kind."""

    @property
    def trained_on(self) -> str:
        """Return the fingerprint of the base that it declares it was trained on, or `undeclared`."""

    @property
    def channels(self) -> Mapping[str, object]:
        """Return the channels that it changes."""


@dataclass(frozen=True, slots=True)
class CatalogVersion:
    """One immutable version of an adapter; `owner` is a tenant or `public`."""

    owner: str
    name: str
    version: int
    facts: AdapterFacts

    @property
    def digest(self) -> str:
        """Return the identity of its content."""
        return self.facts.digest

    def name_for(self, tenant_id: str) -> str:
        """Return what this tenant calls it."""
        return self.name if self.owner == tenant_id else f"{self.owner}/{self.name}"


@dataclass(slots=True)
class _Adapter:
    versions: list[CatalogVersion] = field(default_factory=list)  # version n at n - 1
    aliases: dict[str, int] = field(default_factory=dict)


class Catalog:
    """Keep names, versions and aliases."""

    def __init__(self) -> None:
        self._adapters: dict[tuple[str, str], _Adapter] = {}

    def add(self, owner: str, name: str, facts: AdapterFacts) -> CatalogVersion:
        """Add the next version of an adapter and point its default alias at it."""
        if not is_name(owner) or not is_name(name):
            raise ValueError(f"{owner}/{name} is no adapter's name")
        adapter = self._adapters.setdefault((owner, name), _Adapter())
        version = CatalogVersion(owner, name, len(adapter.versions) + 1, facts)
        adapter.versions.append(version)
        adapter.aliases[DEFAULT_ALIAS] = version.version
        return version

    def resolve(self, tenant_id: str, text: str, *, field: str) -> CatalogVersion:
        """Return what a name means to a tenant; `field` is the request's field that wrote it.

        Raises: InvalidArgumentError (reason=INVALID_ADAPTER_NAME); NotFoundError (reason=ADAPTER_NOT_FOUND), the same
        for what is missing and what is not theirs.
        """
        try:
            reference = parse_reference(text)
        except ValueError as error:
            raise InvalidArgumentError(str(error), reason="INVALID_ADAPTER_NAME", field=field) from error
        found = self._find(tenant_id, reference)
        if found is None:
            message = f"there is no adapter {text!r} that you may use"
            raise NotFoundError(message, reason="ADAPTER_NOT_FOUND", field=field)
        return found

    def visible(self, tenant_id: str) -> list[CatalogVersion]:
        """Return what each name that a tenant can use means by default, sorted by name."""
        newest = [
            adapter.versions[adapter.aliases[DEFAULT_ALIAS] - 1]
            for (owner, _), adapter in self._adapters.items()
            if owner in (tenant_id, PUBLIC_OWNER)
        ]
        return sorted(newest, key=lambda version: version.name_for(tenant_id))

    def _find(self, tenant_id: str, reference: AdapterReference) -> CatalogVersion | None:
        owner = reference.owner or tenant_id
        adapter = self._adapters.get((owner, reference.name))
        if adapter is None or owner not in (tenant_id, PUBLIC_OWNER):
            return None
        if reference.digest is not None:
            # The newest of equals: two versions may serve the same function.
            return next((v for v in reversed(adapter.versions) if v.digest == reference.digest), None)
        number = reference.version if reference.alias is None else adapter.aliases.get(reference.alias)
        return adapter.versions[number - 1] if number is not None and number <= len(adapter.versions) else None
