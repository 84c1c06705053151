"""Faults that are the worker's and not its job's, and how long a worker that has one holds back.

A job is given back for such a fault: another worker may have room. Owns which words of a job's process mean one, and
the counting. Knows nothing of leases. Runs on the event loop.
"""

from __future__ import annotations

import errno

DISK_FULL, WORKER_FAULT = "DISK_FULL", "WORKER_FAULT"
STALE_DATA = ("DATASET_UNREADABLE", "DATASET_CHANGED")  # what was fetched is not good any more
OF_ITS_PLACE = (DISK_FULL, "OUTPUT_UNWRITABLE", "NO_DEVICE", *STALE_DATA)  # said by a job's process
FAULTS = (*OF_ITS_PLACE, WORKER_FAULT)
MAX_OF_ONE_JOB = 3  # faults that nothing explains: then it is the job that brings them about


class WorkerAtFaultError(Exception):
    """Say what is wrong with the worker, so that the job is given back."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


class Faults:
    """Count faults: those in a row, and those that nothing explains by their job."""

    def __init__(self, first_seconds: float, last_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._last_seconds = last_seconds
        self._num_in_a_row = 0
        self._unexplained: dict[str, int] = {}

    def blames(self, job_id: str) -> bool:
        """Count a fault that nothing explains, and tell whether it is to be taken for the job's own by now."""
        self._unexplained[job_id] = self._unexplained.get(job_id, 0) + 1
        return self._unexplained[job_id] >= MAX_OF_ONE_JOB

    def next_pause(self) -> float:
        """Count a fault, and return for how many seconds to ask for no job: each time twice as long."""
        pause = min(self._first_seconds * 2.0 ** min(self._num_in_a_row, 30), self._last_seconds)
        self._num_in_a_row += 1
        return pause

    def over(self, job_id: str) -> None:
        """Learn that a job came to an end of its own: whatever was at fault is not any more."""
        self._num_in_a_row = 0
        self._unexplained.pop(job_id, None)


def fault_of(error: Exception) -> WorkerAtFaultError:
    """Return an error that nobody foresaw as the worker's fault."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"the worker has no room for {error.filename or 'what the job needs'}: {error.strerror}"
        return WorkerAtFaultError(message, reason=DISK_FULL)
    return WorkerAtFaultError(f"{type(error).__name__}: {error}", reason=WORKER_FAULT)
