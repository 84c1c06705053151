"""`motley train submit`, and a worker of another base, at the server's shell: told in a line, and nothing queued."""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from job_folders import reversals, write_dataset
from mortal_training import MortalTraining
from motley.v1 import training_pb2
from motley_bases.checkpoint import resolve_base
from motley_bases.fingerprint import fingerprint
from motley_client.cli import app
from motley_server.registry.disk import Disk
from page_runs import run
from rpc_harness import Shell, serving
from training_calls import DATA, FINGERPRINT, queue
from typer.testing import CliRunner, Result

LORA, S2FT = ("--method", "lora"), ("--method", "s2ft")
BAD: dict[str, tuple[bytes, Sequence[str], str]] = {
    "no data": (b"", LORA, "EMPTY_DATASET, field header.size_bytes"),
    "one line": (DATA.splitlines(keepends=True)[0], LORA, "TOO_FEW_SAMPLES, field line 1"),
    "a line that is no JSON": (DATA + b'{"prompt": \n', LORA, "LINE_NOT_JSON, field line 5"),
    "a line of another shape": (DATA + b'{"text": "a"}\n', LORA, "MIXED_SAMPLE_SHAPES, field line 5"),
    "a target that matches nothing": (
        DATA, (*LORA, "--target", "query"), "UNKNOWN_TARGET, field spec.lora.target_modules[0]",
    ),
    "a rank too large": (DATA, (*LORA, "--rank", "9"), "RANK_TOO_LARGE, field spec.lora.rank"),
    "shares of nothing": (
        DATA, (*S2FT, "--o-share", "0", "--down-share", "0"), "SELECTS_NOTHING, field spec.s2ft",
    ),
    "a share of more than all": (DATA, (*S2FT, "--o-share", "1.5"), "OUT_OF_RANGE, field spec.s2ft.o_share"),
    "apart from what is not there": (
        DATA, (*S2FT, "--disjoint-from", "nobody"), "ADAPTER_NOT_FOUND, field spec.s2ft.disjoint_from[0]",
    ),
    "samples longer than the context": (DATA, (*LORA, "--max-length", "1000"), "OUT_OF_RANGE, field spec.max_length"),
}  # fmt: skip


async def submit(shell: Shell, data: Path, *flags: str) -> Result:
    """Run the command as who has this data."""
    command = ["train", "submit", str(data), "--adapter", "mine", "--server", f"127.0.0.1:{shell.port}", *flags]
    return await asyncio.to_thread(CliRunner().invoke, app, command)  # the server has this loop


async def jobs_of(shell: Shell) -> list[training_pb2.TrainingJob]:
    return list((await shell.jobs.ListTrainingJobs(training_pb2.ListTrainingJobsRequest())).jobs)


def test_what_cannot_be_trained_is_told_in_a_line_and_not_queued(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            for name, (content, flags, ending) in BAD.items():
                data = tmp_path / "data.jsonl"
                data.write_bytes(content)
                result = await submit(shell, data, *flags)
                assert (result.exit_code, result.stdout) == (1, ""), name
                assert result.stderr.endswith(f"({ending})\n"), name
                assert result.stderr.count("\n") == 1, name
            assert await jobs_of(shell) == []
            result = await submit(shell, data, *LORA)
            assert result.exit_code == 0, result.stderr
            [job] = await jobs_of(shell)
            assert result.stdout == f"{job.id}\n"

    asyncio.run(scenario())


def test_data_for_which_there_is_no_room_is_told_and_taken_once_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        data = tmp_path / "data.jsonl"
        data.write_bytes(DATA)
        async with serving() as shell:
            with monkeypatch.context() as patched:
                patched.setattr(Disk, "write", write_nothing)
                result = await submit(shell, data, *LORA)
            assert (result.exit_code, result.stdout) == (1, "")
            assert result.stderr.endswith("(STORAGE_FULL)\n")
            assert await jobs_of(shell) == []
            assert (await submit(shell, data, *LORA)).exit_code == 0

    def write_nothing(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    asyncio.run(scenario())


def test_a_worker_with_another_base_is_told_both_fingerprints_and_gets_no_job(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            job = await queue(shell)
            command = ("worker", "--base", "tiny", "--work-dir", str(tmp_path), "--server", f"127.0.0.1:{shell.port}")
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "motley_client", *command), stderr=asyncio.subprocess.PIPE
            )
            _, said = await asyncio.wait_for(worker.communicate(), 30)
            last = said.decode().splitlines()[-1]
            assert worker.returncode == 1
            assert last.endswith("(BASE_MISMATCH, field base_fingerprint)")
            assert FINGERPRINT in last
            assert fingerprint(resolve_base("tiny")) in last
            [seen] = await jobs_of(shell)
            assert (seen.id, seen.state) == (job.id, training_pb2.JOB_STATE_QUEUED)

    asyncio.run(scenario())


@pytest.mark.soak
def test_what_only_a_jobs_process_finds_out_is_told_to_who_watches(tmp_path: Path) -> None:
    """A server, a worker and jobs as they are: the command ends with status 5, its last line with the reason."""
    write_dataset(tmp_path / "lines", reversals(40))
    [data] = (tmp_path / "lines").iterdir()
    (tmp_path / "twice.jsonl").write_bytes(DATA.splitlines(keepends=True)[0] * 2)
    usual = "--steps 2 --batch-size 4 --lr 4e-3 --watch"
    failing = {
        f"{data} --method lora --over-length refuse --max-length 16": "SAMPLE_TOO_LONG",
        "twice.jsonl --method lora": "TOO_LITTLE_DATA",
        f"{data} --method s2ft --o-share 0.7 --down-share 0 --disjoint-from half": "NOT_ENOUGH_CHANNELS",
    }

    async def scenario() -> None:
        async with MortalTraining(tmp_path, lease_seconds=30) as house:
            await house.start_server()
            await house.start_worker()
            half = f"motley train submit {data} --adapter half --method s2ft --o-share 0.5 --down-share 0 {usual}"
            assert (await run(half, tmp_path, house.address))[-1].endswith("succeeded")
            for command, reason in failing.items():
                told = await run(
                    f"motley train submit {command} --adapter a {usual}", tmp_path, house.address, status=5
                )
                assert told[-1].endswith(f"({reason})"), told
            assert await house.versions("a") == []

    asyncio.run(scenario())
