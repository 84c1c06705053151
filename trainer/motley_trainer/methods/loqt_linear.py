"""A Linear whose weight is held in few bits, with a trained low-rank factor and a frozen one beside it.

Now and then it begins anew: the factors become a part of the weight, and the gradient of the whole weight tells along
which directions the next ones lie. Knows nothing of steps, settings or files. Runs on the thread that owns the model.
Source: LoQT, arXiv:2405.16528.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from motley_trainer.errors import DivergedError
from motley_trainer.methods.held_weight import HeldWeight, Holding, PlainWeight
from motley_trainer.methods.loqt_compensation import compensated, product_of
from motley_trainer.methods.loqt_projection import Side, directions, side_of
from motley_trainer.spec.settings import LoqtDecomposition


@dataclass(frozen=True, slots=True)
class Renewing:
    """How a Linear begins anew; `field` is where a spec says so."""

    rank: int
    scale: float
    compensation_steps: int
    decomposition: LoqtDecomposition
    holding: Holding
    field: str = "loqt"


class LoqtLinear(nn.Module):
    """A Linear in whose place this stands: y = x (W + scale * B A)^T + bias.

    Shapes: the frozen factor lies on the smaller side, A [R, I] or B [O, R]; the trained one, which is `factor`, is the
    other, in the Linear's dtype.
    Semantics: until it has begun, W is the Linear's own weight, and there is no product. While it `captures`, a
    backward pass hands the gradient of the whole weight over, and gives the factor none.
    """

    def __init__(self, linear: nn.Linear, path: str, renewing: Renewing) -> None:
        super().__init__()
        self.path = path
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.side = side_of(self.in_features, self.out_features)
        self.captures: Callable[[LoqtLinear, Tensor], None] | None = None
        self.held: HeldWeight = PlainWeight(linear.weight.detach())
        self.frozen: HeldWeight | None = None
        self._renewing = renewing
        self.factor = nn.Parameter(linear.weight.new_zeros(self.factor_shape))
        self.bias = linear.bias
        self.train(linear.training)

    @property
    def scale(self) -> float:
        """Return what the product of the factors is multiplied by."""
        return self._renewing.scale

    @property
    def rank(self) -> int:
        """Return the rank of both factors."""
        return self._renewing.rank

    @property
    def factor_shape(self) -> torch.Size:
        """Return the shape of the trained factor."""
        is_input = self.side is Side.INPUT
        return torch.Size((self.out_features, self.rank) if is_input else (self.rank, self.in_features))

    @property
    def frozen_shape(self) -> torch.Size:
        """Return the shape of the frozen factor."""
        is_input = self.side is Side.INPUT
        return torch.Size((self.rank, self.in_features) if is_input else (self.out_features, self.rank))

    @property
    def weight(self) -> Tensor:
        """Return the weight that is meant: a copy, made at every call."""
        return self.merged().to(self.factor.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs. Shapes: x [..., I]; returns [..., O]."""
        return cast(Tensor, cast(Any, _Product).apply(x, self.factor, self.bias, self))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the weight with the factors in it, float32: a copy."""
        weight = self.held.expanded(torch.float32)
        if self.frozen is None:
            return weight.clone()
        return product_of(self.factor, self.frozen.expanded(torch.float32), self.side).mul_(self.scale).add_(weight)

    def renew(self, gradient: Tensor) -> None:
        """Merge the factors into the weight, hold that anew, and begin others along a gradient's directions.

        Shapes: gradient [O, I].
        Effects: the output stays what it was, but for what holding the weight loses; nothing is captured any more.
        Raises: DivergedError with reason LOSS_NOT_FINITE, after which nothing is changed.
        """
        asked = self._renewing
        if not bool(gradient.isfinite().all()):
            message = (
                f"training diverged at a merge: the gradient of {self.path} has values that are not finite; a lower "
                f"learning rate, or a lower {asked.field}.scale, may do"
            )
            raise DivergedError(message, reason="LOSS_NOT_FINITE", field="optimizer.learning_rate")
        with torch.no_grad():  # as a decorator it would hold the gradient to the end
            chosen = directions(gradient.float(), asked.rank, self.side, asked.decomposition)
            del gradient  # as large as the weight, which is made whole now
            hold, frozen, weight = asked.holding.hold, asked.holding.hold(chosen), self.merged()
            wide, steps = frozen.expanded(torch.float32), asked.compensation_steps
            done = compensated(
                weight, wide, self.side, scale=self.scale, steps=steps, hold=hold, dtype=self.factor.dtype
            )
            self.held = done.held
            self.factor.copy_(done.factor)
            self.frozen, self.captures = frozen, None

    def tensors(self) -> dict[str, Tensor]:
        """Return what is held beside the parameters, by name."""
        assert self.frozen is not None  # it has begun
        parts: Mapping[str, HeldWeight] = {"weight": self.held, "frozen": self.frozen}
        return {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.tensors().items()}

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold what a checkpoint has."""
        device, find = self.factor.device, self._renewing.holding.find
        found = {
            part: {
                name.removeprefix(f"{part}."): tensor.to(device, copy=True)
                for name, tensor in tensors.items()
                if name.startswith(f"{part}.")
            }
            for part in ("weight", "frozen")
        }
        self.held = find(found["weight"], torch.Size((self.out_features, self.in_features)))
        self.frozen = find(found["frozen"], self.frozen_shape)

    def settled(self, device: torch.device) -> nn.Linear:
        """Return a plain Linear that computes the same, in the dtype that this has."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight.to(device), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(device), requires_grad=False)
        return plain.train(self.training)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return A [R, I] and B [O, R], None before it has begun."""
        if self.frozen is None:
            return None
        frozen, trained = self.frozen.expanded(dtype), self.factor.detach()
        return (frozen, trained) if self.side is Side.INPUT else (trained, frozen)


class _Product(torch.autograd.Function):
    """The product, for which nothing is kept that can be had again: the weight is expanded twice, and never kept.

    Semantics: for the backward pass x is kept where the factor reads it, or the whole weight's gradient does; behind a
    projection of the inputs R numbers of each row are enough.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, bias: Tensor | None, linear: LoqtLinear) -> Tensor:
        y = functional.linear(x, linear.held.expanded(x.dtype), bias)
        pair, hidden = linear.factors(x.dtype), None
        if pair is not None:
            hidden = x @ pair[0].T
            y.add_(hidden @ pair[1].T, alpha=linear.scale)
        ctx.linear, ctx.captures = linear, linear.captures
        keeps_hidden = linear.captures is None and linear.side is Side.INPUT
        ctx.save_for_backward(*((None, hidden) if keeps_hidden else (x, None)), factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, hidden, _ = ctx.saved_tensors  # the factor is kept to see that it has not changed since
        linear: LoqtLinear = ctx.linear
        pair = linear.factors(of_y.dtype)
        of_x = of_factor = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = of_y @ linear.held.expanded(of_y.dtype)
            if pair is not None:
                of_x.add_((of_y @ pair[1]) @ pair[0], alpha=linear.scale)
        rows = of_y.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        if ctx.captures is not None:
            ctx.captures(linear, rows.T @ x.flatten(0, -2))
        elif ctx.needs_input_grad[1] and pair is not None:
            read = hidden if linear.side is Side.INPUT else x
            written = rows if linear.side is Side.INPUT else rows @ pair[1]
            of_factor = (written.T @ read.flatten(0, -2)).mul_(linear.scale)
        return of_x, of_factor, of_bias, None
