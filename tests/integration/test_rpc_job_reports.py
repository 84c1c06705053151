"""What workers report of jobs over the wire: what is taken, and once, how a job ends, and what it publishes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import Any

import grpc
from adapter_calls import key_of, refused
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from motley.v1 import adapter_pb2, tenant_pb2, training_pb2
from rpc_harness import serving
from training_calls import (
    at_work,
    cancel,
    get,
    hands_of,
    let_pass,
    queue,
    spec_with,
)
from upload_streams import paper_files, whole

Code = grpc.StatusCode
pb = training_pb2


async def met(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    refusal = await refused(call)
    return refusal.code, refusal.reason


def test_a_job_publishes_its_adapter_as_its_spec_says() -> None:
    spec = spec_with(publish={"aliases": ["prod", "canary"], "labels": {"team": "search"}})

    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, spec)
            assert await met(work.end(pb.JOB_STATE_SUCCEEDED)) == (Code.FAILED_PRECONDITION, "NOT_PUBLISHED")
            made = await work.publish()
            assert (made.name, made.version, made.created_by) == ("trained", 1, work.held.job.id)
            assert dict(made.labels) == {"team": "search", "motley.job": work.held.job.id}
            assert await work.publish(aliases=["canary"], labels={"team": "search"}) == made
            found = await shell.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="trained@prod"))
            assert {(one.name, one.version) for one in found.adapter.aliases} == {("prod", 1), ("canary", 1)}
            await work.end(pb.JOB_STATE_SUCCEEDED)
            job = await get(shell, work.held.job.id)
            assert (job.state, job.version.version, job.version.digest) == (pb.JOB_STATE_SUCCEEDED, 1, made.digest)
            assert dict(job.version.labels) == dict(made.labels)
            assert shell.count("motley_training_jobs_ended_total", method="lora", state="succeeded") == 1

    asyncio.run(scenario())


def test_what_another_publishes_is_no_success_of_the_jobs() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            theirs = whole(paper_files(seed=5), name="trained", labels={"motley.job": work.held.job.id})
            await shell.adapters.UploadAdapter(iter(theirs))
            assert await met(work.end(pb.JOB_STATE_SUCCEEDED)) == (Code.FAILED_PRECONDITION, "NOT_PUBLISHED")
            made = await work.publish()
            found = await shell.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="trained"))
            assert (made.version, found.version.version) == (2, 2)

    asyncio.run(scenario())


def test_reports_keep_a_lease() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            for _ in range(3):
                let_pass(shell, 20)
                answer = await work.report()
                await shell.training.keeper.end_leases()
            assert answer.expire_time.ToDatetime() > work.held.expire_time.ToDatetime()
            assert (await get(shell, work.held.job.id)).state == pb.JOB_STATE_RUNNING

    asyncio.run(scenario())


def test_what_a_worker_does_counts_against_no_quota_of_requests() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            await queue(shell, metadata=theirs)
            quota = tenant_pb2.Quota(requests_per_minute=1)
            await shell.tenants.UpdateTenant(tenant_pb2.UpdateTenantRequest(id="acme", quota=quota))
            work = await hands_of(shell)
            for _ in range(3):
                await work.report()
                await work.fetch()
            await work.publish()
            shell.registry.quotas.forget("acme")
            job = await get(shell, work.held.job.id, metadata=theirs)
            assert (await refused(get(shell, job.id, metadata=theirs))).reason == "QUOTA_REQUESTS_PER_MINUTE"

    asyncio.run(scenario())


def event(**fields: Any) -> pb.ReportJobRequest:
    return pb.ReportJobRequest(events=[pb.JobEvent(stage="fine"), pb.JobEvent(**fields)])


BAD_REPORTS: dict[str, tuple[pb.ReportJobRequest, str, str]] = {
    "nothing": (event(), "INVALID_EVENT", "events[1]"),
    "a number of its own": (event(sequence=3, stage="a"), "INVALID_EVENT", "events[1]"),
    "a time of its own": (event(time=Timestamp(seconds=1), stage="a"), "INVALID_EVENT", "events[1]"),
    "a state": (
        event(state_change=pb.StateChange(state=pb.JOB_STATE_SUCCEEDED)), "INVALID_EVENT", "events[1].state_change",
    ),
    "a publication": (
        event(published=adapter_pb2.AdapterVersion(name="a")), "INVALID_EVENT", "events[1].published",
    ),
    "a step before the first": (
        event(progress=pb.TrainingProgress(step=-1)), "INVALID_EVENT", "events[1].progress.step",
    ),
    "memory less than none": (
        event(progress=pb.TrainingProgress(memory_bytes=-1)), "INVALID_EVENT", "events[1].progress.memory_bytes",
    ),
    "a negative rest": (
        event(progress=pb.TrainingProgress(remaining=Duration(seconds=-1))), "INVALID_EVENT",
        "events[1].progress.remaining",
    ),
    "a rest that is no time": (
        event(progress=pb.TrainingProgress(remaining=Duration(nanos=2**31 - 1))), "INVALID_EVENT",
        "events[1].progress.remaining",
    ),
    "fewer samples than none": (
        event(data=pb.DataReport(num_dropped=-1)), "INVALID_EVENT", "events[1].data.num_dropped",
    ),
    "a measure of less than none": (
        event(evaluation=pb.Evaluation(num_samples=-1)), "INVALID_EVENT", "events[1].evaluation.num_samples",
    ),
    "a checkpoint before the first": (event(checkpoint_step=-1), "INVALID_EVENT", "events[1].checkpoint_step"),
    "a stage of lines": (event(stage="a\nb"), "INVALID_EVENT", "events[1].stage"),
    "a stage of pages": (event(stage="a" * 201), "INVALID_EVENT", "events[1].stage"),
    "a thousand and one": (
        pb.ReportJobRequest(events=[pb.JobEvent(stage="a")] * 1001), "OUT_OF_RANGE", "events",
    ),
    "more told than there was": (pb.ReportJobRequest(num_reported=1), "OUT_OF_RANGE", "num_reported"),
    "an end in work": (
        pb.ReportJobRequest(ending=pb.JobEnding(state=pb.JOB_STATE_RUNNING)), "INVALID_ENDING", "ending.state",
    ),
    "an end in nothing": (pb.ReportJobRequest(ending=pb.JobEnding()), "INVALID_ENDING", "ending.state"),
    "a reason in words": (
        pb.ReportJobRequest(ending=pb.JobEnding(state=pb.JOB_STATE_FAILED, reason="it broke")), "INVALID_ENDING",
        "ending.reason",
    ),
}  # fmt: skip


def test_a_bad_report_is_refused_and_changes_nothing() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            for name, (request, reason, field) in BAD_REPORTS.items():
                refusal = await refused(shell.workers.ReportJob(request, metadata=work.token))
                assert (refusal.code, refusal.reason, refusal.field) == (Code.INVALID_ARGUMENT, reason, field), name
            job = await get(shell, work.held.job.id)
            assert (job.state, job.last_sequence) == (pb.JOB_STATE_RUNNING, 2)

    asyncio.run(scenario())


def test_a_report_that_is_sent_again_is_taken_once() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            first = [pb.JobEvent(checkpoint_step=step) for step in (1, 2)]
            await work.report(*first)
            await work.report(*first, pb.JobEvent(checkpoint_step=3))
            await work.report(pb.JobEvent(checkpoint_step=4), num_reported=3)
            request = pb.WatchTrainingJobRequest(id=work.held.job.id, after_sequence=2)
            await work.end(pb.JOB_STATE_FAILED)
            seen = [one.event.checkpoint_step async for one in shell.jobs.WatchTrainingJob(request)]
            assert seen == [1, 2, 3, 4, 0]

    asyncio.run(scenario())


def test_a_loss_that_is_no_number_is_told_as_it_is() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            await work.report(pb.JobEvent(progress=pb.TrainingProgress(step=3, loss=math.nan, gradient_norm=math.inf)))
            job = await get(shell, work.held.job.id)
            assert math.isnan(job.progress.loss)
            assert job.progress.gradient_norm == math.inf

    asyncio.run(scenario())


def test_a_job_that_five_workers_lost_fails() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await queue(shell)
            for attempt in range(5):
                work = await hands_of(shell, f"worker-{attempt}")
                let_pass(shell, 31)
                await shell.training.keeper.end_leases()
            job = await get(shell, work.held.job.id)
            assert (job.state, job.reason, job.attempts) == (pb.JOB_STATE_FAILED, "TOO_MANY_ATTEMPTS", 5)
            assert shell.count("motley_training_jobs_ended_total", method="lora", state="failed") == 1

    asyncio.run(scenario())


def test_a_job_given_back_after_its_cancellation_is_cancelled_and_counted() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            await cancel(shell, work.held.job.id)
            await work.end(pb.JOB_STATE_QUEUED)
            assert (await get(shell, work.held.job.id)).state == pb.JOB_STATE_CANCELLED
            assert shell.count("motley_training_jobs_ended_total", method="lora", state="cancelled") == 1

    asyncio.run(scenario())
