"""A frozen Linear with a trainable low-rank delta beside it.

The delta is computed in float32 whatever the base's dtype, and what it adds is rounded once, as PEFT does by default
and as a server does. Knows nothing of settings or files. Runs on the thread that owns the model.
Source: LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from motley_trainer.methods.adapted_linear import AdaptedLinear


class LoraLinear(AdaptedLinear):
    """A Linear and its delta: base(x) + scaling * B (A dropout(x)).

    Shapes: lora_a [R, I], lora_b [O, R], float32 on the base's device; B starts at zero, and so does the delta.
    Semantics: `initial` draws A as PEFT does, `drops` what dropout leaves out in training mode; they may be one.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        scaling: float,
        initial: torch.Generator,
        dropout: float = 0.0,
        drops: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        self.scaling = scaling
        self.dropout = dropout
        self._drops = drops
        a = torch.empty(rank, base.in_features, device=initial.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=initial)
        device = base.weight.device
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's outputs and the delta's. Shapes: x [..., I]; returns [..., O]."""
        y: Tensor = self.base(x)
        if not self.is_enabled:
            return y
        stays = None
        if self.training and self.dropout > 0:
            assert self._drops is not None
            stays = torch.rand(x.shape, generator=self._drops, device=x.device) >= self.dropout
        delta = cast(Any, _LowRankDelta).apply(x, self.lora_a, self.lora_b, stays, 1 / (1 - self.dropout))
        total: Tensor = y + delta * self.scaling
        return total.to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Write the delta into the base's weight, and return the base."""
        self.base.weight += self.scaling * (self.lora_b @ self.lora_a).to(self.base.weight.dtype)
        return self.base


class _LowRankDelta(torch.autograd.Function):
    """B (A x), keeping x as it came for the backward pass, and not a float32 copy of it.

    Semantics: several Linears that read one x share what is kept. Of a dropout its mask is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, stays: Tensor | None, raised: float) -> Tensor:
        hidden = _seen(x, stays, raised) @ a.T
        ctx.save_for_backward(x, a, b, stays, hidden)
        ctx.raised = raised
        return hidden @ b.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, a, b, stays, hidden = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        of_hidden = gradient @ b
        of_a = of_hidden.T @ _seen(x, stays, ctx.raised).flatten(0, -2)
        of_b = gradient.T @ hidden.flatten(0, -2)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (of_hidden @ a).view(x.shape)
            of_x = (of_x if stays is None else of_x * stays * ctx.raised).to(x.dtype)
        return of_x, of_a, of_b, None, None


def _seen(x: Tensor, stays: Tensor | None, raised: float) -> Tensor:
    """Return what the factors see of x, in float32."""
    return x.float() if stays is None else x.float() * stays * raised
