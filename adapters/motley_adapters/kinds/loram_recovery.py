"""LoRAM's last step: factors of a pruned copy scattered back to the original's shapes with zeros, and the reverse.

Pure tensor functions; which channels were kept is told by the bases' pruned geometry. Any thread.
"""

from __future__ import annotations

import torch
from motley_bases.pruned_geometry import KeptChannels
from torch import Tensor

from motley_adapters.peft_files import LoraPair


def recover(pair: LoraPair, kept: KeptChannels, in_features: int, out_features: int) -> LoraPair:
    """Return a pruned copy's factors in the original's shapes, zero where channels were pruned.

    Shapes: given a [R, kept inputs], b [kept outputs, R]; returned a [R, I], b [O, R].
    Raises: ValueError if the factors are not of the kept channels' sizes.
    """
    a = _scatter("lora_A", pair.a, kept.inputs, in_features, axis=1)
    b = _scatter("lora_B", pair.b, kept.outputs, out_features, axis=0)
    return LoraPair(a, b, pair.scale)


def restrict(pair: LoraPair, kept: KeptChannels) -> LoraPair:
    """Return the kept channels of recovered factors: what `recover` was given."""
    a = pair.a if kept.inputs is None else pair.a[:, list(kept.inputs)]
    b = pair.b if kept.outputs is None else pair.b[list(kept.outputs)]
    return LoraPair(a, b, pair.scale)


def _scatter(name: str, factor: Tensor, kept: tuple[int, ...] | None, size: int, *, axis: int) -> Tensor:
    wanted = size if kept is None else len(kept)
    if factor.shape[axis] != wanted:
        raise ValueError(f"{name} has {factor.shape[axis]} channels, the pruned copy has {wanted}")
    if kept is None:
        return factor
    shape = [size if i == axis else length for i, length in enumerate(factor.shape)]
    return factor.new_zeros(shape).index_copy(axis, torch.tensor(kept, device=factor.device), factor)
