"""Which items S2FT trains: so many of each site, or of all together, by score or at random, but none that is taken.

Shares are counted exactly: of what is not 0, at least one item. Ties go to the lower number. Pure; any thread.
Source: S2FT, arXiv:2412.06289, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from motley_trainer.errors import SettingsError
from motley_trainer.methods.s2ft_sites import Site
from motley_trainer.spec.settings import ChannelBudget, ChannelOrder

Chosen = Mapping[Site, tuple[int, ...]]
"""The items of each site, ascending; a site with none is left out."""


def select_items(
    sites: Sequence[Site],
    scores: Sequence[Tensor],
    share: float,
    budget: ChannelBudget,
    order: ChannelOrder,
    taken: Mapping[Site, frozenset[int]],
) -> Chosen:
    """Choose the items of one place.

    Shapes: scores of each site [num_items].
    Semantics: a share of each site's items, rounded down, or of all sites' together; those that are `taken` count
    among them and are not chosen.
    Raises: SettingsError with reason NOT_ENOUGH_CHANNELS, naming the place's share, if too few are free.
    """
    pools = [list(sites)] if budget is ChannelBudget.GLOBAL else [[site] for site in sites]
    by_site = dict(zip(sites, scores, strict=True))
    chosen: dict[Site, tuple[int, ...]] = {}
    for pool in pools:
        values = torch.cat([by_site[site] for site in pool])
        free = torch.cat([_free(site, taken.get(site, frozenset())) for site in pool]).nonzero()[:, 0]
        wanted = num_items(share, len(values))
        if len(free) < wanted:
            where = pool[0].path if len(pool) == 1 else f"the {pool[0].place.value} of all layers"
            message = f"{wanted} items of {where} are asked for, and other adapters leave {len(free)}"
            raise SettingsError(message, reason="NOT_ENOUGH_CHANNELS", field=pool[0].place.setting)
        best = values[free].argsort(descending=order is ChannelOrder.LARGE, stable=True)[:wanted]
        chosen |= _by_site(pool, free[best].sort().values)
    return chosen


def num_items(share: float, total: int) -> int:
    """Return how many of `total` a share is: rounded down from the share as it was written, and one at least."""
    return max(1, math.floor(Fraction(str(share)) * total))


def random_scores(sites: Sequence[Site], seed: int) -> list[Tensor]:
    """Return scores that make every choice of items equally likely. Shapes: of each site [num_items]."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randperm(sum(site.num_items for site in sites), generator=generator)
    return list(ranks.split([site.num_items for site in sites]))


def _free(site: Site, taken: frozenset[int]) -> Tensor:
    free = torch.ones(site.num_items, dtype=torch.bool)
    free[list(taken)] = False
    return free


def _by_site(pool: Sequence[Site], places: Tensor) -> dict[Site, tuple[int, ...]]:
    """Part places in the sequence of a pool's items, ascending, into the items of its sites."""
    chosen: dict[Site, tuple[int, ...]] = {}
    first = 0
    for site in pool:
        mine = places[(places >= first) & (places < first + site.num_items)] - first
        if len(mine):
            chosen[site] = tuple(mine.tolist())
        first += site.num_items
    return chosen
