"""Training jobs over the wire: queued, shown and ended, and whose they are."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import grpc
import pytest
from adapter_calls import key_of, refused
from job_watching import being_watched, events_of, progress, states
from motley.v1 import tenant_pb2, training_pb2
from motley_server.rpc.training_sizes import least_adapter_bytes
from rpc_harness import Shell, make_base, serving
from training_calls import (
    DATA,
    FINGERPRINT,
    at_work,
    cancel,
    create,
    digest_of,
    get,
    lease,
    let_pass,
    queue,
    register,
    samples,
    send,
    spec_with,
    whole_dataset,
)

Code = grpc.StatusCode
pb = training_pb2
OTHER = samples(seed=1)


def test_a_job_is_queued_as_it_was_asked_for() -> None:
    spec = spec_with(
        lora={"rank": 4, "alpha": 0.1, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        publish={"aliases": ["prod"], "labels": {"team": "search"}},
        gate=pb.Gate(dataset=digest_of(OTHER), max_loss_ratio=0.9),
        optimizer=pb.OptimizerSettings(learning_rate=2e-4),
        epochs=1.5, seed=-7, micro_batch_size=4, quantization="none",
    )  # fmt: skip

    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(OTHER))
            job = await queue(shell, spec)
            assert job.spec == spec
            assert (job.state, job.attempts, job.worker, job.last_sequence) == (pb.JOB_STATE_QUEUED, 0, "", 1)
            assert job.base_fingerprint == FINGERPRINT
            assert job.HasField("create_time")
            for unset in ("start_time", "end_time", "progress", "data", "evaluation", "version"):
                assert not job.HasField(unset)
            assert await get(shell, job.id) == job
            listed = await shell.jobs.ListTrainingJobs(pb.ListTrainingJobsRequest())
            assert list(listed.jobs) == [job]

    asyncio.run(scenario())


def test_a_repeat_queues_nothing_and_another_spec_under_its_id_is_refused() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(DATA))
            job = await create(shell, request_id="once")
            assert (await create(shell, request_id="once")).id == job.id
            refusal = await refused(create(shell, spec_with(seed=1), request_id="once"))
            assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
            ended = await cancel(shell, job.id)
            await shell.jobs.DeleteDataset(pb.DeleteDatasetRequest(digest=digest_of(DATA)))
            assert (await create(shell, request_id="once")).id == job.id
            assert ended.state == pb.JOB_STATE_CANCELLED
            assert (await create_again(shell)).reason == "DATASET_NOT_FOUND"

    async def create_again(shell: Shell) -> Any:
        return await refused(create(shell))

    asyncio.run(scenario())


def test_what_a_spec_names_must_be_the_callers() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            await send(shell, whole_dataset(DATA))
            await send(shell, whole_dataset(OTHER), metadata=theirs)
            gated = spec_with(dataset=digest_of(OTHER), gate=pb.Gate(dataset=digest_of(DATA)))
            absent = digest_of(b"never seen")
            met = []
            for spec, field in (
                (spec_with(), "spec.dataset"),
                (spec_with(dataset=absent), "spec.dataset"),
                (gated, "spec.gate.dataset"),
            ):
                refusal = await refused(create(shell, spec, metadata=theirs))
                assert (refusal.code, refusal.reason, refusal.field) == (Code.NOT_FOUND, "DATASET_NOT_FOUND", field)
                met.append(refusal.message)
            assert len(set(met)) == 1
            s2ft = {"method": pb.TRAINING_METHOD_S2FT, "dataset": digest_of(OTHER)}
            messages = set()
            for name in ("local/rows", "local/nothing"):
                apart = spec_with(**s2ft, s2ft=pb.S2ftSettings(disjoint_from=[name]))
                refusal = await refused(create(shell, apart, metadata=theirs))
                assert (refusal.code, refusal.reason, refusal.field) == (
                    Code.NOT_FOUND, "ADAPTER_NOT_FOUND", "spec.s2ft.disjoint_from[0]",
                )  # fmt: skip
                messages.add(refusal.message.replace(name, "NAME"))
            assert len(messages) == 1
            assert (await shell.training.database.run(shell.training.jobs.list, "acme")).items == ()

    asyncio.run(scenario())


CHAT = b'{"messages": [{"role": "assistant", "content": "a"}]}\n' * 2
TEXT = b'{"text": "a"}\n' * 2


def apart_from(*names: str) -> pb.TrainingSpec:
    return spec_with(method=pb.TRAINING_METHOD_S2FT, s2ft=pb.S2ftSettings(disjoint_from=names))


REFUSED: dict[str, tuple[pb.TrainingSpec, grpc.StatusCode, str, str]] = {
    "a rank too large": (
        spec_with(lora={"rank": 9}), Code.INVALID_ARGUMENT, "RANK_TOO_LARGE", "spec.lora.rank",
    ),
    "no method": (pb.TrainingSpec(), Code.INVALID_ARGUMENT, "METHOD_REQUIRED", "spec.method"),
    "an enum without a name": (
        spec_with(method=99), Code.INVALID_ARGUMENT, "UNKNOWN_ENUM_VALUE", "spec.method",
    ),
    "conversations without a template": (
        spec_with(dataset=digest_of(CHAT)), Code.FAILED_PRECONDITION, "NO_CHAT_TEMPLATE", "spec.dataset",
    ),
    "a gate of conversations": (
        spec_with(gate=pb.Gate(dataset=digest_of(CHAT))), Code.FAILED_PRECONDITION, "NO_CHAT_TEMPLATE",
        "spec.gate.dataset",
    ),
    "matches of plain text": (
        spec_with(dataset=digest_of(TEXT), gate=pb.Gate(min_exact_match=0.5)), Code.INVALID_ARGUMENT, "NO_ANSWERS",
        "spec.gate.min_exact_match",
    ),
    "apart from a LoRA": (
        apart_from("rows", "alpha"), Code.INVALID_ARGUMENT, "KIND_MISMATCH", "spec.s2ft.disjoint_from[1]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_that_cannot_be_done_is_refused_and_not_queued(name: str) -> None:
    spec, code, reason, field = REFUSED[name]

    async def scenario() -> None:
        async with serving(base=replace(make_base(), has_chat_template=False)) as shell:
            for data in (DATA, CHAT, TEXT):
                await send(shell, whole_dataset(data))
            refusal = await refused(create(shell, spec))
            assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
            assert not (await shell.jobs.ListTrainingJobs(pb.ListTrainingJobsRequest())).jobs
            await create(shell, apart_from("rows", "columns@1"))
            await create(
                shell, spec_with(dataset=digest_of(TEXT), gate=pb.Gate(dataset=digest_of(DATA), min_exact_match=1))
            )

    asyncio.run(scenario())


def test_a_quota_of_jobs_counts_those_that_have_not_ended() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            change = tenant_pb2.UpdateTenantRequest(id="acme", quota=tenant_pb2.Quota(training_jobs=2))
            await shell.tenants.UpdateTenant(change)
            first = await queue(shell, metadata=theirs)
            await create(shell, metadata=theirs)
            refusal = await refused(create(shell, metadata=theirs))
            assert (refusal.code, refusal.reason, refusal.field) == (
                Code.RESOURCE_EXHAUSTED, "QUOTA_TRAINING_JOBS", "quota.training_jobs",
            )  # fmt: skip
            await cancel(shell, first.id, metadata=theirs)
            await create(shell, metadata=theirs)

    asyncio.run(scenario())


def test_an_adapter_that_will_not_fit_the_quota_is_refused_before_it_is_trained() -> None:
    least = least_adapter_bytes(spec_with(), make_base())

    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            await send(shell, whole_dataset(DATA), metadata=theirs)
            for limit, fits in ((least - 1, False), (least, True)):
                change = tenant_pb2.UpdateTenantRequest(id="acme", quota=tenant_pb2.Quota(adapter_bytes=limit))
                await shell.tenants.UpdateTenant(change)
                if fits:
                    await create(shell, metadata=theirs)
                    continue
                refusal = await refused(create(shell, metadata=theirs))
                assert (refusal.code, refusal.reason, refusal.field) == (
                    Code.RESOURCE_EXHAUSTED, "QUOTA_ADAPTER_BYTES", "quota.adapter_bytes",
                )  # fmt: skip

    asyncio.run(scenario())


def test_another_tenants_job_is_met_in_the_words_for_what_is_not_there() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            job = await queue(shell)
            absent = "job-0123456789abcdef"
            for call in (get, cancel, events_of):
                met = [await refused(call(shell, id, metadata=theirs)) for id in (job.id, absent, "", "../x")]
                assert {(one.code, one.reason, one.field) for one in met} == {(Code.NOT_FOUND, "JOB_NOT_FOUND", "id")}
                assert met[0].message.replace(job.id, "ID") == met[1].message.replace(absent, "ID")
            assert not (await shell.jobs.ListTrainingJobs(pb.ListTrainingJobsRequest(), metadata=theirs)).jobs
            assert (await get(shell, job.id)).state == pb.JOB_STATE_QUEUED

    asyncio.run(scenario())


def test_jobs_come_by_pages_and_by_state_the_newest_first() -> None:
    async def listed(shell: Shell, state: Any = 0) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            request = pb.ListTrainingJobsRequest(page_size=2, page_token=token, state=state)
            page = await shell.jobs.ListTrainingJobs(request)
            found += [one.id for one in page.jobs]
            if not (token := page.next_page_token):
                return found

    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(DATA))
            made = [(await create(shell, spec_with(seed=seed))).id for seed in range(5)]
            await cancel(shell, made[1])
            assert await listed(shell) == made[::-1]
            assert await listed(shell, pb.JOB_STATE_CANCELLED) == [made[1]]
            assert await listed(shell, pb.JOB_STATE_QUEUED) == [made[4], made[3], made[2], made[0]]
            assert await listed(shell, pb.JOB_STATE_RUNNING) == []

    asyncio.run(scenario())


def test_a_queued_job_is_cancelled_at_once() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            job = await queue(shell)
            async with being_watched(shell, job.id) as seen:
                ended = await cancel(shell, job.id, request_id="once")
            assert (ended.state, ended.HasField("end_time")) == (pb.JOB_STATE_CANCELLED, True)
            assert states(seen) == ["JOB_STATE_QUEUED", "JOB_STATE_CANCELLED"]
            assert await cancel(shell, job.id, request_id="once") == ended
            refusal = await refused(cancel(shell, job.id))
            assert (refusal.code, refusal.reason, refusal.field) == (Code.FAILED_PRECONDITION, "JOB_ENDED", "id")
            assert shell.count("motley_training_jobs_ended_total", method="lora", state="cancelled") == 1
            await register(shell)
            assert await lease(shell) is None

    asyncio.run(scenario())


def test_a_running_job_is_told_to_its_worker_to_end_and_ends_by_its_report() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            assert not (await work.report(progress(1))).cancel_requested
            asked = await cancel(shell, work.held.job.id)
            assert (asked.state, asked.cancel_requested) == (pb.JOB_STATE_RUNNING, True)
            async with being_watched(shell, asked.id, asked.last_sequence) as seen:
                assert (await work.report(num_reported=1)).cancel_requested
                await work.report(pb.JobEvent(checkpoint_step=7), num_reported=1)
                await work.end(pb.JOB_STATE_CANCELLED)
            assert [one.WhichOneof("event") for one in seen] == ["checkpoint_step", "state_change"]
            assert (await get(shell, asked.id)).state == pb.JOB_STATE_CANCELLED
            assert shell.count("motley_training_jobs_ended_total", method="lora", state="cancelled") == 1

    asyncio.run(scenario())


def test_capabilities_tell_who_is_there_and_what_waits() -> None:
    async def told(shell: Shell) -> pb.GetTrainingCapabilitiesResponse:
        return await shell.jobs.GetTrainingCapabilities(pb.GetTrainingCapabilitiesRequest())

    async def scenario() -> None:
        async with serving() as shell:
            alone = await told(shell)
            assert list(alone.methods) == pb.TrainingMethod.values()[1:]
            assert (alone.max_dataset_bytes, alone.max_datasets, len(alone.workers)) == (3 << 20, 1000, 0)
            await at_work(shell)
            await create(shell)
            await register(shell, "worker-2")
            busy = await told(shell)
            assert [(one.name, one.is_busy, one.device) for one in busy.workers] == [
                ("worker-1", True, "cpu"), ("worker-2", False, "cpu"),
            ]  # fmt: skip
            assert (busy.queued_jobs, busy.running_jobs) == (1, 1)
            await shell.training.keeper.count()
            assert shell.count("motley_training_jobs", state="queued") == 1
            assert shell.count("motley_training_jobs", state="running") == 1
            assert shell.count("motley_training_workers") == 2
            let_pass(shell, 61)
            assert not (await told(shell)).workers

    asyncio.run(scenario())


def test_a_server_that_trains_nothing_says_so_to_those_who_may_ask() -> None:
    async def scenario() -> None:
        async with serving(trains=False) as shell:
            user = await key_of(shell, "acme", tenant_pb2.ROLE_USER)
            for call in (
                send(shell, whole_dataset(DATA)), create(shell), events_of(shell, "job-1"), register(shell),
                lease(shell),
            ):  # fmt: skip
                refusal = await refused(call)
                assert (refusal.code, refusal.reason) == (Code.UNIMPLEMENTED, "NO_TRAINING")
            assert (await refused(create(shell, metadata=user))).code is Code.PERMISSION_DENIED
            token = (("authorization", f"Bearer mj_0123456789abcdef_{'x' * 43}"),)
            assert (await refused(get(shell, "job-1", metadata=token))).reason == "LEASE_ENDED"

    asyncio.run(scenario())


def test_what_is_done_to_jobs_is_written_down(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> str:
        async with serving() as shell:
            work = await at_work(shell)
            await refused(create(shell, spec_with(dataset=digest_of(OTHER))))
            await cancel(shell, work.held.job.id)
            await work.end(pb.JOB_STATE_CANCELLED)
            return work.held.job.id

    with caplog.at_level("INFO", "motley.audit"):
        id = asyncio.run(scenario())
    lines = [json.loads(one.message) for one in caplog.records if one.name == "motley.audit"]
    told = [(one["method"].rpartition("/")[2], one["key"], one["code"], one["object"]) for one in lines]
    named = {"adapter_name": "trained", "dataset": digest_of(DATA)}
    assert told[1:] == [
        ("CreateTrainingJob", "", "OK", named | {"job": id}),
        ("RegisterWorker", "", "OK", {"name": "worker-1"}),
        ("LeaseJob", "", "OK", {"job": id, "tenant_id": "local", "adapter_name": "trained", "worker": "worker-1"}),
        ("CreateTrainingJob", "", "NOT_FOUND", named | {"dataset": digest_of(OTHER)}),
        ("CancelTrainingJob", "", "OK", {"id": id}),
        ("ReportJob", id, "OK", {
            "job": id, "tenant_id": "local", "adapter_name": "trained", "worker": "worker-1", "state": "cancelled",
        }),
    ]  # fmt: skip
    assert "mj_" not in caplog.text
