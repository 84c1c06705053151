"""What S2FT can choose from: in every layer the query heads that o_proj reads, the FFN channels that down_proj reads,
and the same on the side that writes them, v_proj's heads and up_proj's channels.

Numbers alone, from the facts of a base. Channels keep the original's numbers: nothing is permuted, so that no order has
to be legal, and any heads can be chosen. v_proj has as many heads as there are keys and values, which under grouped
queries are fewer than o_proj's. Pure functions; any thread.
Source: S2FT, arXiv:2412.06289, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from motley_adapters.spec import Side
from motley_bases.spec import BaseSpec
from torch import Tensor

from motley_trainer.errors import UnsuitableBaseError


class Place(StrEnum):
    """Where channels are chosen, by the Linear's last name."""

    O_PROJ = "o_proj"
    DOWN_PROJ = "down_proj"
    V_PROJ = "v_proj"
    UP_PROJ = "up_proj"

    @property
    def side(self) -> Side:
        """Return whether columns are chosen or rows."""
        return "input" if self in (Place.O_PROJ, Place.DOWN_PROJ) else "output"

    @property
    def of_heads(self) -> bool:
        """Tell whether whole heads are chosen, or channels one by one."""
        return self in (Place.O_PROJ, Place.V_PROJ)

    @property
    def setting(self) -> str:
        """Return the field of the settings that says how much is chosen."""
        return f"s2ft.{self.value.removesuffix('_proj')}_share"


@dataclass(frozen=True, slots=True)
class Site:
    """One Linear, and the items of which some are chosen: item i is the `item_size` channels from i * item_size on."""

    place: Place
    layer: int
    path: str
    num_items: int
    item_size: int

    def channels(self, items: Sequence[int]) -> Tensor:
        """Return the channels of items, in their order. Shapes: [len(items) * item_size] int64."""
        first = torch.tensor(list(items), dtype=torch.long)[:, None] * self.item_size
        return (first + torch.arange(self.item_size)).flatten()


def sites_of(base: BaseSpec, place: Place) -> tuple[Site, ...]:
    """Return the sites of one place, a layer after the other.

    Raises: UnsuitableBaseError with reason NO_CHANNELS for a base that has no such Linear, or not of that size.
    """
    block = "self_attn" if place.of_heads else "mlp"
    sites = []
    for layer, attention in enumerate(base.layers):
        path = f"model.layers.{layer}.{block}.{place.value}"
        if path not in base.linears:
            raise _unsuitable(base, place, f"there is no Linear {path}")
        inputs, outputs = base.linears[path]
        num_channels = inputs if place.side == "input" else outputs
        item_size = attention.head_dim if place.of_heads else 1
        if place.of_heads:
            heads = attention.num_heads if place is Place.O_PROJ else attention.num_kv_heads
            if heads * item_size != num_channels:
                raise _unsuitable(base, place, f"{path} has {num_channels} channels, not {heads} heads of {item_size}")
        sites.append(Site(place, layer, path, num_channels // item_size, item_size))
    return tuple(sites)


def _unsuitable(base: BaseSpec, place: Place, problem: str) -> UnsuitableBaseError:
    message = f"{base.architecture} cannot be trained by s2ft: {problem}"
    return UnsuitableBaseError(message, reason="NO_CHANNELS", field=place.setting)
