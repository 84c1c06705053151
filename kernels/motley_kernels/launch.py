"""A kernel launch as a value, so that a test can compile every one of them where there is no GPU.

It knows nothing of what a kernel does and needs no triton: kernels are whatever their modules hand in. The engine
thread runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Launch:
    """One kernel launch: what is passed at run time, and what the kernel is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float]
    constants: Mapping[str, Any]
    num_stages: int
    num_warps: int = 4

    @property
    def options(self) -> dict[str, int | bool]:
        """Return how it is compiled; fusion of products and sums is said, as triton's default is about to change."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
