"""The set of adapters that a request names: resolved, held, weighed, in the order of summation, and what they share.

Turns names into versions by the registry, holds them until the last request under the set has ended, and refuses what
is not a set. Knows no tensors. Runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from motley_server.asked import AskedAdapter, Caller
from motley_server.engine.types import ServedAdapter
from motley_server.errors import InvalidArgumentError, MotleyError
from motley_server.library.holds import Hold, Holds, Revoke
from motley_server.registry.adapters import Adapters
from motley_server.registry.database import Database
from motley_server.registry.names import AdapterReference, parse_reference
from motley_server.registry.ownership import adapter_not_found
from motley_server.registry.records import AdapterVersion

if TYPE_CHECKING:  # torch comes with them
    from motley_adapters.spec import AdapterSpec

    from motley_server.library.intake import AdapterIntake

MAX_ADAPTERS = 8
MAX_ADAPTER_WEIGHT = 100.0
MAX_KNOWN_OVERLAPS = 1024

OverlapCounter = Callable[[Sequence[Any]], Mapping[str, int]]
"""For the facts of a set's S2FT adapters: by digest, how many of an adapter's channels another one changes too."""


class HeldSet:
    """The adapters of one call, which stay until everybody who joined has left; leaves once itself when it is exited.

    Semantics: `join` is given what to call if a deletion does not wait any longer.
    """

    def __init__(self, adapters: tuple[ServedAdapter, ...], holds: Sequence[Hold], given_back: ExitStack) -> None:
        self.adapters = adapters
        self._given_back = given_back
        self._num_users = 1
        self._revokes: list[Revoke] = []
        for hold in holds:
            hold.on_revoked = self._revoke

    def join(self, revoke: Revoke) -> None:
        """Use the set until `leave`."""
        self._num_users += 1
        self._revokes.append(revoke)

    def leave(self) -> None:
        """Use the set no longer; the last to leave gives the adapters back."""
        self._num_users -= 1
        if self._num_users == 0:
            self._given_back.close()

    def __enter__(self) -> HeldSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def _revoke(self, error: MotleyError) -> None:
        for revoke in self._revokes:
            revoke(error)


class AdapterSets:
    """Resolve and hold what requests name, and remember which sets share channels."""

    def __init__(
        self,
        database: Database,
        adapters: Adapters,
        holds: Holds,
        intake: AdapterIntake,
        count_overlaps: OverlapCounter,
    ) -> None:
        self._database = database
        self._adapters = adapters
        self._holds = holds
        self._intake = intake
        self._count_overlaps = count_overlaps
        self._overlaps: dict[tuple[str, ...], Mapping[str, int]] = {}  # by digests, which are content: never stale

    async def take(self, asked: Sequence[AskedAdapter], caller: Caller) -> HeldSet:
        """Hold the adapters of a request, sorted by digest, without those of weight 0.

        Raises: InvalidArgumentError (reason=TOO_MANY_ADAPTERS, OUT_OF_RANGE, INVALID_ADAPTER_NAME, DUPLICATE_ADAPTER);
        NotFoundError (reason=ADAPTER_NOT_FOUND); and what `AdapterIntake.introduce` does.
        """
        if len(asked) > MAX_ADAPTERS:
            message = f"{len(asked)} adapters; {MAX_ADAPTERS} are allowed on one request"
            raise InvalidArgumentError(message, reason="TOO_MANY_ADAPTERS", field="adapters")
        if not asked:
            return HeldSet((), (), ExitStack())
        weights = [_weight(one, f"adapters[{index}]") for index, one in enumerate(asked)]
        references = [read_reference(one.name, f"adapters[{index}].name") for index, one in enumerate(asked)]
        versions = await self._database.run(self._resolve, caller.tenant_id, references)
        with ExitStack() as given_back:
            holds = [
                self._hold(version, one.name, f"adapters[{index}].name", given_back)
                for index, (one, version) in enumerate(zip(asked, versions, strict=True))
            ]
            named = _distinct(asked, holds, weights, caller.tenant_id)
            members = [named[digest] for digest in sorted(named)]
            facts = {hold.version.digest: await self._intake.introduce(hold.version) for hold, _ in members}
            for digest in facts:
                given_back.callback(self._intake.lease(digest).release)
            overlaps = self._overlapping_channels(list(facts.values()))
            adapters = tuple(
                _served(hold.version, caller.tenant_id, weight, overlaps.get(hold.version.digest, 0))
                for hold, weight in members
            )
            return HeldSet(adapters, holds, given_back.pop_all())

    def _resolve(self, tenant_id: str, references: Sequence[AdapterReference]) -> list[AdapterVersion | None]:
        return [self._adapters.resolve(tenant_id, reference) for reference in references]

    def _hold(self, version: AdapterVersion | None, text: str, field: str, given_back: ExitStack) -> Hold:
        hold = None if version is None else self._holds.hold(version)
        if hold is None:
            raise adapter_not_found(text, field)
        given_back.callback(hold.release)
        return hold

    def _overlapping_channels(self, facts: Sequence[AdapterSpec]) -> Mapping[str, int]:
        """Count a set's shared channels, once for each set: large adapters have tens of thousands of them."""
        facts = [one for one in facts if one.channels]
        if len(facts) < 2:
            return {}
        digests = tuple(one.digest for one in facts)
        if digests not in self._overlaps:
            if len(self._overlaps) == MAX_KNOWN_OVERLAPS:
                self._overlaps.pop(next(iter(self._overlaps)))
            self._overlaps[digests] = self._count_overlaps(facts)
        return self._overlaps[digests]


def read_reference(text: str, field: str) -> AdapterReference:
    """Read a name as a request writes it; `field` is the request's field that did.

    Raises: InvalidArgumentError (reason=INVALID_ADAPTER_NAME).
    """
    try:
        return parse_reference(text)
    except ValueError as error:
        raise InvalidArgumentError(str(error), reason="INVALID_ADAPTER_NAME", field=field) from error


def _weight(asked: AskedAdapter, field: str) -> float:
    weight = 1.0 if asked.weight is None else asked.weight
    if not abs(weight) <= MAX_ADAPTER_WEIGHT:  # NaN is not either
        message = f"{weight} is not within -{MAX_ADAPTER_WEIGHT:g} and {MAX_ADAPTER_WEIGHT:g}"
        raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field=f"{field}.weight")
    return weight


def _distinct(
    asked: Sequence[AskedAdapter], holds: Sequence[Hold], weights: Sequence[float], tenant_id: str
) -> dict[str, tuple[Hold, float]]:
    """Return the members of a set by digest; a weight of 0 is absence."""
    named: dict[str, tuple[Hold, float]] = {}
    for index, (one, hold, weight) in enumerate(zip(asked, holds, weights, strict=True)):
        digest = hold.version.digest
        if weight == 0:
            continue
        if digest in named:
            before = named[digest][0].version.name_for(tenant_id)
            message = f"{one.name!r} is the same adapter as {before!r}, which was named before"
            raise InvalidArgumentError(message, reason="DUPLICATE_ADAPTER", field=f"adapters[{index}].name")
        named[digest] = (hold, weight)
    return named


def _served(version: AdapterVersion, tenant_id: str, weight: float, overlapping_channels: int) -> ServedAdapter:
    return ServedAdapter(
        name=version.name_for(tenant_id),
        version=version.version,
        digest=version.digest,
        weight=weight,
        trained_on=version.trained_on,
        kind=version.kind,
        overlapping_channels=overlapping_channels,
    )
