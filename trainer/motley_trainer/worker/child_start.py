"""The first thing that runs in a job's process: it binds the process to the worker's life, and becomes the job.

Run as a file, by a bare interpreter: `python -I -S child_start.py PARENT NICE COMMAND...`. Imports nothing of ours.
Linux's own: when the worker dies, however it dies, the kernel kills what was bound so, and the binding outlasts exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

PR_SET_PDEATHSIG = 1
OOM_SCORE = 500  # of 1000: where memory runs out, a job goes before whoever serves


def main() -> None:
    """Bind this process to its parent, be modest, and become the command."""
    parent, nice, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel binds no process to its parent")
    if os.getppid() != int(parent):  # it died before the binding
        sys.exit("the worker is gone")
    os.nice(int(nice))
    with (
        suppress(OSError),
        open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file,
    ):  # not every sandbox has it
        if int(file.read()) < OOM_SCORE:
            file.write(str(OOM_SCORE))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
