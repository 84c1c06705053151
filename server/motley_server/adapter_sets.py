"""The set of adapters that a request names: resolved, weighed, in the order of summation, and what its members share.

Turns names into versions and digests by the catalog, and refuses what is not a set. Knows no tensors and no leases.
Runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from motley_server.asked import AskedAdapter, Caller
from motley_server.engine.types import ServedAdapter
from motley_server.errors import InvalidArgumentError
from motley_server.registry.catalog import Catalog, CatalogVersion

MAX_ADAPTERS = 8
MAX_ADAPTER_WEIGHT = 100.0
MAX_KNOWN_OVERLAPS = 1024

OverlapCounter = Callable[[Sequence[Any]], Mapping[str, int]]
"""For the facts of a set's S2FT adapters: by digest, how many of an adapter's channels another one changes too."""


class AdapterSets:
    """Resolve what requests name, and remember which sets share channels."""

    def __init__(self, catalog: Catalog, count_overlaps: OverlapCounter) -> None:
        self._catalog = catalog
        self._count_overlaps = count_overlaps
        self._overlaps: dict[tuple[str, ...], Mapping[str, int]] = {}  # by digests, which are content: never stale

    def resolve(self, asked: Sequence[AskedAdapter], caller: Caller) -> tuple[ServedAdapter, ...]:
        """Return the adapters of a request, sorted by digest, without those of weight 0.

        Raises: InvalidArgumentError (reason=TOO_MANY_ADAPTERS, OUT_OF_RANGE, INVALID_ADAPTER_NAME, DUPLICATE_ADAPTER);
        NotFoundError (reason=ADAPTER_NOT_FOUND).
        """
        if len(asked) > MAX_ADAPTERS:
            message = f"{len(asked)} adapters; {MAX_ADAPTERS} are allowed on one request"
            raise InvalidArgumentError(message, reason="TOO_MANY_ADAPTERS", field="adapters")
        named: dict[str, tuple[CatalogVersion, float]] = {}
        for index, one in enumerate(asked):
            field = f"adapters[{index}]"
            weight = 1.0 if one.weight is None else one.weight
            if not abs(weight) <= MAX_ADAPTER_WEIGHT:  # NaN is not either
                message = f"{weight} is not within -{MAX_ADAPTER_WEIGHT:g} and {MAX_ADAPTER_WEIGHT:g}"
                raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field=f"{field}.weight")
            found = self._catalog.resolve(caller.tenant_id, one.name, field=f"{field}.name")
            if weight == 0:
                continue
            if found.digest in named:
                before = named[found.digest][0].name_for(caller.tenant_id)
                message = f"{one.name!r} is the same adapter as {before!r}, which was named before"
                raise InvalidArgumentError(message, reason="DUPLICATE_ADAPTER", field=f"{field}.name")
            named[found.digest] = (found, weight)
        members = [named[digest] for digest in sorted(named)]
        overlaps = self._overlapping_channels([version for version, _ in members])
        return tuple(
            served_adapter(version, caller.tenant_id, weight, overlaps.get(version.digest, 0))
            for version, weight in members
        )

    def _overlapping_channels(self, versions: Sequence[CatalogVersion]) -> Mapping[str, int]:
        """Count a set's shared channels, once for each set: large adapters have tens of thousands of them."""
        facts = [version.facts for version in versions if version.facts.channels]
        if len(facts) < 2:
            return {}
        digests = tuple(one.digest for one in facts)
        if digests not in self._overlaps:
            if len(self._overlaps) == MAX_KNOWN_OVERLAPS:
                self._overlaps.pop(next(iter(self._overlaps)))
            self._overlaps[digests] = self._count_overlaps(facts)
        return self._overlaps[digests]


def served_adapter(
    version: CatalogVersion, tenant_id: str, weight: float, overlapping_channels: int = 0
) -> ServedAdapter:
    """Return what an answer says of an adapter."""
    return ServedAdapter(
        name=version.name_for(tenant_id),
        version=version.version,
        digest=version.digest,
        weight=weight,
        trained_on=version.facts.trained_on,
        kind=version.facts.kind,
        overlapping_channels=overlapping_channels,
    )
