"""What the demo of training says of its job."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import cast

from motley_client.demo_train_job import Watched
from motley_client.types_training import JobEvent, Occurrence, Stage, TrainingJob, TrainingProgress

BEGAN = datetime(2026, 11, 21, tzinfo=UTC)


def watched(*told: tuple[float, Occurrence]) -> Watched:
    events = [JobEvent(place, BEGAN + timedelta(seconds=at), event) for place, (at, event) in enumerate(told)]
    return Watched(cast(TrainingJob, None), tuple(events))


def progress(step: int) -> TrainingProgress:
    return TrainingProgress(step, 2, 1.0, 1e-3, 1.0, 100.0, None, 0)


def test_the_steps_take_from_the_stage_that_begins_them_to_the_last_of_them_whatever_else_is_told() -> None:
    told = [(1.0, Stage("reading data")), (2.0, Stage("training")), (2.5, Stage("a third of the heads"))]
    assert watched(*told, (7.0, progress(1))).step_seconds is None
    assert watched(*told, (7.0, progress(1)), (12.0, progress(2)), (15.0, Stage("writing"))).step_seconds == 10.0
    assert watched((1.0, progress(2))).step_seconds is None
