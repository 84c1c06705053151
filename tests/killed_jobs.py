"""Jobs as processes that are ended by SIGKILL where a test says, forked from one that has the trainer imported.

A place is something that a job has just told, or a name that is about to appear in its folder. A job that comes to the
place it is to die at waits there, so that the signal meets it in the midst of what it did, however fast that is. All of
the process is the product's, from the signals it takes to its exit status, but for the imports: a fork has them.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# What a job over a Llama has imported by the time that it has ended.
PRELOADED = (
    "motley_trainer.job.process", "motley_trainer.job.run", "transformers.models.llama.modeling_llama",
    "torch._dynamo", "bitsandbytes", "transformers.integrations.bitsandbytes",
)  # fmt: skip
HOLDING, ENDED = "holding", "ended"

Event = Mapping[str, Any]


class KilledJobs:
    """The process that jobs are forked from, one at a time."""

    def __init__(self, parent: subprocess.Popen[str]) -> None:
        self._parent = parent

    def kill_at(self, folder: Path, place: str) -> list[str]:
        """Run a job until it comes to a place, kill it there, and return what it told before."""
        told, pid = [], 0
        for line in self._run(folder, place):
            pid = line.get("pid", pid)
            if HOLDING in line:
                os.kill(pid, signal.SIGKILL)
            elif ENDED in line:
                assert line[ENDED] == -signal.SIGKILL, f"it did not come to {place}: {told}"
            else:
                told += places_of(line)
        return told

    def finish(self, folder: Path) -> list[str]:
        """Run a job until it ends, and return what it told."""
        lines = list(self._run(folder, None))
        assert lines[-1] == {ENDED: 0}
        return [place for line in lines[1:-1] for place in places_of(line)]

    def _run(self, folder: Path, place: str | None) -> Iterator[Event]:
        """Give a job's lines, from its process id to how it ended."""
        stdin, stdout = self._parent.stdin, self._parent.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps([str(folder), place]), file=stdin, flush=True)
        for text in stdout:
            line: Event = json.loads(text)
            yield line
            if ENDED in line:
                return
        raise AssertionError("the process that forks is gone")


@contextmanager
def killed_jobs() -> Iterator[KilledJobs]:
    """Have the process that jobs are forked from while the block runs."""
    command = [sys.executable, str(Path(__file__).resolve())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        yield KilledJobs(parent)


def places_of(event: Event) -> list[str]:
    """Return the places at which a job is that has told this."""
    steps = {kind: body["step"] if kind == "progress" else body for kind, body in event.items()}
    return [str(body) if kind == "stage" else f"{kind} {body}" for kind, body in steps.items()
            if kind in ("stage", "progress", "checkpoint_step")]  # fmt: skip


# --- In the process that forks, and in those that it forks


def fork_jobs() -> None:
    """Fork a job for each line that comes, and say how it ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    while order := _line():
        pid = os.fork()
        if pid == 0:
            _do(*json.loads(order))
        _, status = os.waitpid(pid, 0)
        _say({ENDED: os.waitstatus_to_exitcode(status)})


def _do(folder: str, place: str | None) -> NoReturn:
    """Do a job as its process does, but for one place to wait at."""
    from motley_trainer.job.process import exit_as_told
    from motley_trainer.job.reporting import Emit
    from motley_trainer.job.run import run

    _say({"pid": os.getpid()})

    def run_to_the_place(directory: Path, emit: Emit, should_stop: Any) -> None:
        def pass_by(*places: str) -> None:
            if place in places:
                emit({HOLDING: place})
                os.read(0, 1)  # which ends if the test does
                os._exit(1)

        def tell(event: Event) -> None:
            emit(event)
            pass_by(*places_of(event))

        def rename(old: Path, new: Path) -> None:
            pass_by(f"naming {new.relative_to(directory)}")
            real(old, new)

        real, os.replace = os.replace, rename  # type: ignore[assignment]
        run(directory, tell, should_stop)

    os._exit(exit_as_told(run_to_the_place, [folder]))


def _line() -> bytes:
    """Read a line and nothing after it, which a job would have to read again."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


def _say(line: Event) -> None:
    os.write(1, f"{json.dumps(line)}\n".encode())


if __name__ == "__main__":
    fork_jobs()
    os._exit(0)  # nothing is left to be taken down, which would take seconds
