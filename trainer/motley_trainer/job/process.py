"""A job as a process: signals become questions, events become lines, errors become the last line and the exit status.

Its status is 0 if there is a result, 1 if it failed and would again, 3 if it was cancelled, and anything else if it
died and may be tried again. Nothing but events comes out of its standard output. Runs on the main thread.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from motley_adapters.errors import AdapterError
from motley_bases.errors import BaseError

from motley_trainer.errors import TrainerError
from motley_trainer.job.reporting import Emit, JobCancelledError

DONE, FAILED, CANCELLED, DIED = 0, 1, 3, 70
STEPPING = ("training", "aligning", "measuring")  # how the stages begin that take micro-batches

Run = Callable[[Path, Emit, Callable[[], bool]], object]


def exit_as_told(run: Run, arguments: Sequence[str]) -> int:
    """Run the job of the folder that is the one argument, and return the process's exit status.

    Effects: takes SIGTERM and SIGINT for the wish to stop; keeps standard output for the events alone; makes torch's
    choices repeatable.
    """
    stop = _Signals()
    _settle_torch()
    with _standard_output() as write:
        emit = _Told(write)
        try:
            run(Path(arguments[0]), emit, stop.has_come)
        except JobCancelledError:
            emit({"cancelled": True})
            return CANCELLED
        except (TrainerError, BaseError, AdapterError) as error:
            if _is_out_of_memory(error.__cause__):
                emit({"failed": _out_of_memory(error.__cause__, emit.stage)})
                return FAILED
            emit({"failed": {"reason": error.reason, "message": str(error), "field": error.field or ""}})
            return FAILED
        except Exception as error:
            traceback.print_exc()
            if not _is_out_of_memory(error):
                return DIED
            emit({"failed": _out_of_memory(error, emit.stage)})
            return FAILED
    return DONE


class _Told:
    """Emit events, and remember which stage was the last that was begun."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.stage = ""

    def __call__(self, event: Mapping[str, object]) -> None:
        self.stage = str(event.get("stage", self.stage))
        self._emit(event)


class _Signals:
    """Remember that a signal asked for the end."""

    def __init__(self) -> None:
        self._has_come = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def has_come(self) -> bool:
        """Tell whether one has."""
        return self._has_come

    def _take(self, number: int, frame: object) -> None:
        self._has_come = True


@contextmanager
def _standard_output() -> Iterator[Emit]:
    """Give what writes an event as a line; what others write to standard output goes to standard error meanwhile."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:

        def emit(event: Mapping[str, object]) -> None:
            lines.write(f"{json.dumps(event, allow_nan=False)}\n")
            lines.flush()

        os.dup2(2, 1)
        try:
            yield emit
        finally:
            os.dup2(lines.fileno(), 1)


def _settle_torch() -> None:
    """Make results repeatable: one thread, unless the environment says otherwise, and on a CPU one order of sums."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if not torch.cuda.is_available():  # there it would cost speed
        torch.use_deterministic_algorithms(True)
        # Nothing here reads what it has not written, so memory need not be filled first.
        cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False


def _is_out_of_memory(error: BaseException | None) -> TypeGuard[BaseException]:
    """Tell whether there was no memory, on the machine or on its GPU; some libraries say so in a text alone."""
    is_typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_typed or any(words in str(error) for words in ("can't allocate memory", "Cannot allocate memory"))


def _out_of_memory(error: BaseException, stage: str) -> Mapping[str, str]:
    """Return how a job failed for want of memory, with what would help where it was."""
    of_batches = stage.startswith(STEPPING)
    advice = (
        "smaller micro-batches or shorter samples take less"
        if of_batches
        else "that is the base's own size, and not the batches': it takes a worker with more memory, or a smaller base"
    )
    message = f"the job's memory does not do, at the stage {stage!r}: {error}; {advice}"
    return {"reason": "OUT_OF_MEMORY", "message": message, "field": "micro_batch_size" if of_batches else ""}
