"""A frozen Linear with trainable experts beside it, among which each token chooses.

The base is never edited: what training starts from is balanced by a residual of constant factors. All but the base's
own product is computed in float32, and what it adds is rounded once, as a server does. Knows nothing of settings or
files. Runs on the thread that owns the model.
Source: GOAT, arXiv:2502.16894.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from motley_trainer.methods.adapted_linear import AdaptedLinear
from motley_trainer.methods.goat_routing import Routed, choose_experts


@dataclass(frozen=True, eq=False, slots=True)
class Start:
    """What a Linear's experts begin as.

    Shapes: a, residual_a [R, I], b, residual_b [O, R], experts in order along R; router [E, I]; all float32.
    """

    a: Tensor
    b: Tensor
    router: Tensor
    residual_a: Tensor
    residual_b: Tensor


class GoatLinear(AdaptedLinear):
    """A Linear, its experts and their residual.

    Semantics: y = base(x) + scale * sum over the top_k experts of share_e(x) B_e A_e drop_e(x)
    + residual_scaling * residual_b residual_a x. `drops` draws what dropout leaves out in training mode, for each
    expert on its own. Where a token went in training mode is in `routed` until it is taken.
    """

    residual_a: Tensor
    residual_b: Tensor

    def __init__(
        self,
        base: nn.Linear,
        start: Start,
        *,
        top_k: int,
        scale: float,
        residual_scaling: float,
        dropout: float = 0.0,
        drops: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        self.top_k = top_k
        self.scale = scale
        self.dropout = dropout
        self._residual_scaling = residual_scaling
        self._drops = drops
        self._routed: Routed | None = None
        device = base.weight.device
        self.goat_a = nn.Parameter(start.a.to(device))
        self.goat_b = nn.Parameter(start.b.to(device))
        self.router = nn.Parameter(start.router.to(device))
        self.register_buffer("residual_a", start.residual_a.to(device), persistent=False)
        self.register_buffer("residual_b", start.residual_b.to(device), persistent=False)

    @property
    def num_experts(self) -> int:
        """Return how many experts there are."""
        return len(self.router)

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's outputs and what is added to them. Shapes: x [..., I]; returns [..., O]."""
        y: Tensor = self.base(x)
        if not self.is_enabled:
            return y
        rows = x.reshape(-1, x.shape[-1])
        stays = self._stays(rows) if self.training and self.dropout > 0 else None
        products = cast(Any, _Products).apply(
            rows, self.router, self.goat_a, self.residual_a, stays, 1 / (1 - self.dropout)
        )
        logits, hidden, balancing = cast(tuple[Tensor, Tensor, Tensor], products)
        chosen, shares = choose_experts(logits, self.top_k)
        if self.training:
            self._routed = Routed(logits, chosen)
        gates = logits.new_zeros(self.top_k, *logits.shape).scatter(2, chosen.T[:, :, None], shares.T[:, :, None])
        gates = gates if stays is not None else gates.sum(0, keepdim=True)
        gated = (hidden * gates.repeat_interleave(len(self.goat_a) // self.num_experts, 2)).sum(0)
        added = (gated * self.scale) @ self.goat_b.T + (balancing * self._residual_scaling) @ self.residual_b.T
        return (y + added.view(y.shape)).to(y.dtype)

    def take_routed(self) -> Routed:
        """Return where the tokens of the last forward pass in training mode went, and forget it."""
        routed, self._routed = self._routed, None
        assert routed is not None  # whoever asks has just trained
        return routed

    def _stays(self, rows: Tensor) -> Tensor:
        """Draw a mask for each expert that a token goes through; what the others would drop is never read."""
        assert self._drops is not None
        return torch.rand(self.top_k, *rows.shape, generator=self._drops, device=rows.device) >= self.dropout


class _Products(torch.autograd.Function):
    """What the router, the experts and the residual make of x, keeping x as it came for the backward pass.

    Semantics: several Linears that read one x share what is kept. Of dropouts their masks are kept.
    Shapes: x [T, I]; stays [K, T, I]; returns [T, E], [K, T, R] with K 1 where nothing is dropped, and [T, R].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, router: Tensor, a: Tensor, residual_a: Tensor, stays: Tensor | None, raised: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, router, a, residual_a, stays)
        ctx.raised = raised
        wide = x.float()
        hidden = torch.stack([seen @ a.T for seen in _seen(wide, stays, raised)])
        return wide @ router.T, hidden, wide @ residual_a.T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_logits: Tensor, of_hidden: Tensor, of_balancing: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        x, router, a, residual_a, stays = ctx.saved_tensors
        wide = x.float()
        of_a = torch.zeros_like(a)
        for seen, of_seen in zip(_seen(wide, stays, ctx.raised), of_hidden, strict=True):
            of_a.addmm_(of_seen.T, seen)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_logits @ router + of_balancing @ residual_a
            for place, of_seen in enumerate(of_hidden):
                part = of_seen @ a
                of_x += part if stays is None else part.mul_(stays[place]).mul_(ctx.raised)
            of_x = of_x.to(x.dtype)
        return of_x, of_logits.T @ wide, of_a, None, None, None


def _seen(wide: Tensor, stays: Tensor | None, raised: float) -> Iterator[Tensor]:
    """Yield what the experts see of x: one for all of them, or one for each that a token goes through."""
    if stays is None:
        yield wide
        return
    for of_expert in stays:
        yield wide * of_expert * raised
