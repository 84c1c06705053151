"""Batches of samples, and the loss over them.

A batch is padded on the right. Attention is causal, so a token never sees the padding, and the model is not told of it.
Knows nothing of files, methods or steps. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

NOT_LEARNED = -100


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Samples side by side.

    Shapes: all [N, T] int64.
    Semantics: `attention_mask` is 1 where there is a token and 0 where there is padding; `labels` has the token itself
    where it is to be learned, and NOT_LEARNED elsewhere. A row's first token has nothing before it to be predicted
    from, and so is never learned, whatever its label.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def num_learned(self) -> int:
        """Return how many tokens are learned."""
        return int((self.labels[:, 1:] != NOT_LEARNED).sum())

    @property
    def predicting(self) -> Tensor:
        """Return the positions after which a token is learned in some row, ascending: those that have logits."""
        return (self.labels[:, 1:] != NOT_LEARNED).any(0).nonzero()[:, 0]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens there are, padding not counted."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def collate(samples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Make a batch of (tokens, labels), as long as its longest sample."""
    longest = max(len(tokens) for tokens, _ in samples)
    input_ids = torch.zeros(len(samples), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, NOT_LEARNED)
    for row, (tokens, learned) in enumerate(samples):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        attention_mask[row, : len(tokens)] = 1
        labels[row, : len(learned)] = torch.tensor(learned)
    return Batch(input_ids, attention_mask, labels)


def summed_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the cross-entropy of the learned tokens, summed, float32.

    Semantics: logits are computed at those positions alone that are learned in some row, since with a large vocabulary
    they are the largest tensor of a step.
    """
    targets = batch.labels[:, 1:]
    wanted = batch.predicting
    logits = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=wanted).logits
    return cross_entropy(
        logits.float().flatten(0, 1), targets[:, wanted].flatten(), ignore_index=NOT_LEARNED, reduction="sum"
    )
