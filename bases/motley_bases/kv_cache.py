"""The paged key-value cache of one base: a pair of tensors per layer, sized by that layer's own heads.

It owns memory and nothing else: which block belongs to whom is the block pool's knowledge. Allocated before serving,
written on the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from motley_kernels.paged_attention.types import LayerKV

from motley_bases.spec import BaseSpec, LayerSpec


@dataclass(frozen=True, eq=False, slots=True)
class KVCache:
    """Every layer's keys and values, in blocks of `block_size` tokens."""

    layers: tuple[LayerKV, ...]
    num_blocks: int
    block_size: int

    @classmethod
    def allocate(
        cls, spec: BaseSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> Self:
        """Allocate zeroed blocks for every layer.

        Semantics: zeroed, not empty, since a masked entry is multiplied by zero and stale memory may hold NaN.
        """
        layers = tuple(allocate_layer(layer, num_blocks, block_size, dtype, device) for layer in spec.layers)
        return cls(layers, num_blocks, block_size)


def allocate_layer(
    layer: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> LayerKV:
    """Allocate one layer's zeroed blocks."""
    shape = (num_blocks, block_size, layer.num_kv_heads, layer.head_dim)
    return LayerKV(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))


def bytes_per_block(spec: BaseSpec, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes that one block takes in all layers together, keys and values."""
    return bytes_per_token(spec.layers, dtype) * block_size


def bytes_per_token(layers: Iterable[LayerSpec], dtype: torch.dtype) -> int:
    """Return the bytes that one token takes in all layers together, keys and values."""
    return sum(2 * layer.num_kv_heads * layer.head_dim for layer in layers) * dtype.itemsize
