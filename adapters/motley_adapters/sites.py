"""What a residency needs of its surroundings: where parts are bound to a model, and who hears what became of them.

Protocols alone; what implements them lives with the model and with the metrics. Called on the residency's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from motley_kernels.adapter_delta import DeltaUnit

from motley_adapters.loading import Arrival


class Sites(Protocol):
    """What parts are bound to (see `motley_bases.linear.DeltaSites`)."""

    def bind(self, slot: int, units: Mapping[str, DeltaUnit], arrivals: Mapping[str, Arrival]) -> None:
        """Attach units by module path under a slot: all of them, or none."""

    def unbind(self, slot: int) -> None:
        """Detach a slot's units everywhere."""


class ResidencyObserver(Protocol):
    """Receive what happened, on the engine thread."""

    def part_loaded(self, seconds: float) -> None:
        """Take note of a part that became resident, and how long its load took."""

    def part_evicted(self) -> None:
        """Take note of a part that left the device."""

    def load_failed(self) -> None:
        """Take note of a load that came to nothing."""
