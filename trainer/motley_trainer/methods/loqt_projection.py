"""Which side of a Linear is projected, and onto which directions of its gradient.

Pure.
Source: LoQT, arXiv:2405.16528, section 3.1; GaLore, arXiv:2403.03507.
"""

from __future__ import annotations

from enum import StrEnum
from typing import cast

import torch
from torch import Tensor

from motley_trainer.spec.settings import LoqtDecomposition

_SMALL, _LARGE = 1e-12, 1e12


class Side(StrEnum):
    """The side of a Linear that the frozen factor lies on."""

    INPUT = "input"
    OUTPUT = "output"


def side_of(in_features: int, out_features: int) -> Side:
    """Return the smaller side, so that the trained factor has the larger; of two equal ones the inputs'."""
    return Side.INPUT if in_features <= out_features else Side.OUTPUT


def directions(gradient: Tensor, rank: int, side: Side, decomposition: LoqtDecomposition) -> Tensor:
    """Return the directions of a side in which a gradient is largest, the largest first.

    Shapes: gradient [O, I] float32; returns orthonormal rows [R, I] for INPUT, columns [O, R] for OUTPUT.
    """
    tall = gradient if side is Side.INPUT else gradient.T  # what is looked for are its rows' directions
    if decomposition is LoqtDecomposition.SVD:
        # The triangle has the directions too, and less of it to decompose, and to have in memory beside the gradient.
        triangle = cast("tuple[Tensor, Tensor]", torch.linalg.qr(tall, mode="r"))[1]
        rows = cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(triangle))[2][:rank]
    else:
        largest = float(gradient.abs().max())
        if 0 < largest < _SMALL or largest > _LARGE:  # whose squares float32 does not have
            tall = tall / largest
        _, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(tall.T @ tall))
        rows = vectors[:, -rank:].flip(1).T  # values ascend, and the columns are the vectors
    # Row by row, as a checkpoint has it: in another layout products have other bits.
    return (rows if side is Side.INPUT else rows.T).clone(memory_format=torch.contiguous_format)
