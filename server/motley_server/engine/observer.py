"""What the engine tells whoever watches it; `metrics.py` implements it, tests count with it.

Called on the engine thread, between steps: an implementation must be quick, must not raise, and must not call back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepReport:
    """One forward pass, and the state it left behind."""

    seconds: float
    num_tokens: int
    num_sequences: int
    num_distinct_adapters: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_total_blocks: int


@dataclass(frozen=True, slots=True)
class RequestReport:
    """One request that ended.

    Units: seconds. `outcome` is stop, length, score, cancelled, deadline or error; candidates that ended differently
    count as `length` if any did.
    """

    outcome: str
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_generated_tokens: int
    queue_seconds: float
    end_to_end_seconds: float


class EngineObserver(Protocol):
    """Receive what happened."""

    def step_finished(self, report: StepReport) -> None:
        """Take note of a forward pass."""

    def prefix_looked_up(self, num_queried_tokens: int, num_hit_tokens: int) -> None:
        """Take note of what a newly scheduled sequence found in the prefix cache."""

    def sequence_preempted(self) -> None:
        """Take note that a running sequence gave its blocks back and will be recomputed."""

    def first_token_made(self, seconds: float) -> None:
        """Take note of the time from arrival to a candidate's first token."""

    def next_token_made(self, seconds: float) -> None:
        """Take note of the time between two tokens of a candidate."""

    def request_finished(self, report: RequestReport) -> None:
        """Take note of a request that ended, however it did."""

    def part_loaded(self, seconds: float) -> None:
        """Take note of a part of an adapter that became resident on the device, and how long its load took."""

    def part_evicted(self) -> None:
        """Take note of a part of an adapter that left the device."""

    def load_failed(self) -> None:
        """Take note of an adapter that could not be loaded."""
