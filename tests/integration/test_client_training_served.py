"""The clients' datasets, jobs and watches against the server itself, over connections that drop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from fake_relay import relaying
from motley.v1 import training_pb2
from motley_client import (
    AsyncClient,
    Client,
    DatasetStatus,
    FailedPreconditionError,
    InvalidArgumentError,
    JobState,
    LoraSettings,
    NotFoundError,
    OutOfRangeError,
    PublishSettings,
    S2ftSettings,
    StateChange,
    TrainingMethod,
    TrainingProgress,
    TrainingSpec,
)
from rpc_harness import serving
from training_calls import DATA, digest_of, hands_of, samples

Ask = Callable[..., Coroutine[Any, Any, Any]]
LARGE = samples(20_000)
SPEC = TrainingSpec(
    dataset=digest_of(LARGE), settings=LoraSettings(rank=2), publish=PublishSettings("trained", ("prod",)), steps=3
)


async def ask_asyncio(address: str, call: str, *args: Any, **kwargs: Any) -> Any:
    async with AsyncClient(address) as client:
        result = getattr(client, call)(*args, **kwargs)
        return [one async for one in result] if isinstance(result, AsyncIterator) else await result


async def ask_blocking(address: str, call: str, *args: Any, **kwargs: Any) -> Any:
    def run() -> Any:
        with Client(address) as client:
            result = getattr(client, call)(*args, **kwargs)
            return list(result) if isinstance(result, Iterator) else result

    return await asyncio.to_thread(run)  # the server has this loop


@pytest.fixture(params=[ask_blocking, ask_asyncio], ids=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


def lines_of(data: bytes) -> list[str]:
    return data.decode().splitlines()


def test_data_becomes_a_job_that_is_watched_to_its_end_over_connections_that_drop(ask: Ask) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            with relaying(address, [200_000, 300_000]) as up:
                made = await ask(up.address, "upload_dataset", lines_of(LARGE), "sums")
            assert up.num_dropped == 2
            assert (made.digest, made.num_samples, made.display_name) == (digest_of(LARGE), 20_000, "sums")
            assert await ask(address, "upload_dataset", lines_of(LARGE), "sums") == made

            job = await ask(address, "create_training_job", SPEC, request_id="once")
            assert (await ask(address, "create_training_job", SPEC, request_id="once")).id == job.id
            assert (job.state, job.spec) == (JobState.QUEUED, SPEC)
            with relaying(address, [1500, 1500]) as way:
                watching = asyncio.create_task(ask(way.address, "watch_training_job", job.id))
                hands = await hands_of(shell)
                for step in range(60):
                    event = training_pb2.JobEvent(progress=training_pb2.TrainingProgress(step=step, num_steps=60))
                    await hands.report(event, num_reported=step)
                await hands.publish(aliases=["prod"])
                await hands.end(training_pb2.JOB_STATE_SUCCEEDED, num_reported=60)
                events = await watching
            assert way.num_dropped == 2
            ended = await ask(address, "get_training_job", job.id)

        assert [one.sequence for one in events] == list(range(1, ended.last_sequence + 1))
        steps = [one.event.step for one in events if isinstance(one.event, TrainingProgress)]
        assert steps == list(range(60))
        assert events[-1].event == StateChange(JobState.SUCCEEDED, "", "")
        assert (ended.state, ended.worker, ended.attempts) == (JobState.SUCCEEDED, "worker-1", 1)
        assert ended.progress.step == 59

    asyncio.run(run())


def test_datasets_and_jobs_are_listed_and_go(ask: Ask) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            made = await ask(address, "upload_dataset", lines_of(DATA))
            spec = TrainingSpec(dataset=made.digest, settings=S2ftSettings(), publish=PublishSettings("trained"))
            job = await ask(address, "create_training_job", spec)

            assert await ask(address, "get_dataset", made.digest) == DatasetStatus(made, len(DATA))
            assert await ask(address, "list_datasets") == [made]
            assert await ask(address, "list_training_jobs", JobState.QUEUED) == [job]
            assert await ask(address, "list_training_jobs", JobState.RUNNING) == []
            found = await ask(address, "training_capabilities")
            assert (set(found.methods), found.queued_jobs, found.workers) == (set(TrainingMethod), 1, ())
            with pytest.raises(FailedPreconditionError):
                await ask(address, "delete_dataset", made.digest)

            assert (await ask(address, "cancel_training_job", job.id)).state is JobState.CANCELLED
            with pytest.raises(FailedPreconditionError):
                await ask(address, "cancel_training_job", job.id)
            await ask(address, "delete_dataset", made.digest)
            with pytest.raises(NotFoundError):
                await ask(address, "get_dataset", made.digest)
            events = await ask(address, "watch_training_job", job.id)
            assert [one.event.state for one in events] == [JobState.QUEUED, JobState.CANCELLED]
            with pytest.raises(OutOfRangeError):
                await ask(address, "watch_training_job", job.id, 3)

    asyncio.run(run())


def test_what_is_wrong_is_named(ask: Ask) -> None:
    async def run() -> None:
        async with serving() as shell:
            address = f"127.0.0.1:{shell.port}"
            with pytest.raises(InvalidArgumentError, match="line 2"):
                await ask(address, "upload_dataset", ['{"text": "a"}', "{"])
            with pytest.raises(InvalidArgumentError):
                await ask(address, "upload_dataset", [])
            spec = TrainingSpec(dataset=digest_of(DATA), settings=LoraSettings(0), publish=PublishSettings("trained"))
            with pytest.raises(InvalidArgumentError) as caught:
                await ask(address, "create_training_job", spec)
            assert caught.value.field == "spec.lora.rank"

    asyncio.run(run())
