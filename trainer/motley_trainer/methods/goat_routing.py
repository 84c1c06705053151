"""Where tokens go: from a router's logits to shares, and from where they went to a loss that evens it out.

The same function as the server's kernels have, with gradients. Tensors alone; runs on the thread that owns the model.
Source: GOAT, arXiv:2502.16894; the balance loss in the form of its text, which is that of its code over top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from motley_trainer.data.batches import Batch


@dataclass(frozen=True, eq=False, slots=True)
class Routed:
    """Where the tokens of a forward pass went at one Linear.

    Shapes: logits [T, E]; chosen [T, K] int64, the largest first.
    """

    logits: Tensor
    chosen: Tensor


def choose_experts(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the experts that each token goes through, and their shares of it.

    Semantics: the softmax over all experts, of which the largest stay and are made to add up to 1: which is the softmax
    over the largest. Among equal logits the lower index comes first.
    Shapes: logits [T, E]; returns [T, top_k] int64 and [T, top_k], which has a gradient.
    """
    chosen = logits.detach().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return chosen, logits.gather(1, chosen).softmax(1)


def count_picks(chosen: Tensor, num_experts: int, is_token: Tensor) -> Tensor:
    """Return how many tokens went through each expert, padding not counted.

    Shapes: chosen [T, K], is_token [T] bool; returns [E] int64.
    """
    picked = torch.zeros(len(chosen), num_experts, dtype=torch.int64, device=chosen.device)
    return (picked.scatter(1, chosen, 1) * is_token[:, None]).sum(0)


def balance_loss(routed: Routed, picks: Tensor, is_token: Tensor) -> Tensor:
    """Return sum over experts of f P: 1 where tokens are spread evenly, and at most E / top_k.

    Semantics: f is an expert's share of the picks times E, P the mean over the tokens of its part in the softmax over
    all experts. Picks have no gradient, and padding takes no part.
    Shapes: picks [E] as counted of these tokens; is_token [T] bool.
    """
    num_experts = routed.logits.shape[1]
    often = picks * (num_experts / picks.sum())
    likely = (routed.logits.softmax(1) * is_token[:, None]).sum(0) / is_token.sum()
    return (often * likely).sum()


def tokens_of(batch: Batch, num_rows: int) -> Tensor:
    """Tell tokens from padding, row by row of what a Linear was given.

    Semantics: lm_head is given those positions alone from which something is predicted.
    Shapes: returns [num_rows] bool.
    """
    is_token = batch.attention_mask.bool()
    if num_rows != is_token.numel():
        is_token = is_token[:, batch.predicting]
    return is_token.flatten()
