"""The loader: a thread that brings parts from host memory, or from further away, into their places in the arena.

It is told where to write and says when it has; which bytes are free, who waits and who is bound is the residency's
knowledge. On a CPU it writes the places directly. On CUDA it fills a pinned image of each extent and copies that on a
stream of its own, with an event an extent, so that a forward pass waits for the layers that it reaches and for no more.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from motley_kernels.adapter_delta import DeltaUnit
from motley_kernels.adapter_delta.pool import UnitPool, write_units

from motley_adapters.cache import AdapterCache
from motley_adapters.errors import AdapterError, AdapterLoadError
from motley_adapters.extents import Extent
from motley_adapters.outline import blank_parts
from motley_adapters.spec import Part

log = logging.getLogger(__name__)

Arrival = Callable[[], None]


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """Find out what room the parts of an adapter take; nothing is read for it."""

    adapter: str


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Write a part of an adapter to its extents.

    Semantics: `freed`, on CUDA, is an event after the last work that read what lay there before.
    """

    adapter: str
    part: str
    extents: tuple[Extent, ...]
    freed: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """The sizes of the extents that each part of an adapter takes."""

    job: MeasureJob
    sizes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A part in its place; an arrival orders a device's work behind the copy of a module's unit."""

    job: LoadJob
    units: Mapping[str, DeltaUnit]
    seconds: float
    arrivals: Mapping[str, Arrival] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A job that came to nothing."""

    job: MeasureJob | LoadJob
    error: AdapterError


Job = MeasureJob | LoadJob
Result = Measured | Loaded | LoadFailed


def extent_sizes(pool: UnitPool, part: Part) -> tuple[int, ...]:
    """Return the bytes of each extent of a part, in the order in which `LoadJob.extents` gives their places."""
    return tuple(pool.extent_bytes([part.units[path] for path in paths]) for paths in _layers(part.units))


class PartLoader:
    """Do jobs one after another on a thread of its own, which ends when its owner is gone.

    Semantics: `wake` is called on the loader's thread after every result.
    """

    def __init__(self, pool: UnitPool, cache: AdapterCache, wake: Callable[[], None]) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        started = threading.Event()
        worker = _Worker(pool, cache, wake, self._jobs, self._results)
        thread = threading.Thread(target=worker.run, args=(started,), name="adapter loader", daemon=True)
        self.close = weakref.finalize(self, self._jobs.put, None)
        num_threads = torch.get_num_threads()
        thread.start()
        started.wait()
        # The loader made itself single-threaded, and with that the threads yet to come, which it must not.
        torch.set_num_threads(num_threads)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.put(job)

    def finished(self) -> list[Result]:
        """Return the results since the last call, without waiting."""
        results: list[Result] = []
        while True:
            try:
                results.append(self._results.get_nowait())
            except queue.Empty:
                return results


class _Worker:
    def __init__(
        self,
        pool: UnitPool,
        cache: AdapterCache,
        wake: Callable[[], None],
        jobs: queue.SimpleQueue[Job | None],
        results: queue.SimpleQueue[Result],
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._wake = wake
        self._jobs = jobs
        self._results = results
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None

    def run(self, started: threading.Event) -> None:
        # A second OpenMP pool would fight the engine's. A thread takes over the process's number at its first use: now.
        torch.set_num_threads(1)
        torch.get_num_threads()
        started.set()
        while (job := self._jobs.get()) is not None:
            self._results.put(self._do(job))
            self._wake()

    def _do(self, job: Job) -> Result:
        try:
            return self._measure(job) if isinstance(job, MeasureJob) else self._load(job)
        except AdapterError as error:
            return LoadFailed(job, error)
        except Exception:
            log.exception("%s could not be loaded", job.adapter)
            return LoadFailed(job, AdapterLoadError(f"{job.adapter} cannot be loaded", reason="ADAPTER_UNREADABLE"))

    def _measure(self, job: MeasureJob) -> Measured:
        parts = blank_parts(self._cache.outline(job.adapter))
        return Measured(job, {part.digest: extent_sizes(self._pool, part) for part in parts})

    def _load(self, job: LoadJob) -> Loaded:
        began = time.monotonic()
        with self._cache.borrow(job.adapter) as adapter:
            part = next((part for part in adapter.parts if part.digest == job.part), None)
            if part is None:
                raise AdapterLoadError(f"{job.adapter} has no part {job.part}", reason="ADAPTER_CHANGED")
            placed: dict[str, DeltaUnit] = {}
            arrivals: dict[str, Arrival] = {}
            for extent, paths in zip(job.extents, _layers(part.units), strict=True):
                units = [part.units[path] for path in paths]
                places = self._pool.place(extent.start, units)
                placed.update(zip(paths, places, strict=True))
                if self._stream is None:
                    write_units(places, units)
                else:
                    arrival = self._copy(self._stream, job.freed, extent, places, units)
                    arrivals.update(dict.fromkeys(paths, arrival))
        return Loaded(job, placed, time.monotonic() - began, arrivals)

    def _copy(
        self,
        stream: torch.cuda.Stream,
        freed: torch.cuda.Event | None,
        extent: Extent,
        places: Sequence[DeltaUnit],
        units: Sequence[DeltaUnit],
    ) -> Arrival:
        """Fill a pinned image of an extent and send it as one copy."""
        image = torch.empty(extent.size, dtype=torch.uint8, pin_memory=True)
        start = self._pool.buffer.data_ptr() + extent.start
        for place, unit in zip(places, units, strict=True):
            for to, given in zip(place.tensors, unit.tensors, strict=True):
                offset = to.data_ptr() - start
                image[offset : offset + to.nbytes].view(to.dtype).view(to.shape).copy_(given)
        arrived = torch.cuda.Event()
        with torch.cuda.stream(stream):
            if freed is not None:
                stream.wait_event(freed)
            self._pool.buffer[extent.start : extent.start + extent.size].copy_(image, non_blocking=True)
            arrived.record(stream)
        return lambda: torch.cuda.current_stream(self._pool.device).wait_event(arrived)


def _layers(units: Mapping[str, DeltaUnit]) -> list[list[str]]:
    """Return the module paths of each extent: those of a layer together, every other module by itself."""
    layers: dict[str, list[str]] = {}
    for path in sorted(units):
        number = next((component for component in path.split(".") if component.isdecimal()), None)
        layers.setdefault(path if number is None else number, []).append(path)
    return list(layers.values())
