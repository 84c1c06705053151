"""What of a training a checkpoint holds: a method's parameters and buffers, and the optimizer's moments, by name.

Knows nothing of files. Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from motley_trainer.job.checkpoint import Checkpoint
from motley_trainer.methods.method import Trained

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def captured(attached: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all that the next step depends on, by name."""
    tensors = {f"buffer.{name}": buffer for name, buffer in attached.buffers().items()}
    for name, parameter in attached.parameters.items():
        tensors[f"parameter.{name}"] = parameter
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


@torch.no_grad()
def restore(attached: Trained, tensors: Mapping[str, Tensor]) -> None:
    """Give a method's parameters the values that a checkpoint has."""
    for name, parameter in attached.parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])


def buffers_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the method's buffers in a checkpoint."""
    found = checkpoint.tensors.items()
    return {name.removeprefix("buffer."): tensor for name, tensor in found if name.startswith("buffer.")}


def restore_moments(attached: Trained, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the moments that a checkpoint has."""
    state = optimizer.state_dict()
    names = attached.parameters
    state["state"] = {
        place: {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS} for place, name in enumerate(names)
    }
    optimizer.load_state_dict(state)
