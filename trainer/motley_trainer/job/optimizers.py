"""What steps are taken by: AdamW, its moments in float32 whatever the parameters are in, or in 8 bits.

Parameters of fewer bits than float32 move on average as those would. Runs on the thread that owns the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from motley_bases.quantization import require_quantizer
from torch import nn

from motley_trainer.errors import SettingsError
from motley_trainer.job.rounding import generator_for, put_by_chance
from motley_trainer.spec.settings import OptimizerSettings

SMALLEST_IN_8_BITS = 4096  # numbers; smaller parameters have their moments in float32
EPSILON = 1e-8


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return an optimizer over parameters, which keep their order.

    Raises: SettingsError with reason NO_8BIT_OPTIMIZER where the installed bitsandbytes has none for their device;
    UnsupportedBaseError with reason NO_QUANTIZER where there is no bitsandbytes.
    """
    parameters = list(parameters)
    betas = (settings.beta1, settings.beta2)
    if settings.has_8bit_moments:
        kind, more = _kind_in_8_bits(parameters), {"min_8bit_size": SMALLEST_IN_8_BITS}
    elif _are_wide(parameters):
        kind, more = torch.optim.AdamW, {}
    else:
        kind, more = WideAdamW, {}
    made: torch.optim.Optimizer = kind(
        parameters, lr=settings.learning_rate, betas=betas, weight_decay=settings.weight_decay, **more
    )
    return made


class WideAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments and sums for parameters of fewer bits.

    Semantics: torch's own has moments in the parameters' type, and in bfloat16 a second moment stands still: what a
    step adds to it is less than half of its last bit. For the same reason a parameter is not rounded to the nearest
    number in its type, where it would stand still as well, but up or down by chance.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here has one to call
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._move(parameter, place, **{name: group[name] for name in ("lr", "betas", "weight_decay")})

    def _move(
        self, parameter: nn.Parameter, place: int, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        assert parameter.grad is not None  # whoever calls has looked
        gradient = parameter.grad.float()
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        first, second = (1 - beta ** state["step"] for beta in betas)
        spread = square.sqrt().div_(math.sqrt(second)).add_(EPSILON)
        wide = parameter.float().mul_(1 - lr * weight_decay).addcdiv_(mean, spread, value=-lr / first)
        put_by_chance(parameter, wide, generator_for(parameter, state["step"], place))


def _are_wide(parameters: Iterable[nn.Parameter]) -> bool:
    return all(parameter.dtype == torch.float32 for parameter in parameters)


def _kind_in_8_bits(parameters: Sequence[nn.Parameter]) -> Any:
    """Return bitsandbytes' AdamW once a parameter of its own has been moved: older releases cannot on CPUs."""
    require_quantizer()
    from bitsandbytes.optim.adamw import AdamW8bit

    from motley_trainer.job.adamw_8bit import WideAdamW8bit

    kind: Any = AdamW8bit if _are_wide(parameters) else WideAdamW8bit
    device = parameters[0].device
    tried = nn.Parameter(torch.zeros(SMALLEST_IN_8_BITS, device=device))
    tried.grad = torch.ones_like(tried)
    try:
        kind([tried], lr=1.0).step()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        message = f"the installed bitsandbytes has no 8-bit AdamW for the device {device.type}: {error}"
        raise SettingsError(message, reason="NO_8BIT_OPTIMIZER", field="loqt.optimizer") from error
    return kind
