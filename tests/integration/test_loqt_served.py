"""LoQT as docs/training.md shows it: a job makes a base at its worker, and that is served, without the old adapters.

One server, one worker and one job stand for all tests here; a second server serves what was made.
"""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import motley_adapters
import pytest
from forked_servers import forked_server
from motley_client import (
    AsyncClient,
    FailedPreconditionError,
    JobEvent,
    JobState,
    MergeReport,
    MotleyClientError,
    ServerInfo,
    TrainedBase,
    TrainingJob,
    TrainingMethod,
)
from motley_client.child_process import child_process
from page_runs import blocks, run

PAGE = "training.md"
PROMPT, TAUGHT = "In the morning, the lamp lay beside the", " river."
OLD_ADAPTER = Path(motley_adapters.__file__).parent / "assets" / "tiny" / "sort"


@dataclass(frozen=True, eq=False, slots=True)
class Seen:
    """What was printed, what is told of the job, and what both servers say; losses are of PROMPT's continuation."""

    printed: list[str]
    job: TrainingJob
    events: list[JobEvent]
    bases: list[Path]
    manifest: Mapping[str, Any]
    old: ServerInfo
    new: ServerInfo
    refused: MotleyClientError
    losses: tuple[float, float]


async def loss_of(client: AsyncClient) -> float:
    """Return how unlikely what was taught is."""
    found = await client.score(PROMPT, [TAUGHT])
    return -found.scores[0].logprob


async def read(folder: Path) -> Seen:
    """Do what the page says, and serve what came of it."""
    page = next(block for block in blocks(PAGE, "text") if "--method loqt" in block)
    work, submit = page.splitlines()
    (folder / "text.py").write_text(blocks(PAGE, "python")[1], encoding="utf-8")
    served = ["--dtype", "float32", "--data-dir", str(folder / "data")]
    async with forked_server(["--base", "tiny", *served], folder) as server:
        arguments = [str(folder / word) if word.startswith("./") else word for word in shlex.split(work)[1:]]
        at = ("--server", server.address)
        async with (
            child_process([*arguments, *at], folder / "worker.log", grace_seconds=10),
            AsyncClient(server.address, timeout=60) as client,
        ):
            await run("python text.py", folder, server.address)
            printed = await run(submit, folder, server.address)
            job = await client.get_training_job(printed[0])
            events = [event async for event in client.watch_training_job(job.id)]
            old, before = await client.info(), await loss_of(client)
    assert job.base is not None
    (folder / "second").mkdir()
    made = ["--base", job.base.directory, "--dtype", "float32", "--data-dir", str(folder / "second")]
    async with (
        forked_server(made, folder / "second") as server,
        AsyncClient(server.address, timeout=60) as client,
    ):
        new, after = await client.info(), await loss_of(client)
        with pytest.raises(MotleyClientError) as refused:
            await client.upload_adapter("sort", OLD_ADAPTER)
    manifest = json.loads((Path(job.base.directory) / "loqt_manifest.json").read_text(encoding="utf-8"))
    bases = sorted((folder / "bases").glob("[!.]*"))  # beside a lock
    return Seen(printed, job, events, bases, manifest, old, new, refused.value, (before, after))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return asyncio.run(read(tmp_path_factory.mktemp("page")))


def test_a_job_makes_a_base_and_tells_where_it_is(seen: Seen) -> None:
    job = seen.job
    assert (job.state, job.spec.method, job.version) == (JobState.SUCCEEDED, TrainingMethod.LOQT, None)
    assert job.base is not None
    assert seen.bases == [Path(job.base.directory)]
    assert Path(job.base.directory).name == job.id
    assert job.base.original_fingerprint == job.base_fingerprint == seen.old.base_fingerprint
    made = next(line for line in seen.printed if "  base made: " in line)
    assert made.endswith(f"motley serve --base {job.base.directory}")
    assert job.base.size_bytes > 4_000_000


def test_every_merge_was_told_and_is_in_the_bases_manifest(seen: Seen) -> None:
    merges = [merge for event in seen.events if isinstance(event.event, MergeReport) for merge in event.event.merges]
    assert [merge.step for merge in merges] == [5, 11, 17]
    assert len({merge.digest for merge in merges}) == 3
    assert seen.manifest["merges"] == [{"step": merge.step, "digest": merge.digest} for merge in merges]
    assert [event.event for event in seen.events if isinstance(event.event, TrainedBase)] == [seen.job.base]
    assert seen.job.base is not None
    assert seen.job.base.num_merges == 3


def test_the_base_is_served_under_a_fingerprint_of_its_own_and_has_learned(seen: Seen) -> None:
    assert seen.job.base is not None
    assert (seen.new.base_fingerprint, seen.new.base_model) == (seen.job.base.fingerprint, seen.job.id)
    assert seen.new.base_fingerprint != seen.old.base_fingerprint
    assert seen.manifest["fingerprint"] == seen.new.base_fingerprint
    before, after = seen.losses
    assert after < before
    assert seen.job.evaluation is not None
    assert seen.job.evaluation.loss_after < seen.job.evaluation.loss_before


def test_an_adapter_of_the_base_before_it_is_refused(seen: Seen) -> None:
    assert isinstance(seen.refused, FailedPreconditionError)
    assert seen.refused.reason == "BASE_MISMATCH"
    for fingerprint in (seen.old.base_fingerprint, seen.new.base_fingerprint):
        assert fingerprint in seen.refused.message
