"""Which adapters shall stay on the device, used or not, and how much of it they may take together.

What is kept is taken from everybody who takes turns, so it never takes more than a share of the arena. Bytes are often
unknown when an adapter is asked for: it is *admitted* once they are, or refused then. It knows neither where parts lie
nor who asked. Plain Python; the residency's thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from motley_adapters.demand import Demand
from motley_adapters.errors import AdapterError, CapacityError
from motley_adapters.part_sizes import PartSizes

KEPT_SHARE = 0.5  # of the arena, at most
PATIENCE = 64  # fetches that find no room before an admitted adapter goes before all who wait


class KeptAdapters:
    """Hold the demands of the adapters that are kept, and refuse those that would be too many."""

    def __init__(self, arena_bytes: int, sizes: PartSizes) -> None:
        self._arena_bytes = arena_bytes
        self._sizes = sizes
        self._admitted: dict[str, Demand] = {}
        self._unmeasured: dict[str, Demand] = {}
        self._num_waits: dict[str, int] = {}  # by adapter: fetches one after another that found no room
        self._refused: dict[str, AdapterError] = {}

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._admitted or adapter in self._unmeasured

    @property
    def admitted(self) -> tuple[tuple[str, Demand], ...]:
        """Return the adapters that may be loaded to stay, in the order in which that was found."""
        return tuple(self._admitted.items())

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Return the adapters whose bytes must be known before they may be loaded to stay."""
        return tuple(self._unmeasured)

    @property
    def parts(self) -> set[str]:
        """Return the parts that stay, or come to stay."""
        return _parts(self._admitted.values())

    @property
    def is_impatient(self) -> bool:
        """Tell whether an admitted adapter has found no room for so long that it goes before all who wait."""
        return any(count >= PATIENCE for count in self._num_waits.values())

    def get(self, adapter: str) -> Demand | None:
        """Return what must be resident for an admitted adapter; None for any other."""
        return self._admitted.get(adapter)

    def add(self, adapter: str, demand: Demand) -> None:
        """Keep an adapter from now on, or from when its bytes are known; twice is once.

        Raises: CapacityError with reason ADAPTER_TOO_LARGE if it does not even fit alone, PINS_FULL if all that is kept
        would take more than its share; with it nothing changes.
        """
        if adapter in self:
            return
        if not self._sizes.are_known(_parts([demand])):
            self._unmeasured[adapter] = demand
            return
        self._check(demand)
        self._admitted[adapter] = demand

    def remove(self, adapter: str) -> None:
        """Keep an adapter no longer; nothing if it was not kept."""
        self._admitted.pop(adapter, None)
        self._unmeasured.pop(adapter, None)
        self._num_waits.pop(adapter, None)

    def refuse(self, adapter: str, error: AdapterError) -> None:
        """Keep an adapter no longer, and remember why; nothing if it was not kept."""
        if adapter in self:
            self.remove(adapter)
            self._refused[adapter] = error

    def take_refused(self) -> dict[str, AdapterError]:
        """Return, by adapter, why it is not kept after all, since the last call.

        Semantics: CapacityError as from `add`, also with PINS_FULL if what is kept lies where it leaves no hole that is
        large enough; else why its load came to nothing.
        """
        refused, self._refused = self._refused, {}
        return refused

    def admit_measured(self) -> None:
        """Admit or refuse those whose bytes have become known, the first that was asked for first."""
        for adapter, demand in tuple(self._unmeasured.items()):
            del self._unmeasured[adapter]
            try:
                self.add(adapter, demand)
            except CapacityError as error:
                self._refused[adapter] = error

    def note_fetch(self, adapter: str, *, found_room: bool) -> None:
        """Take note of how a fetch of an admitted adapter went."""
        if found_room:
            self._num_waits.pop(adapter, None)
        else:
            self._num_waits[adapter] = self._num_waits.get(adapter, 0) + 1

    def _check(self, demand: Demand) -> None:
        alone = self._sizes.num_bytes(_parts([demand]))
        if alone > self._arena_bytes:
            message = f"it takes {alone} bytes on the device, and there are {self._arena_bytes}"
            raise CapacityError(message, reason="ADAPTER_TOO_LARGE")
        together = self._sizes.num_bytes(_parts([*self._admitted.values(), demand]))
        share = int(self._arena_bytes * KEPT_SHARE)
        if together > share:
            message = f"what is kept on the device would take {together} bytes, and may take {share}"
            raise CapacityError(message, reason="PINS_FULL")


def _parts(demands: Iterable[Demand]) -> set[str]:
    return {part for demand in demands for part, _ in demand.members}
