"""Quantized Linears as they are served, where bitsandbytes' own product would not do.

Imports bitsandbytes, and so is imported only where something is quantized. Runs on the engine thread.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor
from torch.nn import functional

MAX_CODE = 127.0


class ServedLinear8bit(Linear8bitLt):
    """A Linear8bitLt that leaves activations alone, except in training.

    Semantics: y = (x codes^T) * scales / 127 + bias, the codes being exact in every dtype served. The product of the
    parent rounds activations to 8 bits of their row's largest, so that a difference in the last bit, which the shape of
    a batch makes, can become one of a hundredth: with it, neighbours would be seen.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear.

        Shapes: x [..., I]; returns [..., O].
        """
        if self.training:
            y: Tensor = super().forward(x)
            return y
        scales = self._scales() * (1.0 / MAX_CODE)
        codes = self.weight.to(x.dtype)
        if x.dtype == torch.float16:  # sums of unscaled products leave its range
            return functional.linear(x, codes.mul_(scales[:, None]), self.bias)
        y = functional.linear(x, codes).mul_(scales)
        return y if self.bias is None else y.add_(self.bias)

    def _scales(self) -> Tensor:
        """Return the largest weight of each row; the parent moves them from the weight once it has been called."""
        return cast(Tensor, getattr(self.weight, "SCB", None) if self.state.SCB is None else self.state.SCB)


class UnalignedLinear4bit(Linear4bit):
    """A Linear4bit on a CPU whose rows are not whole blocks of weights that share a scale.

    Semantics: what the parent means. Where a row's end is not a block's, bitsandbytes 0.50 expands rows of 16k weights
    with the wrong scales on CPUs with AVX512, and rows of an odd number by a function that it compiles when first
    called; taken for one long row, as it is stored, the weight is expanded right.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear.

        Shapes: x [..., I]; returns [..., O].
        """
        state = cast(Any, self.weight).quant_state
        flat = copy.copy(state)
        num_weights = state.shape.numel()
        flat.shape, flat.dtype = torch.Size((1, num_weights + num_weights % 2)), x.dtype
        weight = dequantize_4bit(self.weight.data, flat).flatten()[:num_weights].view(state.shape)
        return functional.linear(x, weight, self.bias)
