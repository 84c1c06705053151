"""What workers say and hear: Python values to protobuf requests, protobuf responses to Python values.

Owns both directions of WorkerService as `convert_adapters` does those of AdapterService. Knows nothing of channels.
Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import json_format
from motley.v1 import training_pb2

from motley_client.convert_fields import checked, duration
from motley_client.errors import InternalError, InvalidArgumentError
from motley_client.types_worker import JobEnding, Lease, LeasedJob, LeaseEnd, WorkerEvent, WorkerTerms

TOLD_KINDS = ("progress", "data", "checkpoint_step", "evaluation", "stage", "routing", "merges", "base")
"""What may be told of a job; its state, and what was published, are the server's to say."""

_METHODS = {
    training_pb2.TRAINING_METHOD_LORA: "lora",
    training_pb2.TRAINING_METHOD_S2FT: "s2ft",
    training_pb2.TRAINING_METHOD_GOAT: "goat",
    training_pb2.TRAINING_METHOD_LORAM: "loram",
    training_pb2.TRAINING_METHOD_LOQT: "loqt",
}
_METHOD_NUMBERS = {name: number for number, name in _METHODS.items()}
_ENDS = {
    LeaseEnd.SUCCEEDED: training_pb2.JOB_STATE_SUCCEEDED,
    LeaseEnd.REJECTED: training_pb2.JOB_STATE_REJECTED,
    LeaseEnd.FAILED: training_pb2.JOB_STATE_FAILED,
    LeaseEnd.CANCELLED: training_pb2.JOB_STATE_CANCELLED,
    LeaseEnd.QUEUED: training_pb2.JOB_STATE_QUEUED,
}


def register_request(
    name: str, methods: Iterable[str], base_fingerprint: str, device: str, version: str
) -> training_pb2.RegisterWorkerRequest:
    """Make a request that tells what a worker can do."""
    request = checked("methods", _of_methods, methods=methods)
    texts = {"name": name, "base_fingerprint": base_fingerprint, "device": device, "version": version}
    for field, value in texts.items():
        request.MergeFrom(checked(field, training_pb2.RegisterWorkerRequest, **{field: value}))
    return request


def lease_request(worker: str, wait_seconds: float) -> training_pb2.LeaseJobRequest:
    """Make a request for a job."""
    request = checked("worker", training_pb2.LeaseJobRequest, worker=worker)
    request.wait.CopyFrom(checked("wait", duration, seconds=wait_seconds))
    return request


def fetch_request(digest: str, offset: int) -> training_pb2.FetchDatasetRequest:
    """Make a request for a dataset's bytes from an offset on."""
    return checked("digest", training_pb2.FetchDatasetRequest, digest=digest, offset=offset)


def report_request(
    events: Iterable[WorkerEvent], num_reported: int, ending: JobEnding | None
) -> training_pb2.ReportJobRequest:
    """Make a report."""
    request = training_pb2.ReportJobRequest(num_reported=num_reported)
    for event in events:
        request.events.add().MergeFromString(event.message)
    if ending is not None:
        request.ending.CopyFrom(checked("ending", training_pb2.JobEnding, reason=ending.reason, message=ending.message))
        request.ending.state = _ENDS[ending.end]
    return request


def told_event(told: Mapping[str, Any]) -> WorkerEvent:
    """Make an event of what was told as JSON, by the process that trains or by the worker.

    Raises: InvalidArgumentError for what is no event, or not one of theirs to tell.
    """
    try:
        event = json_format.ParseDict(dict(told), training_pb2.JobEvent())
    except (json_format.ParseError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"no event: {error}", reason="INVALID_VALUE", field="event") from error
    kind = event.WhichOneof("event")
    if kind not in TOLD_KINDS or event.sequence or event.HasField("time"):
        raise InvalidArgumentError(f"no event of {', '.join(TOLD_KINDS)}", reason="INVALID_VALUE", field="event")
    return WorkerEvent(kind, event.SerializeToString())


def terms(response: training_pb2.RegisterWorkerResponse) -> WorkerTerms:
    """Read what a server told a worker.

    Raises: InternalError for leases that last no time at all.
    """
    lease_seconds = response.lease_duration.ToTimedelta().total_seconds()
    if lease_seconds <= 0:
        raise InternalError(f"the server's leases last {lease_seconds:g} seconds", reason=InternalError.code)
    return WorkerTerms(response.quantization, response.dtype, lease_seconds, response.terms_digest)


def lease(response: training_pb2.LeaseJobResponse) -> Lease | None:
    """Read a lease; None where there was no job."""
    if not response.HasField("lease"):
        return None
    message = response.lease
    spec = message.job.spec
    named = (spec.dataset, spec.gate.dataset, spec.loram.alignment.dataset)
    datasets = dict.fromkeys(digest for digest in named if digest)
    job = LeasedJob(
        id=message.job.id,
        method=_METHODS.get(spec.method, "unspecified"),
        base_fingerprint=message.job.base_fingerprint,
        datasets=tuple(datasets),
        reads=(*spec.s2ft.disjoint_from, *filter(None, [spec.loram.same_cut_as])),
        adapter_name=spec.publish.adapter_name if spec.HasField("publish") else None,
        aliases=tuple(spec.publish.aliases),
        labels=dict(spec.publish.labels),
        spec=json_format.MessageToDict(spec, preserving_proto_field_name=True),
        cancel_requested=message.job.cancel_requested,
    )
    return Lease(job, message.token, message.upload_id, message.terms_digest)


def _of_methods(methods: Iterable[str]) -> training_pb2.RegisterWorkerRequest:
    unknown = sorted(set(methods := tuple(methods)) - set(_METHOD_NUMBERS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(_METHOD_NUMBERS)}")
    return training_pb2.RegisterWorkerRequest(methods=[_METHOD_NUMBERS[method] for method in methods])
