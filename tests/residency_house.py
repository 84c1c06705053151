"""A residency and all around it: adapters of one number each, a source that can be slow, sites that take note."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from motley_adapters.cache import AdapterCache
from motley_adapters.demand import Demand, demand_of
from motley_adapters.errors import AdapterError, AdapterLoadError
from motley_adapters.loading import Arrival
from motley_adapters.residency import Pins, Residency
from motley_adapters.spec import Adapter, AdapterSpec, Part
from motley_kernels.adapter_delta import DeltaUnit
from motley_kernels.adapter_delta.pool import UnitPool

LETTERS = "abcdefghijklmnopw"
PATHS = ("model.layers.0.q_proj", "model.layers.0.o_proj", "model.layers.1.q_proj", "lm_head")
NUM_EXTENTS = 3  # two layers and lm_head


def make_adapter(
    digest: str, rank: int = 4, width: int = 64, shared: str | None = None, paths: tuple[str, ...] = PATHS
) -> Adapter:
    """Make an adapter whose numbers are those of its digest, with a residual of such numbers if it shares one."""
    units = {path: make_unit(digest, rank, width) for path in paths}
    parts = () if shared is None else (Part(shared, {path: make_unit(shared, 2, width) for path in PATHS}),)
    nbytes = sum(unit.nbytes for unit in units.values())
    spec = AdapterSpec(digest, "lora", {}, {}, "undeclared", nbytes, shared=tuple(part.digest for part in parts))
    return Adapter(spec, units, parts)


def make_unit(digest: str, rank: int, width: int) -> DeltaUnit:
    return DeltaUnit(torch.full((rank, width), number_of(digest)), torch.full((rank, width), number_of(digest)), 1.0)


def number_of(digest: str) -> float:
    return float(sum(digest.encode()))


LM_HEAD_BYTES = 2560  # of an extent with lm_head alone, rank 4: 2 factors of 1024 bytes, and what they are aligned by


class FakeSites:
    """Note what is bound under which slot."""

    def __init__(self) -> None:
        self.bound: dict[int, Mapping[str, DeltaUnit]] = {}
        self.num_binds = 0

    def bind(self, slot: int, units: Mapping[str, DeltaUnit], arrivals: Mapping[str, Arrival]) -> None:
        assert slot == self.num_binds, "slots are never used twice"
        if "misfit" in units:
            raise ValueError("no such site")
        self.num_binds += 1
        self.bound[slot] = units

    def unbind(self, slot: int) -> None:
        del self.bound[slot]


@dataclass
class Watcher:
    num_loads: int = 0
    num_evictions: int = 0
    num_failures: int = 0

    def part_loaded(self, seconds: float) -> None:
        assert seconds >= 0
        self.num_loads += 1

    def part_evicted(self) -> None:
        self.num_evictions += 1

    def load_failed(self) -> None:
        self.num_failures += 1


@dataclass
class Source:
    """Give what it has; hold back while `open` is not set."""

    adapters: dict[str, Adapter]
    open: threading.Event = field(default_factory=threading.Event)
    threads: set[tuple[str, int]] = field(default_factory=set)

    def load(self, digest: str) -> Adapter:
        self.threads.add((threading.current_thread().name, torch.get_num_threads()))
        assert self.open.wait(10)
        if digest not in self.adapters:
            raise AdapterLoadError("gone", reason="ADAPTER_UNREADABLE")
        return self.adapters[digest]


class House:
    """A residency with everything around it."""

    def __init__(self, *adapters: Adapter, room: float = 3.0, num_bytes: int = 0, host_bytes: int = 2**24) -> None:
        measure = UnitPool(0, device=torch.device("cpu"), dtype=torch.float32)
        self.part_bytes = sum(
            measure.extent_bytes([make_adapter("x").units[path] for path in paths])
            for paths in (PATHS[:2], PATHS[2:3], PATHS[3:])
        )
        self.pool = UnitPool(num_bytes or int(room * self.part_bytes), device=torch.device("cpu"), dtype=torch.float32)
        self.source = Source({adapter.spec.digest: adapter for adapter in adapters})
        self.source.open.set()
        self.cache = AdapterCache(host_bytes, self.source)
        for adapter in adapters:
            self.cache.put(adapter)
        self.sites, self.watcher, self.woken = FakeSites(), Watcher(), threading.Semaphore(0)
        self.residency = Residency(self.sites, self.pool, self.cache, self.watcher, self.woken.release, poison=True)

    def demand(self, *digests: str) -> Demand:
        return demand_of([(self.cache.spec(digest), 1.0) for digest in digests])

    def settle(self) -> dict[str, AdapterError]:
        """Wait until nothing is under way."""
        failures: dict[str, AdapterError] = {}
        while self.residency.num_loads:
            assert self.woken.acquire(timeout=10), "a job ended without waking anybody"
            failures |= self.residency.poll()
            self.residency.check_integrity()
        return failures

    def ask(self, demand: Demand, place: int = 0) -> Pins | None:
        """Pin what a demand needs if it is there; else set about loading it, and return None."""
        if self.residency.is_ready(demand):
            return self.residency.pin(demand)
        self.residency.prefetch(demand, place)
        return None

    def pin(self, *digests: str, place: int = 0) -> Pins:
        """Ask until it is granted."""
        for _ in range(20):
            pins = self.ask(self.demand(*digests), place)
            if pins is not None:
                for slot, _ in pins.members:
                    self.check(slot)
                return pins
            self.settle()
        raise AssertionError("never granted")

    def check(self, slot: int) -> None:
        """See that the units of a slot hold one number, which is that of some digest, and no poison."""
        values = {float(v) for unit in self.sites.bound[slot].values() for t in unit.tensors for v in t.unique()}
        assert len(values) == 1
        assert values <= {number_of(digest) for digest in LETTERS}

    def resident(self, digests: str = LETTERS) -> str:
        assert len(self.sites.bound) == self.residency.num_resident_parts
        return "".join(digest for digest in digests if self.residency.is_resident(digest))


def letters(count: int) -> list[Adapter]:
    return [make_adapter(chr(ord("a") + index)) for index in range(count)]


def release(*pins: Pins) -> None:
    """Release all."""
    for one in pins:
        one.release()
