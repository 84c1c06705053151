"""A Linear of the original with the factors of its pruned copy: in their small shapes, on the channels that were kept.

It computes what the scattered factors would, without their zeros. Nothing is trained on it. Runs on the thread that
owns the model.
Source: LoRAM, arXiv:2502.13533, section 3.4.
"""

from __future__ import annotations

import torch
from motley_bases.pruned_geometry import KeptChannels
from torch import Tensor, nn

from motley_trainer.methods.lora_linear import LoraLinear


class RecoveredLinear(LoraLinear):
    """A Linear and its delta on kept channels: base(x), to whose kept outputs scaling * B (A x[kept inputs]) is added.

    Shapes: lora_a [R, kept inputs], lora_b [kept outputs, R], float32 on the base's device; both are zero at first.
    """

    inputs: Tensor | None
    outputs: Tensor | None

    def __init__(self, base: nn.Linear, kept: KeptChannels, *, rank: int, scaling: float) -> None:
        super().__init__(base, rank=rank, scaling=scaling, initial=torch.Generator())
        device = base.weight.device
        self.register_buffer("inputs", _index(kept.inputs, device), persistent=False)
        self.register_buffer("outputs", _index(kept.outputs, device), persistent=False)
        num_inputs = base.in_features if kept.inputs is None else len(kept.inputs)
        num_outputs = base.out_features if kept.outputs is None else len(kept.outputs)
        self.lora_a = nn.Parameter(torch.zeros(rank, num_inputs, device=device))
        self.lora_b = nn.Parameter(torch.zeros(num_outputs, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's outputs and the delta's. Shapes: x [..., I]; returns [..., O]."""
        y: Tensor = self.base(x)
        if not self.is_enabled:
            return y
        read = x if self.inputs is None else x.index_select(-1, self.inputs)
        delta = (read.to(self.lora_a.dtype) @ self.lora_a.T) @ self.lora_b.T * self.scaling
        if self.outputs is None:
            return (y + delta).to(y.dtype)
        return y.to(delta.dtype).index_add(-1, self.outputs, delta).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Write the delta into the base's weight, and return the base."""
        part = self.scaling * (self.lora_b @ self.lora_a)
        delta = torch.zeros(self.base.weight.shape, device=part.device)
        rows = torch.arange(delta.shape[0], device=part.device) if self.outputs is None else self.outputs
        columns = torch.arange(delta.shape[1], device=part.device) if self.inputs is None else self.inputs
        delta[rows[:, None], columns] = part
        self.base.weight += delta.to(self.base.weight.dtype)
        return self.base


def _index(kept: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
    return None if kept is None else torch.tensor(kept, device=device)
