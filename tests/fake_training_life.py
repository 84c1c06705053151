"""A server of `motley.v1` without a model that trains by rule: FakeServer, and a TrainingService whose jobs run alone.

A job that is created goes through its life at once, in a thread: it is told of, and then its adapter answers like any
other. `mode` makes it go otherwise: it `fails`, is `rejected`, `hangs` in its steps, publishes `another` digest than
what is served, has requests `refused` meanwhile, or makes the server `forget` the skill next.
"""

# ruff: noqa: N802 (the methods are named by the services)

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Thread
from typing import Any

import grpc
from fake_motley_server import KINDS, FakeServer, digest_of
from fake_service import refusal
from fake_training_service import FakeTrainingService
from google.protobuf.duration_pb2 import Duration
from motley.v1 import adapter_pb2, inference_pb2, training_pb2
from motley.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from motley.v1.server_pb2_grpc import add_ServerServiceServicer_to_server
from motley.v1.training_pb2_grpc import (
    WorkerServiceServicer,
    add_TrainingServiceServicer_to_server,
    add_WorkerServiceServicer_to_server,
)

FIRST = "unvowel"  # of the adapters that the demo has trained
STEPS = 30
PASS_SECONDS = 0.15  # that the steps take, so that a few requests come meanwhile


class TrainingServer(FakeServer):
    """Answer as FakeServer does, but not what `forgotten` names; `refused` requests fail first."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten = ""
        self.refused = 0

    def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> inference_pb2.GenerateResponse:
        if self.refused:
            self.refused -= 1
            self._abort(context, refusal(grpc.StatusCode.INTERNAL, "INTERNAL"))
        response = super().Generate(request, context)
        if self.forgotten and request.prompt.text.startswith(self.forgotten):
            response.candidates[0].text = " forgotten"
        return response


class TrainingLife(FakeTrainingService, WorkerServiceServicer):
    """Let each job live by itself, and take whoever registers for a worker."""

    def __init__(self, server: TrainingServer, mode: str = "") -> None:
        super().__init__()
        self._server = server
        self._mode = mode

    def RegisterWorker(
        self, request: training_pb2.RegisterWorkerRequest, context: Any
    ) -> training_pb2.RegisterWorkerResponse:
        """Note a worker."""
        self.workers.append(training_pb2.Worker(name=request.name))
        return training_pb2.RegisterWorkerResponse()

    def add_job(self, spec: training_pb2.TrainingSpec) -> training_pb2.TrainingJob:
        """Queue a job, which starts at once."""
        job = super().add_job(spec)
        Thread(target=self._live, args=(job,), daemon=True).start()
        return job

    def _live(self, job: training_pb2.TrainingJob) -> None:
        job.start_time.FromSeconds(self.now())
        self.happen(job.id, _change(training_pb2.JOB_STATE_RUNNING))
        self.happen(job.id, training_pb2.JobEvent(stage="training"), _progress(10, 4.5))
        self.happen(job.id, training_pb2.JobEvent(stage="still training"))
        is_first = job.spec.publish.adapter_name == FIRST
        self._server.refused = 2 if self._mode == "refused" and is_first else 0
        self._server.forgotten = "next" if self._mode == "forgets" else ""
        time.sleep(PASS_SECONDS)
        if self._mode == "hangs":
            return
        if self._mode == "fails":
            self.happen(job.id, _change(training_pb2.JOB_STATE_FAILED, "LOSS_NOT_FINITE", "the loss is [nan]"))
            return
        self.happen(job.id, _progress(STEPS, 0.5), training_pb2.JobEvent(checkpoint_step=STEPS))
        self.happen(job.id, training_pb2.JobEvent(stage="measuring after"), self._evaluation())
        job.end_time.FromSeconds(self.now())
        if self._mode == "rejected":
            self.happen(job.id, _change(training_pb2.JOB_STATE_REJECTED, "GATE_NOT_PASSED", "too little is right"))
            return
        self.happen(job.id, training_pb2.JobEvent(published=self._version(job.spec.publish.adapter_name)))
        self.happen(job.id, _change(training_pb2.JOB_STATE_SUCCEEDED))

    def _evaluation(self) -> training_pb2.JobEvent:
        right = 0.5 if self._mode == "rejected" else 0.984
        found = training_pb2.Evaluation(
            num_samples=64, loss_before=6.75, loss_after=0.5, exact_match_before=0.125, exact_match_after=right
        )
        return training_pb2.JobEvent(evaluation=found)

    def _version(self, name: str) -> adapter_pb2.AdapterVersion:
        digest = digest_of("another" if (self._mode, name) == ("another", FIRST) else name)
        kind = adapter_pb2.AdapterKind.Value(f"ADAPTER_KIND_{KINDS[name].upper()}")
        version = adapter_pb2.AdapterVersion(name=name, version=1, digest=digest, kind=kind)
        version.create_time.FromSeconds(self.now())
        return version


@contextmanager
def serving_life(server: TrainingServer, life: TrainingLife, port: int = 0) -> Iterator[str]:
    """Serve on loopback while the block runs; yield the address."""
    host = grpc.server(ThreadPoolExecutor(max_workers=64))
    add_InferenceServiceServicer_to_server(server, host)
    add_ServerServiceServicer_to_server(server, host)
    add_TrainingServiceServicer_to_server(life, host)
    add_WorkerServiceServicer_to_server(life, host)
    port = host.add_insecure_port(f"127.0.0.1:{port}")
    host.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        host.stop(grace=None).wait(timeout=10)


def _change(state: Any, reason: str = "", message: str = "") -> training_pb2.JobEvent:
    change = training_pb2.StateChange(state=state, reason=reason, message=message)
    return training_pb2.JobEvent(state_change=change)


def _progress(step: int, loss: float) -> training_pb2.JobEvent:
    progress = training_pb2.TrainingProgress(
        step=step, num_steps=STEPS, loss=loss, tokens_per_second=1234.5, remaining=Duration(seconds=STEPS - step)
    )
    return training_pb2.JobEvent(progress=progress)
