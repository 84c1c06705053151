"""A frozen Linear some channels of which learn: columns of its weight, or rows, by a dense block beside it.

The block starts at zero, and nothing of the Linear is copied, permuted or written. What it adds is computed in float32
and rounded once, as a server does. Behind columns, a backward pass needs the inputs of these channels and no others, so
no others are kept for it. Runs on the thread that owns the model.
Source: S2FT, arXiv:2412.06289, section 3.3 (partial back-propagation).
"""

from __future__ import annotations

from typing import Any

import torch
from motley_adapters.spec import Side
from torch import Tensor, nn

from motley_trainer.methods.adapted_linear import AdaptedLinear


class ChannelLinear(AdaptedLinear):
    """A Linear, and a trainable block on some of its channels.

    Semantics: with side "input", y = base(x) + x[channels] block^T; with side "output", y = base(x), to whose channels
    x block^T is added.
    Shapes: channels [S] int64, ascending; block [O, S] on the input side, [S, I] on the output side, float32.
    """

    channels: Tensor

    def __init__(self, base: nn.Linear, side: Side, channels: Tensor) -> None:
        super().__init__(base)
        self.side = side
        device = base.weight.device
        self.register_buffer("channels", channels.to(device, torch.long), persistent=False)
        width = len(channels)
        shape = (base.out_features, width) if side == "input" else (width, base.in_features)
        self.block = nn.Parameter(torch.zeros(shape, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear. Shapes: x [..., I]; returns [..., O] in the base's dtype."""
        y: Tensor = self.base(x)
        if not self.is_enabled:
            return y
        if self.side == "input":
            added_to: Tensor = _AddColumns.apply(x, y, self.block, self.channels)  # type: ignore[no-untyped-call]
            return added_to
        rows_added: Tensor = _AddRows.apply(x, y, self.block, self.channels)  # type: ignore[no-untyped-call]
        return rows_added


class _AddColumns(torch.autograd.Function):
    """y + x[..., channels] @ block^T, for which a backward pass finds x[..., channels] and not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, block: Tensor, channels: Tensor) -> Tensor:
        picked = x.index_select(-1, channels)  # a copy: a view would keep all of x alive
        ctx.save_for_backward(picked, block, channels)
        ctx.width = x.shape[-1]
        return (picked.to(block.dtype) @ block.T).add_(y).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (of_y,) = gradients
        picked, block, channels = ctx.saved_tensors
        wide = of_y.to(block.dtype)
        of_x = of_block = None
        if ctx.needs_input_grad[0]:
            of_x = of_y.new_zeros(*of_y.shape[:-1], ctx.width)
            of_x.index_copy_(-1, channels, (wide @ block).to(of_y.dtype))
        if ctx.needs_input_grad[2]:
            of_block = wide.flatten(0, -2).T @ picked.to(block.dtype).flatten(0, -2)
        return of_x, of_y, of_block, None


class _AddRows(torch.autograd.Function):
    """y, with x @ block^T added to its channels; a backward pass finds x as it came, and not a wider copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, block: Tensor, channels: Tensor) -> Tensor:
        ctx.save_for_backward(x, block, channels)
        total = (x.to(block.dtype) @ block.T).add_(y.index_select(-1, channels))
        return y.index_copy(-1, channels, total.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (of_y,) = gradients
        x, block, channels = ctx.saved_tensors
        of_rows = of_y.index_select(-1, channels).to(block.dtype)
        of_x = of_block = None
        if ctx.needs_input_grad[0]:
            of_x = (of_rows @ block).to(x.dtype)
        if ctx.needs_input_grad[2]:
            of_block = of_rows.flatten(0, -2).T @ x.to(block.dtype).flatten(0, -2)
        return of_x, of_y, of_block, None
