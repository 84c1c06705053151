"""Training jobs watched over the wire: every event in its order, over reconnects, to the last."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from adapter_calls import refused
from job_watching import being_watched, events_of, progress, states, watch
from motley.v1 import training_pb2
from motley_server.training import jobs as job_desk
from rpc_harness import Shell, eventually, serving
from training_calls import (
    at_work,
    create,
    get,
    hands_of,
    lease,
    queue,
    register,
    samples,
    send,
    whole_dataset,
)

Code = grpc.StatusCode
pb = training_pb2
OTHER = samples(seed=1)


def test_a_watch_sends_what_was_and_then_what_comes_to_the_last() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            async with being_watched(shell, work.held.job.id) as seen:
                await eventually(lambda: len(seen) == 2)
                reports = [
                    pb.JobEvent(stage="reading data"),
                    pb.JobEvent(data=pb.DataReport(num_samples=4)),
                    progress(1),
                ]
                for number, event in enumerate(reports):
                    await work.report(event, num_reported=number)
                    await eventually(lambda: len(seen) == 3 + number)  # noqa: B023
                version = await work.publish()
                await work.end(pb.JOB_STATE_SUCCEEDED, num_reported=3)
            assert [one.sequence for one in seen] == list(range(1, 8))
            assert all(one.HasField("time") for one in seen)
            assert states(seen) == ["JOB_STATE_QUEUED", "JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED"]
            assert (seen[2].stage, seen[3].data.num_samples) == ("reading data", 4)
            assert seen[4].progress == progress(1).progress
            assert (seen[5].published.name, seen[5].published.version) == (version.name, version.version)
            assert await events_of(shell, work.held.job.id) == seen
            assert await events_of(shell, work.held.job.id, after=5) == seen[5:]
            assert await events_of(shell, work.held.job.id, after=7) == []
            job = await get(shell, work.held.job.id)
            assert job.progress == seen[4].progress
            assert (job.data.num_samples, job.version.digest, job.last_sequence) == (4, version.digest, 7)

    asyncio.run(scenario())


def test_a_watch_is_told_at_once_of_what_this_server_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            async with being_watched(shell, work.held.job.id, after=2) as seen:
                await asyncio.sleep(0.05)  # it has looked, and waits
                await work.report(progress(1))
                await eventually(lambda: len(seen) == 1)
                await work.end(pb.JOB_STATE_REJECTED, "LOSS_ROSE", "worse than before")
            assert states(seen) == ["JOB_STATE_REJECTED"]
            job = await get(shell, work.held.job.id)
            assert (job.reason, job.message) == ("LOSS_ROSE", "worse than before")

    monkeypatch.setattr("motley_server.training.changes.Change.wait.__defaults__", (30.0,))
    asyncio.run(scenario())


def test_a_watch_finds_what_another_server_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            job = await queue(shell)
            async with being_watched(shell, job.id) as seen:
                await shell.training.database.run(shell.training.jobs.cancel, "local", job.id)
            assert states(seen) == ["JOB_STATE_QUEUED", "JOB_STATE_CANCELLED"]

    monkeypatch.setattr("motley_server.training.changes.Change.wait.__defaults__", (0.05,))
    asyncio.run(scenario())


def test_a_watch_goes_on_over_a_reconnect_and_misses_nothing() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            call, seen = watch(shell, work.held.job.id), []
            async for answer in call:
                seen.append(answer.event)
                if len(seen) == 2:
                    break
            call.cancel()
            await work.report(*[progress(step) for step in range(1, 151)])
            await work.end(pb.JOB_STATE_FAILED, "LOSS_NOT_FINITE", "NaN at step 150")
            seen += await events_of(shell, work.held.job.id, after=seen[-1].sequence)
            assert [one.sequence for one in seen] == list(range(1, 154))
            assert [one.progress.step for one in seen[2:-1]] == list(range(1, 151))
            await eventually(lambda: shell.training.job_desk.num_waiting == 0)

    asyncio.run(scenario())


@pytest.mark.parametrize(("after", "code", "reason"), [
    (2, Code.OUT_OF_RANGE, "NO_SUCH_EVENT"), (-1, Code.INVALID_ARGUMENT, "OUT_OF_RANGE"),
])  # fmt: skip
def test_a_watch_from_nowhere_is_refused(after: int, code: grpc.StatusCode, reason: str) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            job = await queue(shell)
            refusal = await refused(events_of(shell, job.id, after))
            assert (refusal.code, refusal.reason, refusal.field) == (code, reason, "after_sequence")

    asyncio.run(scenario())


def test_whoever_watches_or_comes_while_the_server_is_emptied_is_told_to_come_back() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            job = await queue(shell)
            watching = asyncio.create_task(refused(events_of(shell, job.id)))
            await eventually(lambda: shell.training.job_desk.num_waiting == 1)
            await shell.rpc.lifecycle.drain(1)
            for refusal in (
                await watching, await refused(create(shell)), await refused(events_of(shell, job.id)),
                await refused(send(shell, whole_dataset(OTHER))),
            ):  # fmt: skip
                assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "DRAINING")
                assert "RetryInfo" in refusal.details

    asyncio.run(scenario())


def test_events_are_read_by_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            await work.report(*[progress(step) for step in range(7)])
            await work.end(pb.JOB_STATE_FAILED)
            assert len(await events_of(shell, work.held.job.id)) == 10
            again = await hands_of_another(shell)
            assert again is None

    async def hands_of_another(shell: Shell) -> pb.Lease | None:
        await register(shell, "worker-2")
        return await lease(shell, "worker-2")

    monkeypatch.setattr(job_desk, "EVENTS_A_LOOK", 3)
    asyncio.run(scenario())


def test_a_job_that_was_given_back_is_watched_on_at_its_next_attempt() -> None:
    async def scenario() -> None:
        async with serving() as shell:
            work = await at_work(shell)
            async with being_watched(shell, work.held.job.id) as seen:
                await work.report(progress(1))
                await work.end(pb.JOB_STATE_QUEUED)
                second = await hands_of(shell, "worker-2")
                assert (second.held.job.id, second.held.job.attempts) == (work.held.job.id, 2)
                assert second.held.upload_id == work.held.upload_id
                await second.end(pb.JOB_STATE_FAILED, "DISK_FULL")
            assert states(seen) == [
                "JOB_STATE_QUEUED", "JOB_STATE_RUNNING", "JOB_STATE_QUEUED", "JOB_STATE_RUNNING", "JOB_STATE_FAILED",
            ]  # fmt: skip
            assert shell.count("motley_training_wait_seconds_count") == 1

    asyncio.run(scenario())
