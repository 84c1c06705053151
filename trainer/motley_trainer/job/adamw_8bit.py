"""bitsandbytes' AdamW with moments in 8 bits, whose steps are taken in float32 for parameters of fewer bits.

Imports bitsandbytes, and so is imported only where it is asked for. Runs on the thread that owns the model.
"""

from __future__ import annotations

from typing import Any, cast

from bitsandbytes.optim.adamw import AdamW8bit
from torch import nn

from motley_trainer.job.rounding import generator_for, put_by_chance


class WideAdamW8bit(AdamW8bit):
    """AdamW8bit that gives a bfloat16 parameter the move that a float32 one would have, by chance."""

    def update_step(self, group: Any, p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Move one parameter; called once by `step` for each that has a gradient."""
        wide = nn.Parameter(p.float())
        assert p.grad is not None  # `step` has looked
        wide.grad = p.grad.float()
        state = self.state[wide] = self.state[p]
        try:
            cast(Any, super()).update_step(group, wide, gindex, pindex)
        finally:
            del self.state[wide]
        put_by_chance(p, wide.detach(), generator_for(p, state["step"], pindex))
