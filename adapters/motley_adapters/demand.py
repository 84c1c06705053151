"""What a weighted set of adapters needs on the device: facts about parts, without tensors. Pure; any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motley_adapters.fusion import expand_parts
from motley_adapters.spec import AdapterSpec


@dataclass(frozen=True, slots=True)
class Demand:
    """What must be resident for one weighted set of adapters.

    Semantics: `members` are (part digest, weight) in the order of summation; `providers` names for each part an adapter
    of the set that it can be loaded from.
    """

    members: tuple[tuple[str, float], ...]
    providers: Mapping[str, str]


def demand_of(pairs: Sequence[tuple[AdapterSpec, float]]) -> Demand:
    """Return what a weighted set of adapters needs."""
    members = expand_parts(pairs)
    providers = {part: spec.digest for spec, _ in pairs for part in (spec.digest, *spec.shared)}
    return Demand(members, {part: providers[part] for part, _ in members})
