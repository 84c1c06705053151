"""Processes of a worker: bound to its life, weighed, ended in good order or by force, and nothing left of them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from motley_trainer.worker.child import ChildEnd, ChildOrder, run_child
from motley_trainer.worker.lines import LineSplitter
from motley_trainer.worker.settings import Timings
from motley_trainer.worker.work import child_environ
from worker_house import FAST, WorkerHouse, eventually, fake_command, worker_house

REAL_WORKER = Path(__file__).parents[1] / "real_worker.py"


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, whether or not somebody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@contextmanager
def real_worker(house: WorkerHouse, mode: str) -> Iterator[subprocess.Popen[str]]:
    """Run a worker as a process of its own while the block runs."""
    command = [sys.executable, str(REAL_WORKER), house.address, str(house.directory), mode]
    path = os.pathsep.join([str(REAL_WORKER.parent), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path, "GRPC_VERBOSITY": "ERROR"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        try:
            yield process
        finally:
            process.kill()


def pid_of_job(house: WorkerHouse, job_id: str) -> int:
    return int((house.directory / "jobs" / job_id / "pid").read_text().split()[0])


def test_a_worker_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    with worker_house(tmp_path / "work") as house, real_worker(house, "clings") as process:
        job = house.fake.add_job()
        assert eventually(lambda: bool(job.steps()))
        pid = pid_of_job(house, job.id)
        assert not is_gone(pid)

        process.kill()
        process.wait()

        assert eventually(lambda: is_gone(pid), seconds=5)


def test_a_worker_that_is_terminated_gives_its_job_back_and_ends_well(tmp_path: Path) -> None:
    with worker_house(tmp_path / "work") as house, real_worker(house, "waits") as process:
        job = house.fake.add_job()
        assert eventually(lambda: any(event.stage == "waiting" for event in job.events))

        process.terminate()
        said = process.communicate(timeout=20)[1]

    assert (process.returncode, job.state) == (0, "queued")
    assert job.kinds()[-1] == "checkpoint_step"
    lines = [line for line in said.splitlines() if "job-" in line]
    assert [line.partition(": ")[2].split()[0] for line in lines] == ["leased,", "process", "process", "queued"]
    assert said.count("Traceback") == 0


@dataclass
class Ears:
    """Hear a process; `is_full` for as many questions as `full_for`."""

    full_for: int = 0
    heard: list[Mapping[str, Any]] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        self.full_for -= 1
        return self.full_for >= 0

    def told(self, line: Mapping[str, Any]) -> None:
        self.heard.append(line)

    def weighed(self, num_bytes: int) -> None:
        self.weights.append(num_bytes)


def run(mode: str, folder: Path, ears: Ears, timings: Timings = FAST, **changes: Any) -> ChildEnd:
    (folder / "job.json").write_text("{}")
    command = (*fake_command(mode), str(folder))
    order = replace(ChildOrder(mode, command, dict(os.environ), nice=0, memory_limit_bytes=None), **changes)
    return asyncio.run(asyncio.wait_for(run_child(order, ears, timings, asyncio.Event()), 20))


def test_a_process_is_heard_to_its_end_and_weighed(tmp_path: Path) -> None:
    ears = Ears()

    end = run("passes", tmp_path, ears)

    assert (end.code, end.failure, end.over_bytes) == (0, None, None)
    assert [line["progress"]["step"] for line in ears.heard if "progress" in line] == [1, 2, 3]
    assert max(ears.weights) > 1 << 20


def test_a_process_is_niced_and_the_first_to_go_where_memory_runs_out(tmp_path: Path) -> None:
    run("passes", tmp_path, Ears(), nice=7)

    _, nice, score = (tmp_path / "pid").read_text().split()
    assert int(nice) == os.nice(0) + 7
    assert int(score) >= 500


def test_nothing_is_heard_while_there_is_no_room_and_nothing_is_lost(tmp_path: Path) -> None:
    ears = Ears(full_for=5)

    end = run("hurries", tmp_path, ears)

    assert end.code == 0
    assert ears.full_for < 0
    assert [line["progress"]["step"] for line in ears.heard if "progress" in line] == list(range(1, 1001))


def test_what_a_process_leaves_behind_goes_with_it(tmp_path: Path) -> None:
    end = run("leaves", tmp_path, Ears())

    assert end.code == 0
    assert eventually(lambda: is_gone(int((tmp_path / "left").read_text())), seconds=5)


def test_a_process_whose_worker_died_before_it_began_does_not_begin(tmp_path: Path) -> None:
    from motley_trainer.worker import child_start

    nobody = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    nobody.wait()
    command = [sys.executable, "-I", "-S", child_start.__file__, str(nobody.pid), "0", "touch", str(tmp_path / "began")]

    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stderr) == (1, "the worker is gone\n")
    assert not (tmp_path / "began").exists()


@pytest.mark.parametrize(
    ("code", "cause"), [(3, "exit code 3"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")]
)
def test_an_end_is_told_in_words(code: int, cause: str) -> None:
    assert ChildEnd(code, None, "", None).cause == cause


def test_a_job_gets_neither_keys_nor_threads_nor_the_network() -> None:
    ours = {"MOTLEY_KEY": "mk_secret", "MOTLEY_SERVER": "x:1", "PATH": "/bin", "OMP_NUM_THREADS": "64"}

    environ = child_environ(ours, 1)

    assert environ == {
        "PATH": "/bin", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    assert child_environ(ours, None)["OMP_NUM_THREADS"] == "64"


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_lines_are_the_same_however_they_come(size: int) -> None:
    data = b"one\n\ntwo\nthree"
    splitter, found = LineSplitter(), []
    for start in range(0, len(data), size):
        found += splitter.feed(data[start : start + size])
    assert [*found, *splitter.finish()] == [b"one", b"", b"two", b"three"]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_of_a_line_that_is_too_long_its_beginning_comes_once(size: int) -> None:
    data = b"ab\nabcdefgh\ncd\n" + b"x" * 9
    splitter, found = LineSplitter(4), []
    for start in range(0, len(data), size):
        found += splitter.feed(data[start : start + size])
    assert [*found, *splitter.finish()] == [b"ab", b"abcd", b"cd", b"xxxx"]


def test_the_order_of_a_job_is_what_its_process_reads(tmp_path: Path) -> None:
    with worker_house(tmp_path / "work") as house:
        job = house.fake.add_job(seed=7, steps=3)
        orders: list[dict[str, Any]] = []

        def read(num_steps: int) -> bool:
            if len(job.steps()) == num_steps:
                orders.append(json.loads((house.directory / "jobs" / job.id / "job.json").read_text()))
            return len(orders) == num_steps

        soon = replace(FAST, grace_seconds=0.01)
        house.work("clings", lambda: read(1), timings=soon)
        house.work("clings", lambda: read(2), dtype="float32", timings=soon)

    digest = job.spec.dataset
    assert orders[0] == {
        "job_id": job.id,
        "spec": {
            "method": "TRAINING_METHOD_LORA", "dataset": digest, "steps": 3, "seed": "7",
            "publish": {"adapter_name": "legal"},
        },
        "base": "/bases/tiny",
        "base_name": "tiny",
        "dtype": "bfloat16",
        "served_quantization": "nf4",
        "device": "cpu",
        "spectra": str(house.directory / "spectra"),
    }  # fmt: skip
    assert orders[1] == orders[0] | {"dtype": "float32"}
    assert (house.directory / "jobs" / job.id / "data" / f"{digest.removeprefix('sha256:')}.jsonl").exists()
