"""Sets of adapters taken apart: which resident parts serve one, and where its S2FT adapters meet.

Nothing is merged: a set is a weighted sum of parts, so this is bookkeeping over facts. It knows no tensors and no
requests. Pure functions; any thread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from motley_adapters.spec import AdapterSpec


def expand_parts(pairs: Iterable[tuple[AdapterSpec, float]]) -> tuple[tuple[str, float], ...]:
    """Return the parts that serve a set of adapters, as (part digest, weight).

    Semantics: own parts in the order given, which is that of `set_identity`, then shared parts by digest. A shared part
    carries the sum of its adapters' weights, whatever their order; a part whose weight is 0 is left out.
    """
    own: list[tuple[str, float]] = []
    shared: dict[str, list[float]] = {}
    for spec, weight in pairs:
        own.append((spec.digest, weight))
        for digest in spec.shared:
            shared.setdefault(digest, []).append(weight)
    sums = ((digest, math.fsum(weights)) for digest, weights in sorted(shared.items()))
    return tuple((digest, weight) for digest, weight in (*own, *sums) if weight != 0)


def overlapping_channels(specs: Iterable[AdapterSpec]) -> dict[str, int]:
    """Return, for each S2FT adapter of a set, how many of its channels another one of the set changes too.

    Semantics: by digest; a channel is one input or one output of one Linear. Where two adapters hold one, its weights
    move by the weighted sum of both.
    """
    held_at: dict[tuple[str, str], dict[str, set[int]]] = {}
    for spec in specs:
        for path, held in spec.channels.items():
            held_at.setdefault((path, held.side), {})[spec.digest] = set(held.indices)
    counts: Counter[str] = Counter()
    for holders in held_at.values():
        seen: set[int] = set()
        repeated: set[int] = set()
        for indices in holders.values():
            repeated |= seen & indices
            seen |= indices
        for digest, indices in holders.items():
            counts[digest] += len(indices & repeated)
    return dict(counts)
