"""Quantized Linears as they are served and trained on: bitsandbytes' weights, without its products.

One product a way of quantizing, on every device and for any number of rows: the weight is made whole again in the dtype
that is computed in, and multiplied. Imports bitsandbytes, and so is imported only where something is quantized. Runs on
the engine thread, and on that of a training job.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional

MAX_CODE = 127.0


class ServedLinear4bit(Linear4bit):
    """A Linear4bit that expands its weight, whoever asks.

    Semantics: y = x W^T + bias, W being the weight that is meant, in the base's dtype. The product of the parent goes
    by the number of rows on CUDA, where neighbours would be seen, and by the processor on a CPU, where some round the
    scales in place.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear.

        Shapes: x [..., I]; returns [..., O].
        """
        computed_in = cast(torch.dtype, cast(Any, self.weight).quant_state.dtype)
        return _apply(self, x.to(computed_in)).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return the output, of which nothing is differentiated."""
        return functional.linear(x, self.expanded(x.dtype), self.bias)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that is meant.

        Semantics: where a row's end is not that of a block of weights that share a scale, bitsandbytes 0.50 on a CPU
        expands rows of 16k weights with the wrong scales, and rows of an odd number by a function that it compiles when
        first called; taken for one long row, as it is stored, the weight is expanded right.
        Shapes: returns [O, I].
        """
        state = copy.copy(cast(Any, self.weight).quant_state)
        shape, state.dtype = state.shape, dtype
        if self.in_features % state.blocksize == 0:
            return dequantize_4bit(self.weight.data, state)
        num_weights = shape.numel()
        state.shape = torch.Size((1, num_weights + num_weights % 2))
        return dequantize_4bit(self.weight.data, state).flatten()[:num_weights].view(shape)


class ServedLinear8bit(Linear8bitLt):
    """A Linear8bitLt that leaves activations alone.

    Semantics: y = (x codes^T) * scales / 127 + bias, the codes being exact in every dtype served. The product of the
    parent rounds activations to 8 bits of their row's largest, so that a difference in the last bit, which the shape of
    a batch makes, can become one of a hundredth: with it, neighbours would be seen.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear.

        Shapes: x [..., I]; returns [..., O].
        """
        return _apply(self, x)

    def product(self, x: Tensor) -> Tensor:
        """Return the output, of which nothing is differentiated."""
        if x.dtype == torch.float16:  # sums of unscaled products leave its range
            return functional.linear(x, self.expanded(x.dtype), self.bias)
        y = functional.linear(x, self.weight.data.to(x.dtype)).mul_(self._scales())
        return y if self.bias is None else y.add_(self.bias)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that is meant. Shapes: returns [O, I]."""
        # As plain data: what bitsandbytes' own parameter turns into is quantized again when it is moved.
        return self.weight.data.to(dtype).mul_(self._scales()[:, None])

    def _scales(self) -> Tensor:
        """Return what a code of each row is worth. Shapes: returns [O], float32."""
        return cast(Tensor, cast(Any, self.weight).SCB) * (1.0 / MAX_CODE)


class _Product(torch.autograd.Function):
    """The product of a frozen weight, which is expanded again for the gradient instead of being kept whole for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, linear: ServedLinear4bit | ServedLinear8bit) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (of_y,) = gradients
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = of_y @ ctx.linear.expanded(of_y.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = of_y.flatten(0, -2).sum(0)
        return of_x, of_bias, None


def _apply(linear: ServedLinear4bit | ServedLinear8bit, x: Tensor) -> Tensor:
    bias: nn.Parameter | None = linear.bias
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = _Product.apply(x, bias, linear)  # type: ignore[no-untyped-call]
        return y
    return linear.product(x)
