"""Weights in NF4: 4-bit codes in blocks of 64, whose scales are 8-bit codes in blocks of 256.

Codes are bitsandbytes' own; their tables, which are the same for every weight, are not held with each. Imports
bitsandbytes, and so is imported only where something is quantized. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from motley_bases.quantization import BLOCK_SCALES, BLOCK_WEIGHTS
from torch import Tensor

KIND = "nf4"
CPU_WEIGHTS = 1 << 14  # quantized at once, whole blocks


@dataclass(frozen=True, eq=False, slots=True)
class Nf4Weight:
    """A weight [O, I] in codes, two in a byte, row after row.

    Shapes: with N = O * I, codes [ceil(N / 2)] and scales [ceil(N / 64)] uint8; scales_of_scales [ceil(N / 64 / 256)]
    and offset [] float32.
    """

    shape: torch.Size
    codes: Tensor
    scales: Tensor
    scales_of_scales: Tensor
    offset: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], shape: torch.Size) -> Nf4Weight:
        """Return the weight of which a checkpoint has these tensors."""
        return cls(shape, *(tensors[name] for name in ("codes", "scales", "scales_of_scales", "offset")))

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the codes stand for.

        Semantics: as one long row, which is how it is stored: of rows that do not end where a block does, bitsandbytes
        takes wrong scales on some CPUs.
        """
        make = cast(Any, QuantState)
        nested = make(
            absmax=self.scales_of_scales, code=_map_of_scales(self.codes.device), blocksize=BLOCK_SCALES,
            dtype=torch.float32,
        )  # fmt: skip
        num_weights = self.shape.numel()
        state = make(
            absmax=self.scales, shape=torch.Size((1, num_weights + num_weights % 2)), dtype=dtype,
            code=_map_of_weights(self.codes.device), blocksize=BLOCK_WEIGHTS, quant_type=KIND, offset=self.offset,
            state2=nested,
        )  # fmt: skip
        return dequantize_4bit(self.codes, state).flatten()[:num_weights].view(self.shape)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return codes and scales."""
        return {
            "codes": self.codes,
            "scales": self.scales,
            "scales_of_scales": self.scales_of_scales,
            "offset": self.offset,
        }


def quantize(weight: Tensor) -> Nf4Weight:
    """Quantize a weight, each number to the nearest value of its block.

    Semantics: on a CPU some blocks at a time, since bitsandbytes makes several copies of what it is given there.
    """
    flat = weight.flatten()
    parts = [
        quantize_4bit(part, blocksize=BLOCK_WEIGHTS, quant_type=KIND)
        for part in flat.split(CPU_WEIGHTS if flat.device.type == "cpu" else flat.numel())
    ]
    scales = torch.cat([state.absmax for _, state in parts])
    offset = scales.mean()
    table = _map_of_scales(flat.device)
    codes_of_scales, nested = quantize_blockwise(scales - offset, code=table, blocksize=BLOCK_SCALES)
    codes = torch.cat([codes.flatten() for codes, _ in parts])
    return Nf4Weight(weight.shape, codes, codes_of_scales, nested.absmax, offset)


@cache
def _map_of_weights(device: torch.device) -> Tensor:
    return cast(Tensor, cast(Any, get_4bit_type)(KIND, device=device))


@cache
def _map_of_scales(device: torch.device) -> Tensor:
    return cast(Tensor, cast(Any, create_dynamic_map)().to(device))
