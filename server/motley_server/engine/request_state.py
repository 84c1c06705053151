"""One request while the engine works on it: its candidates, its clock, and what it has to tell.

Turns sampled tokens into text and events and decides when a candidate is done; knows nothing of blocks, batches or
tensors. Runs on the engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from motley_server.engine.detokenizer import IncrementalDetokenizer
from motley_server.engine.observer import EngineObserver, RequestReport
from motley_server.engine.sequence import Sequence
from motley_server.engine.types import (
    CandidateDelta,
    FinishReason,
    GenerateRequest,
    RequestEvent,
    TokenLogprobs,
    Usage,
)
from motley_server.errors import CancelledRequestError, DeadlineExceededError, MotleyError

DetokenizerFactory = Callable[[GenerateRequest], IncrementalDetokenizer]


class RequestState:
    """Follow one request from the mailbox to its last event.

    Semantics: candidate 0 runs first; the others start when its prompt has been computed, and find it in the prefix
    cache.
    """

    def __init__(
        self,
        request: GenerateRequest,
        arrival: float,
        cache_seed: bytes,
        make_detokenizer: DetokenizerFactory,
        observer: EngineObserver,
    ) -> None:
        self.request = request
        self.sequences: list[Sequence] = []  # the unfinished ones
        self._arrival = arrival
        self._started: float | None = None
        self._observer = observer
        self._cache_seed = cache_seed
        self._make_detokenizer = make_detokenizer
        self._stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self._detokenizers: list[IncrementalDetokenizer] = []
        self._last_token_at: dict[int, float] = {}
        self._deltas: list[CandidateDelta] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._outcome = FinishReason.STOP

    def start(self) -> Sequence:
        """Return the sequence of candidate 0."""
        return self._new_sequence()

    def note_scheduled(self) -> None:
        """Note that the request is no longer waiting."""
        if self._started is None:
            self._started = time.monotonic()

    def fork(self) -> list[Sequence]:
        """Return the sequences of the other candidates, once; nothing before candidate 0 has computed the prompt."""
        if len(self._detokenizers) == self.request.sampling.n or not self._num_output_tokens:
            return []
        return [self._new_sequence() for _ in range(1, self.request.sampling.n)]

    def add_token(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, context_length: int) -> bool:
        """Append a sampled token and tell whether the candidate is finished."""
        self._observe_token(sequence)
        sequence.append(token_id)
        self._num_output_tokens += 1
        text, reason = self._advance(sequence, token_id, context_length)
        entries = () if logprobs is None else (logprobs,)
        self._deltas.append(CandidateDelta(sequence.index, text, (token_id,), entries, reason))
        if reason is None:
            return False
        if reason is FinishReason.LENGTH:
            self._outcome = reason
        self.sequences.remove(sequence)
        return True

    def finish_scoring(self, sequence: Sequence) -> None:
        """Note that every wanted log-probability of the prompt is there."""
        self._note_start(sequence)
        self._prompt_logprobs = tuple(sequence.prompt_logprobs)
        self.sequences.remove(sequence)

    def take_event(self) -> RequestEvent | None:
        """Return what is new since the last call, with the usage once every candidate is done; None if nothing is."""
        usage = None
        if not self.sequences:
            usage = Usage(len(self.request.prompt_token_ids), self._num_output_tokens, self._num_cached_tokens)
            self._report("score" if self.request.prompt_logprobs else self._outcome.value)
        elif not self._deltas:
            return None
        deltas, self._deltas = tuple(self._deltas), []
        return RequestEvent(self.request.request_id, deltas, self._prompt_logprobs, usage)

    def fail(self, error: MotleyError) -> RequestEvent:
        """Return the last event of a request that ends in an error."""
        cancelled = isinstance(error, CancelledRequestError)
        late = isinstance(error, DeadlineExceededError)
        self._report("cancelled" if cancelled else "deadline" if late else "error")
        return RequestEvent(self.request.request_id, error=error)

    def is_late(self, now: float) -> bool:
        """Tell whether the caller's deadline has passed."""
        return self.request.deadline is not None and now >= self.request.deadline

    def _new_sequence(self) -> Sequence:
        sequence = Sequence(self.request, len(self._detokenizers), self._cache_seed)
        self._detokenizers.append(self._make_detokenizer(self.request))
        self.sequences.append(sequence)
        return sequence

    def _advance(self, sequence: Sequence, token_id: int, context_length: int) -> tuple[str, FinishReason | None]:
        detokenizer, params = self._detokenizers[sequence.index], self.request.sampling
        if token_id in self._stop_token_ids:
            return detokenizer.finish(), FinishReason.STOP
        delta = detokenizer.append((token_id,))
        if delta.stopped:
            return delta.text, FinishReason.STOP
        if sequence.num_output_tokens >= params.max_new_tokens or sequence.num_tokens >= context_length:
            return delta.text + detokenizer.finish(), FinishReason.LENGTH
        return delta.text, None

    def _observe_token(self, sequence: Sequence) -> None:
        now = time.monotonic()
        previous = self._last_token_at.get(sequence.index)
        if previous is not None:
            self._observer.next_token_made(now - previous)
        else:
            self._note_start(sequence)
            self._observer.first_token_made(now - self._arrival)
        self._last_token_at[sequence.index] = now

    def _note_start(self, sequence: Sequence) -> None:
        if sequence.index == 0:
            self._num_cached_tokens = sequence.num_cached_tokens

    def _report(self, outcome: str) -> None:
        now = time.monotonic()
        self._observer.request_finished(
            RequestReport(
                outcome=outcome,
                num_prompt_tokens=len(self.request.prompt_token_ids),
                num_cached_prompt_tokens=self._num_cached_tokens,
                num_generated_tokens=self._num_output_tokens,
                queue_seconds=(self._started or now) - self._arrival,
                end_to_end_seconds=now - self._arrival,
            )
        )
