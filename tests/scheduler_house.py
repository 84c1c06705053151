"""A scheduler without a model: a fake pass computes what was scheduled and appends a token to whoever caught up."""

from __future__ import annotations

from dataclasses import dataclass, field

from counting_observer import CountingObserver
from motley_server.engine.block_pool import BlockPool
from motley_server.engine.pins import AdapterPins
from motley_server.engine.scheduler import Scheduled, Scheduler
from motley_server.engine.sequence import Sequence
from motley_server.engine.types import GenerateRequest, SamplingParams, ServedAdapter

BLOCK_SIZE = 4


@dataclass
class FakePin:
    """One sequence's hold on its adapters."""

    book: FakeAdapters
    digests: frozenset[str]
    members: tuple[tuple[int, float], ...] = ()

    def release(self) -> None:
        self.book.pinned.remove(self)


@dataclass
class FakeAdapters:
    """Room for so many adapters at once; what is asked for arrives, if there is room then, before the next pass."""

    room: int = 10**6
    absent: set[str] = field(default_factory=set)  # on their way for ever
    pinned: list[FakePin] = field(default_factory=list)
    resident: set[str] = field(default_factory=set)
    looks: list[list[str]] = field(default_factory=list)
    line: list[frozenset[str]] = field(default_factory=list)
    num_binds: int = 0
    num_checks: int = 0  # calls of `is_ready`

    def look_ahead(self, waiting: list[GenerateRequest]) -> None:
        self.looks.append([request.request_id for request in waiting])
        self.line = [digests_of(request) for request in waiting]

    def is_ready(self, request: GenerateRequest) -> bool:
        self.num_checks += 1
        return digests_of(request) <= self.resident

    def pin(self, request: GenerateRequest) -> FakePin:
        assert digests_of(request) <= self.resident
        self.pinned.append(FakePin(self, digests_of(request)))
        return self.pinned[-1]

    def prefetch(self, request: GenerateRequest, place: int) -> bool:
        wanted = digests_of(request)
        stays = wanted.union(*(pin.digests for pin in self.pinned), *self.line[:place]) & (self.resident | wanted)
        if len(stays) > self.room:
            return False
        if not wanted & self.absent:
            idle = sorted(self.resident - stays)
            self.resident = stays | set(idle[: self.room - len(stays)])
            self.num_binds += 1
        return True


def digests_of(request: GenerateRequest) -> frozenset[str]:
    return frozenset(adapter.digest for adapter in request.adapters)


def make_scheduler(
    *,
    num_blocks: int = 64,
    max_running: int = 8,
    token_budget: int = 16,
    prefix_cache: bool = True,
    adapters: AdapterPins | None = None,
) -> tuple[Scheduler, CountingObserver]:
    observer = CountingObserver()
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(
        pool,
        adapters or FakeAdapters(),
        observer,
        max_running=max_running,
        token_budget=token_budget,
        prefix_cache=prefix_cache,
    )
    return scheduler, observer


def make_sequence(name: str, prompt: list[int], seed: bytes = b"base", adapters: str = "") -> Sequence:
    """Make a sequence under adapters that have a letter each."""
    served = tuple(ServedAdapter(letter, 1, letter, 1.0, "undeclared", "lora") for letter in adapters)
    request = GenerateRequest(name, "local", tuple(prompt), SamplingParams(max_new_tokens=8), served)
    return Sequence(request, 0, seed + adapters.encode())


def run_pass(scheduler: Scheduler, *, num_new: int = 8) -> list[Scheduled]:
    """Compute one pass; a sequence with `num_new` answered tokens is done."""
    batch = scheduler.schedule()
    scheduler.complete(batch)
    for entry in batch:
        sequence = entry.sequence
        if sequence.num_uncomputed_tokens == 0:
            sequence.token_ids.append(sequence.num_tokens)
            if sequence.num_output_tokens == num_new:
                scheduler.remove(sequence)
    scheduler.check_integrity()
    return batch


def shape(batch: list[Scheduled]) -> dict[str, int]:
    return {entry.sequence.request.request_id: entry.num_tokens for entry in batch}
