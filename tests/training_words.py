"""Specs, events, commands and terminals that several tests of the client's training use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from motley.v1 import adapter_pb2, training_pb2
from motley_client import LoraSettings, PublishSettings, TrainingSpec
from motley_client.cli import app
from typer.testing import CliRunner, Result

DIGEST = "sha256:" + "d" * 64
SPEC = TrainingSpec(dataset=DIGEST, settings=LoraSettings(rank=4), publish=PublishSettings("legal"), steps=30)


def spec_message() -> training_pb2.TrainingSpec:
    """Return what SPEC says."""
    return training_pb2.TrainingSpec(
        method=training_pb2.TRAINING_METHOD_LORA,
        dataset=DIGEST,
        lora=training_pb2.LoraSettings(rank=4),
        steps=30,
        publish=training_pb2.PublishSettings(adapter_name="legal"),
    )


def change(state: Any, reason: str = "", message: str = "") -> training_pb2.JobEvent:
    """Say that a job came into a state."""
    return training_pb2.JobEvent(state_change=training_pb2.StateChange(state=state, reason=reason, message=message))


def progress(step: int, loss: float = 1.25) -> training_pb2.JobEvent:
    """Say how far a job of 30 steps has come."""
    return training_pb2.JobEvent(
        progress=training_pb2.TrainingProgress(
            step=step,
            num_steps=30,
            loss=loss,
            learning_rate=2e-4,
            gradient_norm=0.5,
            tokens_per_second=900.4,
            remaining=Duration(seconds=75, nanos=500_000_000),
            memory_bytes=412 << 20,
        )
    )


def routing(modules: Mapping[str, Sequence[float]]) -> training_pb2.JobEvent:
    """Say where tokens went."""
    told = {path: training_pb2.ExpertShares(shares=shares) for path, shares in modules.items()}
    return training_pb2.JobEvent(routing=training_pb2.RoutingReport(modules=told))


def whole_life() -> list[training_pb2.JobEvent]:
    """Return an event of every kind, in the order of a job that succeeds."""
    version = adapter_pb2.AdapterVersion(name="legal", version=3, digest=DIGEST, kind=adapter_pb2.ADAPTER_KIND_LORA)
    version.create_time.FromSeconds(1_800_000_000)
    return [
        change(training_pb2.JOB_STATE_RUNNING),
        training_pb2.JobEvent(stage="reading data"),
        training_pb2.JobEvent(
            data=training_pb2.DataReport(
                num_samples=90, num_held_out=10, num_truncated=2, num_dropped=1, num_tokens=1234
            )
        ),
        progress(10),
        training_pb2.JobEvent(checkpoint_step=10),
        routing({"a": (0.7, 0.1, 0.1, 0.1), "b": (0.25, 0.45, 0.2, 0.1)}),
        training_pb2.JobEvent(
            evaluation=training_pb2.Evaluation(
                num_samples=10, loss_before=2.0, loss_after=0.5, exact_match_before=0.0, exact_match_after=0.9
            )
        ),
        training_pb2.JobEvent(published=version),
        change(training_pb2.JOB_STATE_SUCCEEDED),
    ]


def train(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], input=typed)


def told(*arguments: str) -> str:
    """Return what a command prints that has nothing to complain about."""
    result = train(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def read_terminal(end: int) -> str:
    """Return what lies in a terminal that is written no more."""
    os.set_blocking(end, False)
    drawn = bytearray()
    try:
        while part := os.read(end, 1 << 16):
            drawn += part
    except BlockingIOError:
        os.close(end)
    return drawn.decode()
