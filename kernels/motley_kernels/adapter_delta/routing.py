"""Routing of tokens to experts: from logits to shares, the lower index first among equals.

It knows nothing of where logits come from and what shares multiply; the engine thread runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def share_out(logits: Tensor, beyond: Tensor, shares: Tensor) -> None:
    """Fill each row's shares: the softmax of its largest logits, and 0 for all others.

    Semantics: a stable sort breaks ties, as the library's own selection of the largest leaves them open.
    Shapes: logits, shares [G, E] float32; beyond [G, E] or [E] bool, True from the number of chosen experts on.
    Effects: writes `shares`.
    """
    ordered, experts = logits.sort(dim=1, descending=True, stable=True)
    chosen = ordered.masked_fill_(beyond, -torch.inf).softmax(1)
    shares.scatter_(1, experts, chosen)
