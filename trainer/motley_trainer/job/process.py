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
from typing import Any, cast

import torch
from motley_adapters.errors import AdapterError
from motley_bases.errors import BaseError

from motley_trainer.errors import TrainerError
from motley_trainer.job.reporting import Emit, JobCancelledError

DONE, FAILED, CANCELLED, DIED = 0, 1, 3, 70

Run = Callable[[Path, Emit, Callable[[], bool]], object]


def exit_as_told(run: Run, arguments: Sequence[str]) -> int:
    """Run the job of the folder that is the one argument, and return the process's exit status.

    Effects: takes SIGTERM and SIGINT for the wish to stop; keeps standard output for the events alone; makes torch's
    choices repeatable.
    """
    stop = _Signals()
    _settle_torch()
    with _standard_output() as emit:
        try:
            run(Path(arguments[0]), emit, stop.has_come)
        except JobCancelledError:
            emit({"cancelled": True})
            return CANCELLED
        except (TrainerError, BaseError, AdapterError) as error:
            emit({"failed": {"reason": error.reason, "message": str(error), "field": error.field or ""}})
            return FAILED
        except Exception as error:
            traceback.print_exc()
            if not _is_out_of_memory(error):
                return DIED
            message = f"the job's memory does not do: {error}; smaller micro-batches or shorter samples take less"
            emit({"failed": {"reason": "OUT_OF_MEMORY", "message": message, "field": "micro_batch_size"}})
            return FAILED
    return DONE


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


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
