"""Packing: bfloat16 weights in the order in which a CPU's matrix product reads them.

torch's product over a plain weight puts it into that order anew at every call, which at a decode step's few rows costs
as much as the product. Packed once, the same library call gives the same bits. The plain weight is let go of, so memory
stays what it was; asked for, it is unpacked again, bit for bit. Runs once, while a base is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from motley_bases.linear import AdapterLinear
from motley_bases.quantization import is_quantized

LONG_SIDE = 4096  # a multiple of any block


class PackedLinear(nn.Module):
    """A Linear whose weight is packed for the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.training = linear.training
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        with torch.inference_mode(False), torch.no_grad():
            # Without a row count, for one packing serves decode steps and prompts.
            self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    @property
    def weight(self) -> Tensor:
        """Return the weight as the checkpoint has it: a copy, made at every call."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear.

        Shapes: x [..., I]; returns [..., O].
        """
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether this machine's torch packs weights of this dtype, with anything to gain."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True, slots=True)
class PackingBlocks:
    """The multiples to which this machine's packing fills up a weight's sides."""

    outputs: int
    inputs: int

    def packed_bytes(self, in_features: int, out_features: int) -> int:
        """Return the bytes of a packed bfloat16 weight."""
        outputs = -(-out_features // self.outputs) * self.outputs
        return outputs * -(-in_features // self.inputs) * self.inputs * torch.bfloat16.itemsize


def packing_blocks() -> PackingBlocks:
    """Find out how this machine's packing fills up a weight's sides, by packing two small ones."""
    values = [
        int(torch.ops.mkldnn._nbytes(torch.ops.mkldnn._reorder_linear_weight(weight))) // weight.itemsize
        for weight in (torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(1, LONG_SIDE, dtype=torch.bfloat16))
    ]
    outputs = values[1] // LONG_SIDE
    return PackingBlocks(outputs, values[0] // outputs)


def pack_linears(model: nn.Module) -> None:
    """Pack the base weight of every adapter site, one after the other.

    Effects: the sites' plain Linears are let go of; a weight that the token embedding shares stays there as well.
    Quantized Linears stay what they are.
    """
    for site in model.modules():
        if isinstance(site, AdapterLinear) and isinstance(site.base, nn.Linear) and not is_quantized(site.base):
            site.add_module("base", PackedLinear(site.base))
