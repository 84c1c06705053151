"""What a new factor takes up of a weight that is quantized: rounds of both, the best of which counts.

Pure.
Source: LoQT, arXiv:2405.16528, algorithm 2, with the residual of the weight itself: that of the corrected weight, as
the text has it, would undo each second round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from motley_trainer.methods.held_weight import HeldWeight
from motley_trainer.methods.loqt_projection import Side


@dataclass(frozen=True, eq=False, slots=True)
class Compensated:
    """A weight as it is held, and the factor beside it.

    Semantics: `errors` are the Frobenius norms of what both together lack of the weight: first of the quantized weight
    alone, then of each round; what is kept has the least.
    """

    held: HeldWeight
    factor: Tensor
    errors: tuple[float, ...]


@torch.no_grad()
def compensated(
    weight: Tensor,
    frozen: Tensor,
    side: Side,
    *,
    scale: float,
    steps: int,
    hold: Callable[[Tensor], HeldWeight],
    dtype: torch.dtype,
) -> Compensated:
    """Hold a weight, and choose the factor that makes up best for what that loses.

    Shapes: weight [O, I], frozen [R, I] for INPUT or [O, R] for OUTPUT, as it is after it was quantized itself; both
    float32. The factor has `dtype`, [O, R] or [R, I].
    Semantics: without steps the factor is zero.
    """
    rank = frozen.shape[0 if side is Side.INPUT else 1]
    shape = (weight.shape[0], rank) if side is Side.INPUT else (rank, weight.shape[1])
    held, kept = hold(weight), weight.new_zeros(shape, dtype=dtype)
    kept_held = held
    errors = [float((weight - held.expanded(weight.dtype)).norm())]
    if steps:
        inverse = torch.linalg.pinv(frozen) / scale  # quantized, the frozen factor's transpose is none
    for step in range(steps):
        residual = weight - held.expanded(weight.dtype)
        factor = (residual @ inverse if side is Side.INPUT else inverse @ residual).to(dtype)
        taken_up = product_of(factor, frozen, side).mul_(scale)
        errors.append(float(residual.sub_(taken_up).norm()))
        del residual  # a weight's memory, before the next is taken
        if errors[-1] < min(errors[:-1]):
            kept_held, kept = held, factor
        if step + 1 < steps:
            held = hold(taken_up.neg_().add_(weight))
        del taken_up
    return Compensated(kept_held, kept, tuple(errors))


def product_of(factor: Tensor, frozen: Tensor, side: Side) -> Tensor:
    """Return the product of both factors, in the dtype of the frozen one. Shapes: returns [O, I]."""
    wide = factor.to(frozen.dtype)
    return wide @ frozen if side is Side.INPUT else frozen @ wide
