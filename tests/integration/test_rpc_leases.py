"""What the token of a lease is good for over the wire: one job's data, adapter and reports, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from adapter_calls import committed, key_of, read_all, refused
from motley.v1 import adapter_pb2, server_pb2, tenant_pb2, training_pb2
from rpc_harness import Shell, serving
from training_calls import (
    DATA,
    FINGERPRINT,
    Hands,
    at_work,
    bearing,
    cancel,
    create,
    digest_of,
    get,
    hands_of,
    lease,
    queue,
    register,
    samples,
    send,
    spec_with,
    whole_dataset,
    worker_key,
)
from upload_streams import paper_files, whole

Code = grpc.StatusCode
pb = training_pb2
OTHER = samples(seed=1)
Outside = (Code.PERMISSION_DENIED, "OUTSIDE_LEASE")
Ended = (Code.UNAUTHENTICATED, "LEASE_ENDED")


async def met(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    refusal = await refused(call)
    return refusal.code, refusal.reason


def test_a_worker_fetches_the_data_of_its_job_from_any_offset() -> None:
    data = samples(45_000)  # more than two megabytes

    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(data))
            await send(shell, whole_dataset(OTHER))
            await create(shell, spec_with(dataset=digest_of(data), gate=pb.Gate(dataset=digest_of(OTHER))))
            work = await hands_of(shell)
            request = pb.FetchDatasetRequest(digest=digest_of(data))
            sizes = [len(part.data) async for part in shell.workers.FetchDataset(request, metadata=work.token)]
            assert sizes == [1 << 20, 1 << 20, len(data) - (2 << 20)]
            for offset in (0, 1, 1_500_000, len(data) - 1, len(data)):
                assert await work.fetch(digest_of(data), offset) == data[offset:]
            assert await work.fetch(digest_of(OTHER)) == OTHER
            for offset, code, reason in (
                (len(data) + 1, Code.OUT_OF_RANGE, "PAST_END"), (-1, Code.INVALID_ARGUMENT, "OUT_OF_RANGE"),
            ):  # fmt: skip
                refusal = await refused(work.fetch(digest_of(data), offset))
                assert (refusal.code, refusal.reason, refusal.field) == (code, reason, "offset")

    asyncio.run(scenario())


def test_a_worker_fetches_no_other_data() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await send(shell, whole_dataset(OTHER))
            theirs = await key_of(shell, "acme")
            secret = samples(seed=9)
            await send(shell, whole_dataset(secret), metadata=theirs)
            work = await at_work(shell)
            texts = set()
            for digest in (digest_of(OTHER), digest_of(secret), digest_of(b"never seen"), ""):
                refusal = await refused(work.fetch(digest))
                assert (refusal.code, refusal.reason, refusal.field) == (Code.NOT_FOUND, "DATASET_NOT_FOUND", "digest")
                texts.add(refusal.message)
            assert len(texts) == 1

    asyncio.run(scenario())


Call = Callable[[Shell, Hands], Awaitable[object]]


def uploading(**fields: Any) -> Call:
    def call(shell: Shell, work: Hands) -> Awaitable[object]:
        said = {"upload_id": work.held.upload_id, "name": "trained"} | fields
        return shell.adapters.UploadAdapter(iter(whole(paper_files(), **said)), metadata=work.token)

    return call


def reading(name: str) -> Call:
    def call(shell: Shell, work: Hands) -> Awaitable[object]:
        return read_all(shell.adapters.DownloadAdapter(download_of(name), metadata=work.token))

    return call


def download_of(name: str) -> adapter_pb2.DownloadAdapterRequest:
    return adapter_pb2.DownloadAdapterRequest(name=name)


OUTSIDE: dict[str, tuple[Call, str]] = {
    "another name": (uploading(name="zeta"), "header.adapter_name"),
    "another tenant's name": (uploading(name="other/trained"), "header.adapter_name"),
    "everybody's name": (uploading(name="public/trained"), "header.adapter_name"),
    "another upload": (uploading(upload_id="up-1"), "header.upload_id"),
    "another alias": (uploading(aliases=["default", "prod"]), "header.aliases[1]"),
    "another label": (uploading(labels={"team": "theirs"}), "header.labels"),
    "another job's label": (uploading(labels={"motley.job": "job-0"}), "header.labels"),
    "how far another upload is": (
        lambda shell, work: committed(shell, "up-1", metadata=work.token), "upload_id",
    ),
    "an end of another upload": (
        lambda shell, work: shell.adapters.AbortUpload(
            adapter_pb2.AbortUploadRequest(upload_id="up-1"), metadata=work.token
        ),
        "upload_id",
    ),
    "the bytes of an adapter of the tenant's": (reading("zeta"), "name"),
    "an adapter by another of its names": (reading("rows@1"), "name"),
}  # fmt: skip


def test_a_lease_is_for_one_adapter_one_upload_and_its_own_reading() -> None:
    apart = spec_with(method=pb.TRAINING_METHOD_S2FT, s2ft=pb.S2ftSettings(disjoint_from=["rows"]))

    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, apart)
            for name, (call, field) in OUTSIDE.items():
                refusal = await refused(call(shell, work))
                assert (refusal.code, refusal.reason, refusal.field) == (*Outside, field), name
            assert shell.library.registry.adapters.newest("local", "trained") is None
            assert shell.library.registry.uploads.store_ids() == set()

    asyncio.run(scenario())


def test_a_lease_opens_few_methods_and_no_role_opens_those_of_leases() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            generate = shell.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(), metadata=work.token)
            for call in (
                generate,
                shell.jobs.GetTrainingJob(pb.GetTrainingJobRequest(id=work.held.job.id), metadata=work.token),
                cancel(shell, work.held.job.id, metadata=work.token),
                shell.tenants.ListTenants(tenant_pb2.ListTenantsRequest(), metadata=work.token),
                register(shell, metadata=work.token),
                lease(shell, metadata=work.token),
                shell.server.Drain(server_pb2.DrainRequest(), metadata=work.token),
            ):
                assert await met(call) == Outside
            info = await shell.server.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=work.token)
            assert info.base_fingerprint == FINGERPRINT
            for call in (
                shell.workers.ReportJob(pb.ReportJobRequest()),
                read_all(shell.workers.FetchDataset(pb.FetchDatasetRequest(digest=digest_of(DATA)))),
            ):
                assert await met(call) == (Code.PERMISSION_DENIED, "LEASE_REQUIRED")

    asyncio.run(scenario())


def test_a_workers_key_opens_no_tenants_training() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            key = await worker_key(shell)
            job = await queue(shell)
            await register(shell, metadata=key)
            for call in (
                create(shell, metadata=key), get(shell, job.id, metadata=key), cancel(shell, job.id, metadata=key),
                send(shell, whole_dataset(OTHER), metadata=key),
                shell.jobs.ListTrainingJobs(pb.ListTrainingJobsRequest(), metadata=key),
            ):  # fmt: skip
                assert await met(call) == (Code.PERMISSION_DENIED, "WRONG_ROLE")
            held = await lease(shell, metadata=key)
            assert held is not None

    asyncio.run(scenario())


def test_a_worker_reads_adapters_that_its_job_shall_keep_apart_from() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            theirs = await key_of(shell, "acme")
            mine = await push_s2ft(shell, "mine")
            share = adapter_pb2.ShareAdapterRequest(
                name="mine", visibility=adapter_pb2.VISIBILITY_TENANTS, tenants=["acme"]
            )
            await shell.adapters.ShareAdapter(share)
            settings = pb.S2ftSettings(disjoint_from=["local/mine"])
            await send(shell, whole_dataset(DATA), metadata=theirs)
            await create(shell, spec_with(method=pb.TRAINING_METHOD_S2FT, s2ft=settings), metadata=theirs)
            work = await hands_of(shell)
            assert work.held.job.spec.s2ft.disjoint_from == ["local/mine"]
            assert await met(read_all(shell.adapters.DownloadAdapter(download_of("local/mine"), metadata=theirs))) == (
                Code.NOT_FOUND, "ADAPTER_NOT_FOUND",
            )  # fmt: skip
            call = shell.adapters.DownloadAdapter(download_of("local/mine"), metadata=work.token)
            parts = [part async for part in call]
            assert (parts[0].version.name, parts[0].version.digest) == ("local/mine", mine.digest)
            assert b"".join(part.chunk.data for part in parts if part.chunk.file == "adapter_config.json") == b"s2ft"
            share = adapter_pb2.ShareAdapterRequest(name="mine", visibility=adapter_pb2.VISIBILITY_PRIVATE)
            await shell.adapters.ShareAdapter(share)
            late = shell.adapters.DownloadAdapter(download_of("local/mine"), metadata=work.token)
            assert await met(read_all(late)) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")

    async def push_s2ft(shell: Shell, name: str) -> adapter_pb2.AdapterVersion:
        stream = whole(paper_files(kind="s2ft"), upload_id=name, name=name)
        return (await shell.adapters.UploadAdapter(iter(stream))).version

    asyncio.run(scenario())


def test_a_token_is_of_one_job_and_of_no_other() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            first = await at_work(shell)
            await create(shell, spec_with(publish={"adapter_name": "second"}))
            second = await hands_of(shell, "worker-2")
            assert bearing(first.held) != bearing(second.held)
            await second.report(pb.JobEvent(stage="mine"))
            await second.end(pb.JOB_STATE_FAILED)
            job = await get(shell, first.held.job.id)
            assert (job.state, job.last_sequence) == (pb.JOB_STATE_RUNNING, 2)
            assert await met(second.report()) == Ended
            await first.report()

    asyncio.run(scenario())
