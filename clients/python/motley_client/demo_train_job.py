"""One job of `motley demo-train`: how it is submitted, and how it is watched.

Owns the lines that tell how far it is. Runs on the caller's event loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.markup import escape

from motley_client.aio import AsyncClient
from motley_client.demo_scene import shorten
from motley_client.demo_train_courses import Course
from motley_client.demo_train_lessons import make_lines
from motley_client.types_adapters import AdapterVersion
from motley_client.types_training import (
    Checkpoint,
    DataReport,
    Evaluation,
    JobEvent,
    JobState,
    Stage,
    StateChange,
    TrainingJob,
    TrainingProgress,
)

PATIENCE_SECONDS = 20.0  # with a server that does not answer any more
TIMEOUT_SECONDS = 900.0
STAGE_OF_STEPS = "training"


@dataclass(frozen=True, slots=True)
class Watched:
    """A job that has ended, and what was told of it meanwhile."""

    job: TrainingJob
    events: tuple[JobEvent, ...]

    @property
    def total_seconds(self) -> float | None:
        """Return how long it took from when it was queued, None if it has not ended."""
        return None if self.job.end_time is None else _since(self.job.create_time, self.job.end_time)

    @property
    def step_seconds(self) -> float | None:
        """Return how long the steps took, None if they were not done."""
        began = ended = None
        for told in self.events:
            if isinstance(told.event, Stage) and told.event.text == STAGE_OF_STEPS:
                began = told.time
            elif isinstance(told.event, TrainingProgress) and told.event.step == told.event.num_steps:
                ended = told.time
        return None if began is None or ended is None else _since(began, ended)


async def submit(client: AsyncClient, course: Course) -> TrainingJob:
    """Upload what to train on and what to measure by, and queue the job."""
    lines, gate_lines = make_lines(course.skill)
    data = await client.upload_dataset(lines, f"{course.skill}, and what the base knows")
    gate = await client.upload_dataset(gate_lines, f"{course.skill}, held out")
    return await client.create_training_job(course.spec(data.digest, gate.digest))


async def watch(client: AsyncClient, job: TrainingJob, console: Console) -> Watched:
    """Watch a job to its end, telling what happens as it does.

    Effects: prints a line for whatever lasts, and on a terminal shows one that changes with every step.
    Raises: MotleyClientError, of DEADLINE_EXCEEDED if the job does not end.
    """
    events = []
    with console.status("in the queue") as live:
        watching = client.watch_training_job(job.id, patience=PATIENCE_SECONDS, timeout=TIMEOUT_SECONDS)
        progress: TrainingProgress | None = None
        async for event in watching:
            events.append(event)
            if isinstance(event.event, TrainingProgress):
                progress = event.event
                live.update(progress_line(progress))
            elif text := event_line(event, progress):
                console.print(f"{_since(job.create_time, event.time):>6.1f} s  {escape(text)}", soft_wrap=True)
                live.update(escape(text))
    return Watched(await client.get_training_job(job.id), tuple(events))


def event_line(event: JobEvent, progress: TrainingProgress | None) -> str:
    """Say what happened, or nothing if that is not worth a line; `progress` is what was told last."""
    match event.event:
        case StateChange(state=state, reason=reason, message=message):
            name = "in a state unknown here" if state is None else state.value
            return f"{name}: {reason}: {message}" if reason else name
        case Stage(text=text):
            return text
        case DataReport() as data:
            return f"{data.num_samples:,} samples to train on, {data.num_held_out:,} held out"
        case Checkpoint() if progress is not None:
            return progress_line(progress)
        case Evaluation() as found:
            before, after = map(percentage, (found.exact_match_before, found.exact_match_after))
            return f"exact match on held-out words {before} before, {after} after"
        case AdapterVersion() as version:
            return f"published {version.name}@{version.version} {shorten(version.digest)}"
    return ""


def progress_line(progress: TrainingProgress) -> str:
    """Say how far the steps are."""
    left = "" if progress.remaining_seconds is None else f", {progress.remaining_seconds:.0f} s left"
    speed = f"{progress.tokens_per_second:,.0f} tokens/s"
    return f"step {progress.step} of {progress.num_steps}, loss {progress.loss:.2f}, {speed}{left}"


def percentage(share: float | None) -> str:
    """Write which share of the held-out answers is exactly right."""
    return "unknown" if share is None else f"{share:.1%}"


def has_succeeded(job: TrainingJob) -> bool:
    """Tell whether a job has published what it was to."""
    return job.state is JobState.SUCCEEDED and job.version is not None


def _since(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds()
