"""S2FT on a pruned copy: what is left of a block when some channels of its Linear are gone.

Pure tensor functions; which channels were kept is told by the bases' pruned geometry. Any thread.
"""

from __future__ import annotations

import torch
from motley_bases.pruned_geometry import KeptChannels

from motley_adapters.kinds.s2ft import ChannelBlock


def restrict_block(block: ChannelBlock, kept: KeptChannels) -> ChannelBlock | None:
    """Return the part of a block that lies on kept channels, in the copy's numbers; None where there is none.

    Semantics: the block's own channels go where they were pruned, and so does the other side of the rest.
    """
    own, other = (kept.inputs, kept.outputs) if block.side == "input" else (kept.outputs, kept.inputs)
    axis = 1 if block.side == "input" else 0
    indices, weight = block.indices, block.weight
    if other is not None:
        weight = weight.index_select(1 - axis, torch.tensor(other))
    if own is not None:
        numbers = torch.tensor(own, dtype=indices.dtype)
        stays = torch.isin(indices, numbers)
        weight = weight.index_select(axis, torch.nonzero(stays).flatten())
        indices = torch.searchsorted(numbers, indices[stays], out_int32=True)
    return ChannelBlock(block.side, indices, weight) if len(indices) else None
