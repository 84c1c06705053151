"""Perplexity of a model on windows of tokens.

Runs on the calling thread; changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from motley_trainer.pruning.gradients import window_losses


def perplexity(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 16) -> float:
    """Return exp of the mean next-token cross-entropy; the windows do not see one another.

    Shapes: windows [N, T] token ids. Comparable between runs of the same window length alone.
    """
    return math.exp(min(mean_loss(model, windows, batch_size=batch_size), 700.0))  # beyond, a float has no number


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 16) -> float:
    """Return the mean next-token cross-entropy over windows. Shapes: windows [N, T] token ids."""
    losses = [window_losses(model, batch) for batch in windows.to(model.device).split(batch_size)]
    return float(torch.cat(losses).double().mean())
