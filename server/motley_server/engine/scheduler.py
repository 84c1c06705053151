"""Which sequences take part in the next forward pass, and with how many tokens.

Plain Python over integers, tested without a model. A sequence that decodes, one that prefills in chunks and one that is
recomputed after a preemption differ only in how many tokens they lack. A sequence runs only while the adapters that it
needs are pinned; one that finds no room for them is passed by others under adapters so many times, and no more: then
pins run out until there is room. Runs on the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from motley_server.engine.block_pool import BlockPool
from motley_server.engine.observer import EngineObserver
from motley_server.engine.pins import AdapterPins
from motley_server.engine.sequence import Sequence
from motley_server.engine.waiting_line import WaitingLine

MAX_SCORED_TOKENS = 256  # of one sequence in one pass: each costs a row of logits as wide as the vocabulary
MAX_OVERTAKEN = 16  # admissions under adapters past a sequence that finds no room for its own, until they end


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence and how many of its uncomputed tokens the next forward pass computes."""

    sequence: Sequence
    num_tokens: int

    @property
    def catches_up(self) -> bool:
        """Tell whether the pass leaves nothing uncomputed, so that its last row decides the next token."""
        return self.num_tokens == self.sequence.num_uncomputed_tokens


class Scheduler:
    """Keep the waiting and the running, and give blocks to those that run."""

    def __init__(
        self,
        pool: BlockPool,
        adapters: AdapterPins,
        observer: EngineObserver,
        *,
        max_running: int,
        token_budget: int,
        prefix_cache: bool,
    ) -> None:
        self.pool = pool
        self.num_waiting_for_adapters = 0  # requests in the window, as of the last pass
        self.waiting = WaitingLine()
        self.running: list[Sequence] = []  # in order of admission: the last is the first to be preempted
        self._adapters = adapters
        self._observer = observer
        self._max_running = max_running
        self._token_budget = token_budget
        self._prefix_cache = prefix_cache

    @property
    def has_work(self) -> bool:
        """Tell whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind all others of its tenant."""
        self.waiting.append(sequence)

    def add_first(self, sequence: Sequence) -> None:
        """Queue a sequence before all others."""
        self.waiting.append_first(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and give its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.has_started:
            self.waiting.refund(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next forward pass.

        Semantics: decoding sequences come first, so that a long prompt never delays a stream by more than one pass;
        then prompts that are half done; then, if nobody had to be preempted, new ones. Returns nothing only if there is
        no work, or none whose adapters are there yet.
        """
        budget = self._token_budget
        batch: list[Scheduled] = []
        preempted = False
        for sequence in [*filter(_decodes, self.running), *filter(_prefills, self.running)]:
            if budget == 0:
                break
            if sequence not in self.running:  # preempted for one that came before it in this very pass
                continue
            num_tokens = _chunk(sequence, budget)
            while not (fits := self._grow(sequence, num_tokens)):
                preempted = True
                if self._preempt_last() is sequence:
                    break
            if fits:
                batch.append(Scheduled(sequence, num_tokens))
                budget -= num_tokens
        batch = [entry for entry in batch if entry.sequence.block_table]
        if not preempted:
            batch.extend(self._admit(budget))
        return batch

    def complete(self, batch: list[Scheduled]) -> None:
        """Note that a forward pass has been computed, and remember the blocks it filled."""
        for entry in batch:
            sequence = entry.sequence
            first = sequence.num_computed_tokens // self.pool.block_size
            sequence.num_computed_tokens += entry.num_tokens
            if self._prefix_cache:
                for index in range(first, sequence.num_computed_tokens // self.pool.block_size):
                    block_hash = sequence.block_hash(index, self.pool.block_size)
                    self.pool.remember(sequence.block_table[index], block_hash)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is accounted for."""
        self.pool.check_integrity(sequence.block_table for sequence in self.running)
        if any(sequence.block_table for sequence in self.waiting):
            raise AssertionError("a waiting sequence owns blocks")
        if any(sequence.pins is None for sequence in self.running) or any(sequence.pins for sequence in self.waiting):
            raise AssertionError("a waiting sequence has pins, or a running one has none")

    def _admit(self, budget: int) -> Iterator[Scheduled]:
        """Let those in that wait, in order, but for those who wait for adapters."""
        left = _LeftWaiting()
        for sequence in self._next_ready(left):
            if budget == 0 or len(self.running) == self._max_running:
                continue
            sequence.pins = self._adapters.pin(sequence.request)
            num_tokens = self._start(sequence, budget)
            if num_tokens == 0:  # no blocks: nobody passes it for those
                budget = 0
                continue
            left.note_admission(sequence)
            yield Scheduled(sequence, num_tokens)
            budget -= num_tokens
        self.num_waiting_for_adapters = len(left.request_ids)

    def _next_ready(self, left: _LeftWaiting) -> Iterator[Sequence]:
        """Go along the line: yield who has all adapters there, and set about loading the others'.

        Semantics: behind one that was overtaken too often, whoever needs adapters would only keep room from it, by its
        pins or by its loads. Those who need none hold no room.
        """
        window = self.waiting.window()
        self._adapters.look_ahead([sequence.request for sequence in window])
        for place, sequence in enumerate(window):
            if left.is_closed and sequence.request.adapters:
                left.add(sequence, has_room=True)
            elif self._is_ready(sequence):
                yield sequence
            else:
                left.add(sequence, has_room=self._adapters.prefetch(sequence.request, place))
        if len(self.running) < self._max_running:
            for sequence in self.waiting.ready_behind(self._is_ready, self._adapters.num_binds):
                if self._is_ready(sequence) and not (left.is_closed and sequence.request.adapters):
                    yield sequence

    def _is_ready(self, sequence: Sequence) -> bool:
        return self._adapters.is_ready(sequence.request)

    def _start(self, sequence: Sequence, budget: int) -> int:
        """Make a pinned sequence run; returns its tokens, or 0, and gives everything back, if it lacks blocks."""
        cached = self._find_cached(sequence)
        sequence.num_computed_tokens = len(cached) * self.pool.block_size
        num_tokens = _chunk(sequence, budget)
        lacking = self._num_lacking_blocks(sequence, num_tokens) - len(cached)
        if lacking + self.pool.num_unowned(cached) > self.pool.num_free:
            self._give_back(sequence)
            return 0
        self.pool.own(cached)
        sequence.block_table.extend(cached)
        sequence.block_table.extend(self.pool.allocate(lacking))
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._note_admission(sequence)
        return num_tokens

    def _find_cached(self, sequence: Sequence) -> list[int]:
        if not self._prefix_cache:
            return []
        size = self.pool.block_size
        return self.pool.find(
            sequence.block_hash(index, size) for index in range(sequence.num_cacheable_tokens // size)
        )

    def _note_admission(self, sequence: Sequence) -> None:
        if self._prefix_cache:
            self._observer.prefix_looked_up(sequence.num_tokens, sequence.num_computed_tokens)
        if not sequence.has_started:
            sequence.has_started = True
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.waiting.charge(sequence)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        lacking = self._num_lacking_blocks(sequence, num_tokens)
        if lacking > self.pool.num_free:
            return False
        sequence.block_table.extend(self.pool.allocate(lacking))
        return True

    def _num_lacking_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        wanted = -(-(sequence.num_computed_tokens + num_tokens) // self.pool.block_size)
        return max(0, wanted - len(sequence.block_table))

    def _preempt_last(self) -> Sequence:
        sequence = self.running.pop()
        self._give_back(sequence)
        self.waiting.append_first(sequence)
        self._observer.sequence_preempted()
        return sequence

    def _give_back(self, sequence: Sequence) -> None:
        """Give back blocks and pins; the one place that does."""
        self.pool.release(sequence.block_table)
        sequence.forget_computed()
        pins, sequence.pins = sequence.pins, None
        if pins is not None:
            pins.release()


class _LeftWaiting:
    """Those whom a pass leaves to wait for adapters, and whether it lets others in under adapters behind them."""

    def __init__(self) -> None:
        self.request_ids: set[str] = set()
        self.is_closed = False
        self._without_room: list[Sequence] = []

    def add(self, sequence: Sequence, *, has_room: bool) -> None:
        self.request_ids.add(sequence.request.request_id)
        if not has_room:
            self._without_room.append(sequence)
            self.is_closed |= sequence.num_overtaken >= MAX_OVERTAKEN

    def note_admission(self, sequence: Sequence) -> None:
        if sequence.request.adapters:
            for other in self._without_room:
                other.num_overtaken += 1
                self.is_closed |= other.num_overtaken >= MAX_OVERTAKEN


def _decodes(sequence: Sequence) -> bool:
    return sequence.is_decoding


def _prefills(sequence: Sequence) -> bool:
    return not sequence.is_decoding


def _chunk(sequence: Sequence, budget: int) -> int:
    limit = min(budget, MAX_SCORED_TOKENS) if sequence.request.prompt_logprobs else budget
    return min(sequence.num_uncomputed_tokens, limit)
