"""What of the adapters is on the device: parts in an arena, pinned by those that run, evicted by what is needed next.

A part (an adapter's own units, or units that several adapters share) is absent, on its way, or resident under a slot.
Capacity never fails anybody who only has to wait: a demand is granted or asked again later. Places in the waiting line
order the demands: one may evict what only later ones need, never what earlier ones do, so the first of the line always
gets on. It knows no requests and no names. The engine thread alone, but for `is_resident` and the counts of a scrape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from motley_kernels.adapter_delta.pool import UnitPool

from motley_adapters.cache import AdapterCache
from motley_adapters.demand import Demand, demand_of
from motley_adapters.errors import AdapterError, AdapterLoadError, CapacityError, LeaseError
from motley_adapters.eviction import EvictionOrder
from motley_adapters.extents import Extent, ExtentAllocator
from motley_adapters.kept import KeptAdapters
from motley_adapters.loading import Loaded, LoadFailed, LoadJob, Measured, MeasureJob, PartLoader, extent_sizes
from motley_adapters.part_sizes import PartSizes
from motley_adapters.sites import ResidencyObserver, Sites

log = logging.getLogger(__name__)

MAX_LOADS = 8  # on their way at once: what becomes urgent waits behind these at most
POISON = 0xFF  # every byte of it makes a NaN of any float: whoever reads what has left says so


@dataclass(slots=True)
class _PlacedPart:
    extents: list[Extent]
    slot: int | None = None  # None while it is on its way
    num_pins: int = 0

    @property
    def nbytes(self) -> int:
        return sum(extent.size for extent in self.extents)


class Pins:
    """Promise that the parts of one demand stay resident, until `release`; made by `Residency.pin` alone."""

    def __init__(self, residency: Residency, parts: tuple[str, ...], members: tuple[tuple[int, float], ...]) -> None:
        self.parts = parts
        self.members = members  # (slot, weight) in the order of summation
        self._residency = residency

    def release(self) -> None:
        """Give the parts back.

        Raises: LeaseError with reason LEASE_RELEASED if they were given back before, and then changes nothing.
        """
        self._residency._release(self)


class Residency:
    """Keep parts of adapters in an arena, and bound to the sites of a model."""

    def __init__(
        self,
        sites: Sites,
        pool: UnitPool,
        cache: AdapterCache,
        observer: ResidencyObserver,
        wake: Callable[[], None],
        *,
        poison: bool = False,
    ) -> None:
        """Make an empty arena of a pool.

        Semantics: `wake` is called on the loader's thread whenever `poll` would find something; with `poison`, bytes
        that are given up become NaN, so that whoever still read them would show it.
        """
        self.arena = ExtentAllocator(pool.num_bytes)
        self.sizes = PartSizes()
        self.kept = KeptAdapters(self.arena.num_bytes, self.sizes)
        self.num_resident_parts = 0
        self.num_binds = 0  # ever; only with it what was not ready becomes so
        self._sites = sites
        self._pool = pool
        self._cache = cache
        self._observer = observer
        self._poison = poison
        self._loader = PartLoader(pool, cache, wake)
        self._order = EvictionOrder()
        self._parts: dict[str, _PlacedPart] = {}
        self._measuring: set[str] = set()
        self._places: dict[str, int] = {}
        self._pins: set[Pins] = set()
        self._forgotten: set[str] = set()  # adapters, while they are measured
        for adapter in cache.in_memory():
            sizes = {part.digest: extent_sizes(pool, part) for part in adapter.parts}
            self.sizes.learn(adapter.spec.digest, sizes)

    @property
    def num_loads(self) -> int:
        """Return how many jobs are under way."""
        return len(self._measuring) + len(self._parts) - self.num_resident_parts

    @property
    def num_pins(self) -> int:
        """Return how many pins were not released yet."""
        return len(self._pins)

    def check(self, demand: Demand) -> None:
        """Refuse a demand that could never be granted, as far as sizes are known.

        Raises: CapacityError with reason ADAPTER_TOO_LARGE.
        """
        parts = {part for part, _ in demand.members}
        wanted, taken = (self.sizes.num_bytes(group) for group in (parts, self.kept.parts - parts))
        if wanted > self.arena.num_bytes - taken:
            message = f"it takes {wanted} bytes on the device, and there are {self.arena.num_bytes - taken}"
            raise CapacityError(message, reason="ADAPTER_TOO_LARGE", field="adapters")

    def look_ahead(self, demands: Iterable[Demand]) -> None:
        """Say what is waited for, in the order of the line: place 0 first; replaces what was said before."""
        self._places = {}
        for place, demand in enumerate(demands):
            for part, _ in demand.members:
                self._places.setdefault(part, place)

    def is_ready(self, demand: Demand) -> bool:
        """Tell whether all that a demand needs could be pinned now."""
        return all(self.is_resident(part) for part, _ in demand.members)

    def pin(self, demand: Demand) -> Pins:
        """Pin what a demand needs; all of it must be resident (see `is_ready`)."""
        members = []
        for digest, weight in demand.members:
            part = self._parts[digest]
            assert part.slot is not None
            part.num_pins += 1
            self._order.use(digest, part.nbytes)
            members.append((part.slot, weight))
        pins = Pins(self, tuple(digest for digest, _ in demand.members), tuple(members))
        self._pins.add(pins)
        return pins

    def prefetch(self, demand: Demand, place: int) -> bool:
        """Set about loading what a demand needs and is not placed yet; False if some of it finds no room.

        Semantics: `place` is the demand's in the line that `look_ahead` was told. What only has to wait for the loader
        finds room, as far as is known. Nobody does while something that shall be kept has found none for too long.
        Raises: CapacityError with reason ADAPTER_TOO_LARGE if it could never be granted.
        """
        if self._is_placed(demand):
            return True
        self.check(demand)
        if self.kept.is_impatient:
            return False
        return self._set_about_all(demand, place) or (place == 0 and self._start_over(demand))

    def poll(self) -> dict[str, AdapterError]:
        """Bind what was loaded, and return, by adapter, why a load came to nothing."""
        failures: dict[str, AdapterError] = {}
        for result in self._loader.finished():
            match result:
                case Measured(job, sizes):
                    self._learn(job.adapter, sizes)
                case Loaded():
                    if (error := self._bind(result)) is not None:
                        failures[result.job.adapter] = error
                case LoadFailed(MeasureJob(adapter), error):
                    self._measuring.discard(adapter)
                    self._forgotten.discard(adapter)
                    failures[adapter] = error
                case LoadFailed(LoadJob(adapter, part), error):
                    self._give_up(part)
                    failures[adapter] = error
        for adapter, error in failures.items():
            self._observer.load_failed()
            log.warning("adapter %s was not loaded: %s: %s", adapter, error.reason, error.message)
            self.kept.refuse(adapter, error)
        return failures

    def keep(self, adapter: str) -> None:
        """Hold an adapter on the device from the next `fetch_kept` on, whether or not anybody uses it; twice is once.

        Semantics: what is found out later, that it cannot be kept or was not loaded, `kept.take_refused` tells.
        `kept.remove` lets it go as any other.
        Raises: UnknownAdapterError; CapacityError as `KeptAdapters.add`.
        """
        self.kept.add(adapter, demand_of([(self._cache.spec(adapter), 1.0)]))

    def fetch_kept(self) -> None:
        """Set about loading what is kept and not there yet.

        Semantics: what the first of the line needs does not give way to it, and what came for others they have pinned,
        if those of the line were let in before. What found no room for too long goes before them all.
        """
        place = -1 if self.kept.is_impatient else 0
        for adapter, demand in self.kept.admitted:
            found_room = self._is_placed(demand) or self._set_about_all(demand, place)
            self.kept.note_fetch(adapter, found_room=found_room)
            if not found_room and not self._fits_beside_kept(demand):
                message = "no room on the device is large enough between the adapters that are kept there"
                self.kept.refuse(adapter, CapacityError(message, reason="PINS_FULL"))
        for adapter in self.kept.unmeasured:
            self._measure(adapter)

    def forget(self, adapter: str) -> None:
        """Let go of what is remembered of an adapter that nobody asks for; nothing if it is kept.

        Semantics: what is placed stays, and is forgotten when it leaves. Whoever asks again has it measured again.
        """
        if adapter in self.kept:
            return
        if adapter in self._measuring:
            self._forgotten.add(adapter)
        self.sizes.forget(adapter, self._parts)

    def is_resident(self, part: str) -> bool:
        """Tell whether a part could be pinned now; any thread may ask."""
        placed = self._parts.get(part)
        return placed is not None and placed.slot is not None

    def close(self) -> None:
        """End the loader's thread once it has done what it is at."""
        self._loader.close()

    def check_integrity(self) -> None:
        """Recount extents, pins and slots.

        Raises: RuntimeError if they disagree: a fault of this code.
        """
        self.arena.check_integrity(extent for part in self._parts.values() for extent in part.extents)
        pinned = [digest for pins in self._pins for digest in pins.parts]
        for digest, part in self._parts.items():
            if part.num_pins != pinned.count(digest) or (part.num_pins and part.slot is None):
                raise RuntimeError(f"{digest} has {part.num_pins} pins, {pinned.count(digest)} are held")
        if self.num_resident_parts != sum(part.slot is not None for part in self._parts.values()):
            raise RuntimeError(f"{self.num_resident_parts} parts are said to be resident")

    def _is_placed(self, demand: Demand) -> bool:
        return all(part in self._parts for part, _ in demand.members)

    def _set_about_all(self, demand: Demand, place: int) -> bool:
        absent = [part for part, _ in demand.members if part not in self._parts]
        outcomes = [self._set_about(part, demand.providers[part], place) for part in absent]
        return all(outcomes)

    def _set_about(self, digest: str, provider: str, place: int) -> bool:
        """Start loading a part, or finding out its size; False if there is no room that this place may take."""
        sizes = self.sizes.get(digest)
        if provider in self._measuring or self.num_loads >= MAX_LOADS:
            return True
        if sizes is None:
            self._measure(provider)
            return True
        extents = self._allocate(sizes, place)
        if extents is None:
            return False
        self._parts[digest] = _PlacedPart(extents)
        self._loader.submit(LoadJob(provider, digest, tuple(extents), self._now()))
        return True

    def _measure(self, adapter: str) -> None:
        if adapter not in self._measuring and self.num_loads < MAX_LOADS:
            self._measuring.add(adapter)
            self._loader.submit(MeasureJob(adapter))

    def _learn(self, adapter: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
        self._measuring.discard(adapter)
        is_wanted = adapter not in self._forgotten or adapter in self.kept
        self._forgotten.discard(adapter)
        if is_wanted:
            self.sizes.learn(adapter, sizes)
            self.kept.admit_measured()

    def _allocate(self, sizes: Sequence[int], place: int) -> list[Extent] | None:
        extents = self.arena.allocate(sizes)
        if extents is None:
            for victim in self._victims(sizes, place):
                self._evict(victim)
            extents = self.arena.allocate(sizes)
        return extents

    def _victims(self, sizes: Sequence[int], place: int) -> list[str]:
        """Choose who leaves so that extents of these sizes fit; nobody if they would not, whoever left."""
        evictable = [digest for digest in self._evictable() if self._places.get(digest, place + 1) > place]
        room = self.arena.num_bytes - self.arena.num_used_bytes
        if sum(sizes) > room + sum(self._parts[digest].nbytes for digest in evictable):
            return []
        without_all, without_victims = self.arena.copy(), self.arena.copy()
        without_all.free(extent for digest in evictable for extent in self._parts[digest].extents)
        if without_all.allocate(sizes) is None:
            return []
        victims: list[str] = []
        while without_victims.allocate(sizes) is None:
            victims.append(self._next_victim(evictable))
            evictable.remove(victims[-1])
            without_victims.free(self._parts[victims[-1]].extents)
        return victims

    def _evictable(self) -> list[str]:
        kept = self.kept.parts
        return [
            digest
            for digest, part in self._parts.items()
            if part.slot is not None and not part.num_pins and digest not in kept
        ]

    def _fits_beside_kept(self, demand: Demand) -> bool:
        kept, arena = self.kept.parts, self.arena.copy()
        arena.free(extent for digest, part in self._parts.items() if digest not in kept for extent in part.extents)
        absent = (part for part, _ in demand.members if part not in self._parts)
        return all(arena.allocate(self.sizes.get(part) or ()) is not None for part in absent)

    def _next_victim(self, evictable: Sequence[str]) -> str:
        """Choose what nobody waits for, the cheapest first; then what is waited for longest ahead."""
        idle = self._order.cheapest(digest for digest in evictable if digest not in self._places)
        return idle if idle is not None else max(evictable, key=self._places.__getitem__)

    def _start_over(self, demand: Demand) -> bool:
        """Empty the arena for the first of the line once nobody uses any of it; False while somebody does.

        Semantics: what is left then is holes, perhaps between its own parts. Pins of no part are in nobody's way.
        Raises: CapacityError with reason ADAPTER_TOO_LARGE if what is kept leaves no room even so.
        """
        if self.num_loads or any(part.num_pins for part in self._parts.values()):
            return False
        for digest in self._evictable():
            self._evict(digest)
        if not self._set_about_all(demand, place=0):
            message = "no room on the device is large enough beside the adapters that are kept there"
            raise CapacityError(message, reason="ADAPTER_TOO_LARGE", field="adapters")
        return True

    def _bind(self, result: Loaded) -> AdapterError | None:
        digest = result.job.part
        slot = self.num_binds  # never used twice
        self.num_binds += 1
        try:
            self._sites.bind(slot, result.units, result.arrivals)
        except ValueError as error:
            self._give_up(digest)
            return AdapterLoadError(f"it does not fit the base: {error}", reason="ADAPTER_UNREADABLE")
        part = self._parts[digest]
        part.slot = slot
        self.num_resident_parts += 1
        self._order.use(digest, part.nbytes)
        self._observer.part_loaded(result.seconds)
        return None

    def _evict(self, digest: str) -> None:
        part = self._parts[digest]
        assert part.slot is not None
        self._sites.unbind(part.slot)
        self._order.give_up(digest)
        self.num_resident_parts -= 1
        self._give_up(digest)
        self._observer.part_evicted()

    def _give_up(self, digest: str) -> None:
        part = self._parts.pop(digest)
        if self._poison:
            for start, size in part.extents:
                self._pool.buffer[start : start + size].fill_(POISON)
        self.arena.free(part.extents)
        self.sizes.leave(digest)

    def _now(self) -> torch.cuda.Event | None:
        """Return an event after all device work so far: what lay in an extent may be read until then."""
        if self._pool.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._pool.device))
        return event

    def _release(self, pins: Pins) -> None:
        if pins not in self._pins:
            raise LeaseError(f"the pins of {', '.join(pins.parts)} were released", reason="LEASE_RELEASED")
        self._pins.remove(pins)
        for digest in pins.parts:
            self._parts[digest].num_pins -= 1
