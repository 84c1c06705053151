"""What the numbers of a training spec may be, each by its path.

Pure; runs on the event loop's thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import Any, Final

from motley.v1 import training_pb2

from motley_server.errors import InvalidArgumentError

MAX_RANK: Final = 4096
MAX_STEPS: Final = 10**7
MAX_BATCH: Final = 1 << 16
MAX_SAMPLES: Final = 1 << 20  # to score channels or weights on
MAX_COMPENSATION: Final = 100  # rounds
MAX_GROWTH: Final = 1e6


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a number may be: in [least, most] and in (above, below). NaN is nowhere."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allow(self, value: float) -> bool:
        """Tell whether a number is within."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        kept = [f"{word} {bound:.17g}" for word, bound in bounds if math.isfinite(bound)]
        return f"a number {' and '.join(kept)}"


RANK: Final = Bounds(1, MAX_RANK)
POSITIVE: Final = Bounds(above=0, most=1e30)
SCALE: Final = Bounds(1e-25, 1e30)  # of GOAT: whatever the rank, an adapter's file may have what it makes

_SHARE: Final = Bounds(0, 1)
_COUNT: Final = Bounds(1, MAX_STEPS)
_SAMPLES: Final = Bounds(1, MAX_SAMPLES)
_NOT_NEGATIVE: Final = Bounds(0, 1e30)
_BELOW_ONE: Final = Bounds(0, below=1)
_LORA: Final = {"rank": RANK, "alpha": POSITIVE, "dropout": _BELOW_ONE}
_LOQT: Final = {
    "rank": RANK,
    "scale": POSITIVE,
    "compensation_steps": Bounds(0, MAX_COMPENSATION),
    "merge_interval": Bounds(2, MAX_STEPS),  # what begins anew at every step never learns
    "growth": Bounds(0, MAX_GROWTH),
}

# Of fields that were set; what was not has a default that is within.
BOUNDS: Final[Mapping[str, Bounds]] = MappingProxyType({
    "steps": _COUNT,
    "epochs": Bounds(above=0, most=1e6),
    "batch_size": Bounds(1, MAX_BATCH),
    "micro_batch_size": Bounds(1, MAX_BATCH),
    "checkpoint_steps": _COUNT,
    **{f"lora.{name}": bounds for name, bounds in _LORA.items()},
    **{f"s2ft.{name}": _SHARE for name in ("o_share", "down_share", "v_share", "up_share")},
    "s2ft.calibration_samples": _SAMPLES,
    "goat.rank": RANK,
    "goat.experts": RANK,
    "goat.top_k": RANK,
    "goat.rho": SCALE,
    "goat.eta": SCALE,
    "goat.alpha": SCALE,
    "goat.balance_loss": _NOT_NEGATIVE,
    "goat.dropout": _BELOW_ONE,
    **{f"loram.lora.{name}": bounds for name, bounds in _LORA.items()},
    "loram.calibration_samples": _SAMPLES,
    "loram.alignment.steps": _COUNT,
    "loram.alignment.learning_rate": POSITIVE,
    "loram.alignment.batch_size": Bounds(1, MAX_BATCH),
    **{f"{place}.{name}": bounds for place in ("loqt", "loram.alignment.loqt") for name, bounds in _LOQT.items()},
    "optimizer.learning_rate": POSITIVE,
    "optimizer.warmup_steps": Bounds(0, MAX_STEPS),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.beta1": _BELOW_ONE,
    "optimizer.beta2": _BELOW_ONE,
    "optimizer.max_gradient_norm": _NOT_NEGATIVE,
    "gate.max_loss_ratio": POSITIVE,
    "gate.min_exact_match": _SHARE,
})  # fmt: skip


def check_bounds(spec: training_pb2.TrainingSpec) -> None:
    """Refuse a number that is out of its bounds.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE) with the field below `spec`.
    """
    for path, bounds in BOUNDS.items():
        *holders, name = path.split(".")
        holder: Any = reduce(getattr, holders, spec)
        if holder.HasField(name) and not bounds.allow(value := getattr(holder, name)):
            raise wrong("OUT_OF_RANGE", path, f"{value:g} is not {bounds}")


def wrong(reason: str, field: str, message: str) -> InvalidArgumentError:
    """Make the refusal of a field of a spec, by its path below `spec`."""
    return InvalidArgumentError(message, reason=reason, field=f"spec.{field}")
