"""Training jobs as a test watches them: all events to the end, or as they come beside a block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from google.protobuf.duration_pb2 import Duration
from motley.v1 import training_pb2
from rpc_harness import Shell, eventually

pb = training_pb2


def watch(shell: Shell, id: str, after: int = 0, **options: Any) -> Any:
    return shell.jobs.WatchTrainingJob(pb.WatchTrainingJobRequest(id=id, after_sequence=after), **options)


async def events_of(shell: Shell, id: str, after: int = 0, **options: Any) -> list[pb.JobEvent]:
    """Watch a job to its end."""
    return [answer.event async for answer in watch(shell, id, after, **options)]


@asynccontextmanager
async def being_watched(shell: Shell, id: str, after: int = 0) -> AsyncIterator[list[pb.JobEvent]]:
    """Watch a job to its end beside a block, which sees what has come; at the block's end, so must have the end."""
    seen: list[pb.JobEvent] = []

    async def read() -> None:
        async for answer in watch(shell, id, after):
            seen.append(answer.event)

    reading = asyncio.create_task(read())
    await eventually(lambda: shell.training.job_desk.num_waiting > 0)
    yield seen
    async with asyncio.timeout(5):
        await reading


def states(events: list[pb.JobEvent]) -> list[str]:
    return [pb.JobState.Name(one.state_change.state) for one in events if one.HasField("state_change")]


def progress(step: int, loss: float = 2.0) -> pb.JobEvent:
    remaining = Duration(seconds=12, nanos=500_000_000)
    told = pb.TrainingProgress(
        step=step, num_steps=100, loss=loss, learning_rate=1e-4, gradient_norm=0.5, tokens_per_second=900.5,
        remaining=remaining, memory_bytes=1 << 33,
    )  # fmt: skip
    return pb.JobEvent(progress=told)
