"""The weight that a Linear's products have: of a quantized one, what its codes stand for.

Runs on the thread that owns the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

UNIT_ROWS = 256  # unit vectors that go through a Linear at once, to learn its weight


def weight_columns(linear: nn.Linear) -> Iterator[Tensor]:
    """Yield a Linear's weight by its columns, some at once.

    Shapes: each [C, O] float32, I columns in all.
    Semantics: exact: a quantized weight is asked for by unit vectors, whose products are rounded to nothing else.
    """
    size, weight = linear.in_features, linear.weight
    if weight.is_floating_point():
        for first in range(0, size, UNIT_ROWS):
            yield weight.detach()[:, first : first + UNIT_ROWS].T.float().contiguous()
        return
    dtype = getattr(linear, "compute_dtype", None)
    bare = copy.copy(linear)  # without the bias, which would be added before the product is rounded
    bare._parameters = {**linear._parameters, "bias": None}
    for first in range(0, size, UNIT_ROWS):
        units = torch.zeros(min(UNIT_ROWS, size - first), size, dtype=dtype, device=weight.device)
        units[torch.arange(len(units)), first + torch.arange(len(units))] = 1
        with torch.no_grad():
            columns: Tensor = bare(units)
        yield columns.float()


def product_weight(linear: nn.Linear) -> Tensor:
    """Return a Linear's weight. Shapes: [O, I] float32."""
    return torch.cat(list(weight_columns(linear))).T
