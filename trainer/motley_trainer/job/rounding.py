"""Rounding up or down by chance, so that of many small moves, each less than a last bit, none is lost on average.

Runs on the thread that owns the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motley_trainer.spec.settings import derived_seed

_DROPPED = 1 << 16  # of a float32, of which bfloat16 is the upper half


def put_by_chance(parameter: nn.Parameter, values: Tensor, generator: torch.Generator) -> None:
    """Give a parameter new values, in bfloat16 each one of the two beside it, the likelier the nearer it is.

    Semantics: a parameter of another type gets them as they are, or the nearest. What is no number stays none.
    Shapes: values as the parameter, float32; the generator is of its device.
    """
    if parameter.dtype is torch.bfloat16:
        bits = values.contiguous().view(torch.int32)
        chance = torch.randint(_DROPPED, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
        raised = chance.add_(bits).bitwise_and_(-_DROPPED).view(torch.float32)
        values = torch.where(values.isnan(), values, raised)  # whose bits may be all ones, and would go over
    with torch.no_grad():
        parameter.copy_(values)


def generator_for(parameter: nn.Parameter, step: int, place: int) -> torch.Generator:
    """Return the generator for one step of one parameter, so that whoever goes on there needs no state of it."""
    return torch.Generator(parameter.device).manual_seed(derived_seed(step, "rounding", place))
