"""What a job tells while it runs, and whether it shall stop.

Each event is the JSON of one of the wire's JobEvents. Progress is told about once a second, however fast the steps are.
Knows no stream and no signal. Runs on the thread that trains.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Emit = Callable[[Mapping[str, object]], None]

SECONDS_BETWEEN = 1.0
SECONDS_BETWEEN_STAGES = 5.0  # that say how far one and the same is


class JobCancelledError(Exception):
    """The job was asked to stop, and has."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step was."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    num_tokens: int


class Reporter:
    """Tell of a job through `emit`, and ask `should_stop`."""

    def __init__(
        self, emit: Emit, should_stop: Callable[[], bool], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._emit = emit
        self.should_stop = should_stop
        self._clock = clock
        self._began = self._told = self._said = clock()
        self._num_steps_done = self._num_tokens = 0
        self._untold: Step | None = None

    def stage(self, text: str) -> None:
        """Say what is being done, in a few words, and stop here if that is asked."""
        self.stop_if_asked()
        self._said = self._clock()
        self._emit({"stage": text})

    def read(self, field: str, number: int, share: float) -> None:
        """Say now and then how far a dataset is read, and stop here if that is asked."""
        self.stop_if_asked()
        if self._clock() - self._said >= SECONDS_BETWEEN_STAGES:
            self.stage(f"reading data: line {number} of {field}, {share:.0%}")

    def part(self, what: str, done: int, total: int) -> None:
        """Say of work in parts how far it is, at its beginning and now and then, and stop here if that is asked."""
        self.stop_if_asked()
        if done == 0 or self._clock() - self._said >= SECONDS_BETWEEN_STAGES:
            self.stage(f"{what}: {done} of {total}")

    def tell(self, kind: str, value: object) -> None:
        """Tell anything else."""
        self._emit({kind: value})

    def stop_if_asked(self) -> None:
        """Raise JobCancelledError if the job shall stop."""
        if self.should_stop():
            raise JobCancelledError

    def begin_steps(self) -> None:
        """Start the clock that speeds are measured by."""
        self._began = self._told = self._clock()
        self._num_steps_done = self._num_tokens = 0

    def step(self, step: Step) -> None:
        """Tell of a step: of the first and the last, and of others about once a second."""
        self._num_steps_done += 1
        self._num_tokens += step.num_tokens
        self._untold = step
        is_due = self._clock() - self._told >= SECONDS_BETWEEN
        if is_due or self._num_steps_done == 1 or step.step == step.num_steps:
            self.flush()

    def flush(self) -> None:
        """Tell of the last step, if it has not been told."""
        step, self._untold = self._untold, None
        if step is None:
            return
        now = self._clock()
        seconds = max(now - self._told, 1e-9)
        remaining = (step.num_steps - step.step) * (now - self._began) / self._num_steps_done
        progress = {
            "step": step.step,
            "num_steps": step.num_steps,
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "gradient_norm": step.gradient_norm,
            "tokens_per_second": round(self._num_tokens / seconds, 1),
            "remaining": f"{remaining:.3f}s",
            "memory_bytes": memory_bytes(),
        }
        self._told, self._num_tokens = now, 0
        self._emit({"progress": progress})


def memory_bytes() -> int:
    """Return what this process has allocated on its GPU, or else how much of it is resident."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
