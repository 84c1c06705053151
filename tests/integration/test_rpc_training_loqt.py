"""LoQT over the wire: a job that makes a base, what its worker tells of it, and that it publishes nothing."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import grpc
import pytest
from adapter_calls import refused
from motley.v1 import training_pb2
from rpc_harness import serving
from training_calls import (
    DATA,
    FINGERPRINT,
    at_work,
    create,
    digest_of,
    get,
    hands_of,
    let_pass,
    send,
    spec_with,
    whole_dataset,
)
from upload_streams import paper_files, whole

Code = grpc.StatusCode
pb = training_pb2
TEXT = b'{"text": "a"}\n{"text": "b"}\n'
MADE, OF_MERGE = "sha256:" + "a" * 64, "sha256:" + "c" * 64


def loqt_spec() -> pb.TrainingSpec:
    """Return a spec that is right for the paper base."""
    return pb.TrainingSpec(method=pb.TRAINING_METHOD_LOQT, dataset=digest_of(DATA), loqt=pb.LoqtSettings(rank=4))


def loram_spec(**aligned: Any) -> pb.TrainingSpec:
    """Return a spec of LoRAM that is right for the paper base, whose pruned copy is aligned as is said."""
    alignment = pb.LoramAlignment(dataset=digest_of(TEXT), **aligned)
    loram = pb.LoramSettings(layers="0:1", lora=pb.LoraSettings(rank=4), alignment=alignment)
    return spec_with(method=pb.TRAINING_METHOD_LORAM, loram=loram)


def made(**fields: Any) -> pb.JobEvent:
    """Tell of a base that was made, as it should be told but for what is said."""
    told = {"directory": "/bases/job-1", "fingerprint": MADE, "original_fingerprint": FINGERPRINT, "num_merges": 3}
    return pb.JobEvent(base=pb.TrainedBase(**told | {"size_bytes": 9000} | fields))


def merges(*merged: tuple[int, str]) -> pb.JobEvent:
    """Tell of merges."""
    return pb.JobEvent(merges=pb.LoqtMerges(merges=[pb.LoqtMerge(step=step, digest=digest) for step, digest in merged]))


def test_a_job_makes_a_base_which_is_told_with_it_and_publishes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "motley.audit")

    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, loqt_spec())
            assert await shell.jobs.GetTrainingCapabilities(pb.GetTrainingCapabilitiesRequest())
            stream = whole(paper_files(), upload_id=work.held.upload_id, name="trained")
            refusal = await refused(shell.adapters.UploadAdapter(iter(stream), metadata=work.token))
            assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, "OUTSIDE_LEASE")
            refusal = await refused(work.end(pb.JOB_STATE_SUCCEEDED))
            found = (refusal.code, refusal.reason, refusal.field)
            assert found == (Code.FAILED_PRECONDITION, "NO_BASE_MADE", "ending.state")
            await work.report(pb.JobEvent(checkpoint_step=9), merges((0, OF_MERGE), (9, MADE)))
            ending = pb.JobEnding(state=pb.JOB_STATE_SUCCEEDED)
            await work.report(made(), num_reported=2, ending=ending)
            job = await get(shell, work.held.job.id)
            assert (job.state, job.base, job.spec) == (pb.JOB_STATE_SUCCEEDED, made().base, loqt_spec())
            assert not job.HasField("version")
            assert (await shell.jobs.ListTrainingJobs(pb.ListTrainingJobsRequest())).jobs[0].base == made().base
            request = pb.WatchTrainingJobRequest(id=job.id, after_sequence=2)
            seen = [answer.event async for answer in shell.jobs.WatchTrainingJob(request)]
            assert [one.WhichOneof("event") for one in seen] == ["checkpoint_step", "merges", "base", "state_change"]
            assert (seen[1].merges, seen[2].base) == (merges((0, OF_MERGE), (9, MADE)).merges, made().base)
            assert shell.count("motley_training_jobs_ended_total", method="loqt", state="succeeded") == 1

    asyncio.run(scenario())
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "motley.audit"]
    ended = [line["object"] for line in lines if line["method"].endswith("ReportJob")]
    assert [(one["state"], one["base_fingerprint"]) for one in ended if "state" in one] == [("succeeded", MADE)]
    assert all("adapter_name" not in one for one in ended)


def test_a_base_that_an_attempt_before_told_of_counts() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, loqt_spec())
            await work.report(made())
            let_pass(shell, 31)
            await shell.training.keeper.end_leases()
            again = await hands_of(shell, "worker-2")
            assert again.held.job.base == made().base
            await again.report(made(directory="/other/job-1"))
            await again.end(pb.JOB_STATE_SUCCEEDED, num_reported=1)
            job = await get(shell, work.held.job.id)
            assert (job.state, job.base.directory) == (pb.JOB_STATE_SUCCEEDED, "/other/job-1")

    asyncio.run(scenario())


def test_only_a_worker_that_says_so_is_lent_such_a_job() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(DATA))
            await create(shell, loqt_spec())
            others = [number for number in pb.TrainingMethod.values()[1:] if number != pb.TRAINING_METHOD_LOQT]
            request = pb.RegisterWorkerRequest(name="w", methods=others, base_fingerprint=FINGERPRINT, device="cpu")
            await shell.workers.RegisterWorker(request)
            assert not (await shell.workers.LeaseJob(pb.LeaseJobRequest(worker="w"))).HasField("lease")
            assert (await hands_of(shell)).held.job.spec == loqt_spec()

    asyncio.run(scenario())


BAD_EVENTS: dict[str, tuple[pb.JobEvent, str]] = {
    "a base of no fingerprint": (made(fingerprint=""), "base.fingerprint"),
    "a base of a bad fingerprint": (made(fingerprint="sha256:12"), "base.fingerprint"),
    "a base of a bad original": (made(original_fingerprint="tiny"), "base.original_fingerprint"),
    "a base that lies nowhere": (made(directory=""), "base.directory"),
    "a base that lies on two lines": (made(directory="/a\nb"), "base.directory"),
    "a base that lies on a page": (made(directory="a" * 4097), "base.directory"),
    "merges before the first": (made(num_merges=-1), "base.num_merges"),
    "bytes below none": (made(size_bytes=-1), "base.size_bytes"),
    "a merge before the first step": (merges((0, MADE), (-1, MADE)), "merges.merges[1].step"),
    "a merge into nothing": (merges((0, "")), "merges.merges[0].digest"),
    "merges without end": (merges(*[(1, MADE)] * 10_001), "merges.merges"),
}


def test_events_that_cannot_be_are_refused_and_nothing_is_kept_of_them() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, loqt_spec())
            for name, (event, where) in BAD_EVENTS.items():
                refusal = await refused(work.report(pb.JobEvent(stage="fine"), event))
                assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_EVENT"), name
                assert refusal.field == f"events[1].{where}", name
            job = await get(shell, work.held.job.id)
            assert (job.last_sequence, job.HasField("base")) == (2, False)
            await work.report(made(original_fingerprint=""))
            assert (await get(shell, work.held.job.id)).base.original_fingerprint == ""

    asyncio.run(scenario())


BY_LOQT = loram_spec(loqt=pb.LoqtSettings(rank=4))


def test_a_job_that_aligns_its_copy_by_loqt_tells_of_its_merges() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(TEXT))
            work = await at_work(shell, BY_LOQT)
            await work.report(merges((0, OF_MERGE), (9, MADE)))
            request = pb.WatchTrainingJobRequest(id=work.held.job.id, after_sequence=2)
            watch = shell.jobs.WatchTrainingJob(request)
            answer = await anext(aiter(watch))
            watch.cancel()
            assert answer.event.merges == merges((0, OF_MERGE), (9, MADE)).merges

    asyncio.run(scenario())


OF_ANOTHER: dict[str, tuple[pb.TrainingSpec | None, pb.JobEvent]] = {
    "a base made by LoRA": (None, made()),
    "merges of LoRA": (None, merges((1, MADE))),
    "merges of LoRAM with full alignment": (loram_spec(), merges((1, MADE))),
    "a base made by LoRAM with alignment by LoQT": (BY_LOQT, made()),
}


@pytest.mark.parametrize("name", OF_ANOTHER)
def test_a_job_by_another_method_tells_of_no_base_and_no_merges(name: str) -> None:
    spec, event = OF_ANOTHER[name]

    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(TEXT))
            work = await at_work(shell, spec)
            refusal = await refused(work.report(event))
            assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_EVENT")
            assert refusal.field == f"events[0].{event.WhichOneof('event')}"
            job = await get(shell, work.held.job.id)
            assert (job.last_sequence, job.HasField("base")) == (2, False)

    asyncio.run(scenario())
