"""What of a training a checkpoint holds: a method's parameters and buffers, and the optimizer's state, by name.

The state is whatever the optimizer has: a parameter that it has not moved yet has none. Knows nothing of files. Runs on
the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from motley_trainer.job.checkpoint import Checkpoint
from motley_trainer.methods.method import Trained

_BUFFER, _PARAMETER = "buffer", "parameter"


def captured(attached: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all that the next step depends on, by name."""
    tensors = {f"{_BUFFER}.{name}": buffer for name, buffer in attached.buffers().items()}
    shared: set[int] = set()
    for name, parameter in attached.parameters.items():
        tensors[f"{_PARAMETER}.{name}"] = parameter
        for part, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            # A table that all parameters share is kept with each: a file has no place for what is shared.
            tensors[f"{part}.{name}"] = tensor.clone() if id(tensor) in shared else tensor
            shared.add(id(tensor))
    return tensors


@torch.no_grad()
def restore(attached: Trained, tensors: Mapping[str, Tensor]) -> None:
    """Give a method's parameters the values that a checkpoint has."""
    for name, parameter in attached.parameters.items():
        parameter.copy_(tensors[f"{_PARAMETER}.{name}"])


def buffers_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the method's buffers in a checkpoint."""
    own, found = f"{_BUFFER}.", checkpoint.tensors.items()
    return {name.removeprefix(own): tensor for name, tensor in found if name.startswith(own)}


def restore_moments(attached: Trained, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that a checkpoint has, in the types that it had."""
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part in (_BUFFER, _PARAMETER):
            continue
        parameter = attached.parameters[name]
        if tensor.dim() > 0:
            value: Tensor | int = tensor.to(parameter.device, copy=True)
        else:  # how often it was moved: a number for some, a tensor beside no device's for others
            value = tensor.clone() if tensor.is_floating_point() else int(tensor)
        optimizer.state[parameter][part] = value
