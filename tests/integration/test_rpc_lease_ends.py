"""The end of a lease over the wire: its token opens nothing any more, and what had begun before makes no version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest
from adapter_calls import committed, read_all, refused
from motley.v1 import adapter_pb2, server_pb2, tenant_pb2, training_pb2
from motley_server.app import _training_limits
from motley_server.config import ServerConfig, TrainingConfig
from motley_server.errors import UnavailableError
from motley_server.training import keeper
from motley_server.training.opening import TrainingLimits
from rpc_harness import eventually, serving
from training_calls import (
    Hands,
    at_work,
    get,
    hands_of,
    let_pass,
    spec_with,
    worker_key,
)
from upload_streams import FINISH as UPLOAD_FINISH
from upload_streams import chunks_of, header_of, paper_files, whole

Code = grpc.StatusCode
pb = training_pb2
Ended = (Code.UNAUTHENTICATED, "LEASE_ENDED")


async def met(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    refusal = await refused(call)
    return refusal.code, refusal.reason


def download_of(name: str) -> adapter_pb2.DownloadAdapterRequest:
    return adapter_pb2.DownloadAdapterRequest(name=name)


def calls_by(work: Hands) -> list[Awaitable[object]]:
    """Call everything that a lease is good for."""
    shell, token = work.shell, work.token
    return [
        work.report(),
        work.fetch(),
        shell.adapters.UploadAdapter(metadata=work.token),  # silent: asyncio's gRPC may drop an answer to who writes
        committed(shell, work.held.upload_id, metadata=token),
        shell.adapters.AbortUpload(adapter_pb2.AbortUploadRequest(upload_id=work.held.upload_id), metadata=token),
        read_all(shell.adapters.DownloadAdapter(download_of("rows"), metadata=token)),
        shell.server.GetServerInfo(server_pb2.GetServerInfoRequest(), metadata=token),
    ]


async def let_expire(work: Hands) -> None:
    let_pass(work.shell, 31)


async def let_another_have_it(work: Hands) -> None:
    let_pass(work.shell, 31)
    await work.shell.training.keeper.end_leases()
    assert (await hands_of(work.shell, "worker-2")).held.job.id == work.held.job.id


async def let_end(work: Hands) -> None:
    await work.end(pb.JOB_STATE_REJECTED)


async def let_the_key_be_revoked(work: Hands) -> None:
    tenants = work.shell.tenants
    (key,) = (await tenants.ListKeys(tenant_pb2.ListKeysRequest(tenant_id="local"))).keys
    await tenants.RevokeKey(tenant_pb2.RevokeKeyRequest(key_id=key.id))
    assert (await get(work.shell, work.held.job.id)).state == pb.JOB_STATE_QUEUED


async def let_give_back(work: Hands) -> None:
    await work.end(pb.JOB_STATE_QUEUED)


OVER = [let_expire, let_another_have_it, let_end, let_the_key_be_revoked]


@pytest.mark.parametrize("over", [*OVER, let_give_back], ids=lambda value: value.__name__)
def test_a_token_is_good_for_nothing_once_its_lease_is_over(over: Callable[[Hands], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, metadata=await worker_key(shell))
            await over(work)
            for call in calls_by(work):
                assert await met(call) == Ended
            assert shell.library.registry.adapters.newest("local", "trained") is None

    asyncio.run(scenario())


@pytest.mark.parametrize("over", OVER, ids=lambda value: value.__name__)
def test_a_late_stream_makes_no_version(over: Callable[[Hands], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work, gate = await at_work(shell, metadata=await worker_key(shell)), asyncio.Event()
            files = paper_files()

            async def slow() -> AsyncIterator[adapter_pb2.UploadAdapterRequest]:
                yield header_of(files, upload_id=work.held.upload_id, name="trained")
                for chunk in chunks_of(files):
                    yield chunk
                await gate.wait()
                yield UPLOAD_FINISH

            call = shell.adapters.UploadAdapter(slow(), metadata=work.token)
            await eventually(lambda: shell.count("motley_upload_bytes_total") == sum(map(len, files.values())))
            await over(work)
            gate.set()
            assert await met(call) == Ended
            assert shell.library.registry.adapters.newest("local", "trained") is None

    asyncio.run(scenario())


def test_bytes_that_are_the_newest_version_already_are_not_published_late_either() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            labels = {"motley.job": work.held.job.id}
            files = paper_files()
            stream = whole(files, upload_id="own", name="trained", labels=labels)
            await shell.adapters.UploadAdapter(iter(stream))
            finding = shell.library.desk._publishing.find_or_repeat

            async def late(*args: Any) -> Any:
                let_pass(shell, 31)  # after the token was looked at
                return await finding(*args)

            shell.library.desk._publishing.find_or_repeat = late  # type: ignore[method-assign]
            assert await met(work.publish()) == Ended

    asyncio.run(scenario())


def test_leases_that_are_not_kept_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            shell.training.start(collect_seconds=300)
            await eventually(lambda: shell.count("motley_training_jobs", state="running") == 1)
            let_pass(shell, 31)
            await eventually(lambda: shell.count("motley_training_jobs", state="queued") == 1)
            job = await get(shell, work.held.job.id)
            assert (job.state, job.reason, job.attempts) == (pb.JOB_STATE_QUEUED, "LEASE_EXPIRED", 1)

    monkeypatch.setattr(keeper, "KEEP_SECONDS", 0.02)
    monkeypatch.setattr(keeper, "COUNT_SECONDS", 0.02)
    asyncio.run(scenario())


def test_the_keeper_goes_on_when_something_could_not_be_done(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            await at_work(shell)
            counts, tries = shell.training.jobs.counts, []

            def failing() -> Any:
                tries.append(1)
                if len(tries) == 1:
                    raise UnavailableError("the database is away", reason="DATABASE_UNAVAILABLE")
                return counts()

            monkeypatch.setattr(shell.training.jobs, "counts", failing)
            shell.training.start(collect_seconds=300)
            await eventually(lambda: shell.count("motley_training_jobs", state="running") == 1)

    monkeypatch.setattr(keeper, "COUNT_SECONDS", 0.02)
    asyncio.run(scenario())
    assert "the database is away" in caplog.text


def test_a_second_attempt_publishes_what_the_first_could_not() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            files = paper_files()
            begun = [header_of(files, upload_id=work.held.upload_id, name="trained"), *chunks_of(files)]
            await refused(shell.adapters.UploadAdapter(iter(begun), metadata=work.token))
            await let_another_have_it_again(work)
            second = await hands_of(shell, "worker-3")
            sent = shell.count("motley_upload_bytes_total")
            header = header_of(files, upload_id=second.held.upload_id, name="trained")
            made = await shell.adapters.UploadAdapter(iter([header, UPLOAD_FINISH]), metadata=second.token)
            assert (made.version.version, made.version.created_by) == (1, work.held.job.id)
            assert shell.count("motley_upload_bytes_total") == sent
            await second.end(pb.JOB_STATE_SUCCEEDED)

    async def let_another_have_it_again(work: Hands) -> None:
        let_pass(work.shell, 31)
        await work.shell.training.keeper.end_leases()

    asyncio.run(scenario())


def test_a_job_that_workers_have_had_for_too_long_fails_and_its_worker_is_told() -> None:
    async def scenario() -> None:
        async with serving(max_job_duration=timedelta(seconds=40)) as shell:
            work = await at_work(shell)
            let_pass(shell, 20)
            await work.report(pb.JobEvent(stage="one"))
            let_pass(shell, 21)
            assert await met(work.report(pb.JobEvent(stage="two"), num_reported=1)) == Ended
            job = await get(shell, work.held.job.id)
            assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "TIME_LIMIT")
            assert shell.count("motley_training_jobs_ended_total", method="lora", state="failed") == 1

    asyncio.run(scenario())


def test_a_job_that_keeps_aliases_moves_none() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell, spec_with(publish={"keep_aliases": True}))
            assert await met(work.publish(aliases=["prod"])) == (Code.PERMISSION_DENIED, "OUTSIDE_LEASE")
            version = await work.publish()
            await work.end(pb.JOB_STATE_SUCCEEDED)
            adapter = (await shell.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="trained@1"))).adapter
            assert (version.version, list(adapter.aliases)) == (1, [])
            assert (await get(shell, work.held.job.id)).version.version == 1

    asyncio.run(scenario())


def test_the_keeper_forgets_jobs_that_ended_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            await work.end(pb.JOB_STATE_FAILED)
            let_pass(shell, 86_401)
            await shell.training.keeper.collect()  # which keeps all, unless it is told not to
            await get(shell, work.held.job.id)
            monkeypatch.setattr(shell.training.keeper, "_ended_jobs_kept", timedelta(days=1))
            await shell.training.keeper.collect()
            assert await met(get(shell, work.held.job.id)) == (Code.NOT_FOUND, "JOB_NOT_FOUND")

    asyncio.run(scenario())


def test_the_limits_of_training_are_those_of_the_configuration() -> None:
    limits = _training_limits(ServerConfig(training=TrainingConfig(True, 1, 2, 3.0, 4.0, 5.0)))
    assert limits == TrainingLimits(1, timedelta(seconds=3), 2, timedelta(seconds=4), timedelta(days=5))
    unlimited = _training_limits(ServerConfig(training=TrainingConfig(max_job_seconds=0, keep_jobs_days=0)))
    assert (unlimited.max_job_duration, unlimited.ended_jobs_kept) == (None, None)
