"""Between the messages of training and the registry's plain records: enums to words, messages to texts that are kept.

What the registry keeps of a spec, of an event or of what was published is the message as protobuf writes it in JSON,
with the proto's own names; it is made here, and read here again. Whether values make sense is decided elsewhere. Runs
on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from motley.v1 import adapter_pb2, training_pb2

from motley_server.library.whereabouts import Whereabouts
from motley_server.registry.dataset_records import DatasetFormat, DatasetRecord
from motley_server.registry.job_records import JobEvent, JobRecord, JobState, NewEvent, WorkerRecord
from motley_server.registry.records import AdapterVersion
from motley_server.rpc.convert_adapters import timestamp_to, version_to

M = TypeVar("M", bound=Message)

METHODS: Final[Mapping[int, str]] = MappingProxyType({
    training_pb2.TRAINING_METHOD_LORA: "lora",
    training_pb2.TRAINING_METHOD_S2FT: "s2ft",
    training_pb2.TRAINING_METHOD_GOAT: "goat",
    training_pb2.TRAINING_METHOD_LORAM: "loram",
    training_pb2.TRAINING_METHOD_LOQT: "loqt",
})  # fmt: skip
METHOD_NUMBERS: Final[Mapping[str, Any]] = MappingProxyType({method: number for number, method in METHODS.items()})
MAKE_BASES: Final = frozenset({training_pb2.TRAINING_METHOD_LOQT})
"""Methods whose jobs make a base, and publish no adapter."""
STATES: Final[Mapping[int, JobState]] = MappingProxyType({
    training_pb2.JOB_STATE_QUEUED: JobState.QUEUED,
    training_pb2.JOB_STATE_RUNNING: JobState.RUNNING,
    training_pb2.JOB_STATE_SUCCEEDED: JobState.SUCCEEDED,
    training_pb2.JOB_STATE_REJECTED: JobState.REJECTED,
    training_pb2.JOB_STATE_FAILED: JobState.FAILED,
    training_pb2.JOB_STATE_CANCELLED: JobState.CANCELLED,
})  # fmt: skip
STATE_NUMBERS: Final[Mapping[JobState, Any]] = MappingProxyType({state: number for number, state in STATES.items()})
FORMAT_NUMBERS: Final[Mapping[DatasetFormat, Any]] = MappingProxyType({
    DatasetFormat.COMPLETION: training_pb2.DATASET_FORMAT_COMPLETION,
    DatasetFormat.CHAT: training_pb2.DATASET_FORMAT_CHAT,
    DatasetFormat.TEXT: training_pb2.DATASET_FORMAT_TEXT,
})  # fmt: skip


def text_of(message: Message) -> str:
    """Write a message as the text that is kept: the same for the same message."""
    text: str = json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None, sort_keys=True)
    return text


def spec_of(text: str) -> training_pb2.TrainingSpec:
    """Read a spec that was kept."""
    return _read(text, training_pb2.TrainingSpec())


def base_of(text: str) -> training_pb2.TrainedBase:
    """Read a base that was kept."""
    return _read(text, training_pb2.TrainedBase())


def dataset_to(record: DatasetRecord) -> training_pb2.Dataset:
    """Write a dataset."""
    return training_pb2.Dataset(
        digest=record.digest,
        display_name=record.display_name,
        format=FORMAT_NUMBERS[record.format],
        size_bytes=record.size_bytes,
        num_samples=record.num_samples,
        create_time=timestamp_to(record.created_at),
    )


def job_to(record: JobRecord) -> training_pb2.TrainingJob:
    """Write a job."""
    job = training_pb2.TrainingJob(
        id=record.id,
        spec=spec_of(record.spec),
        state=STATE_NUMBERS[record.state],
        reason=record.reason,
        message=record.message,
        create_time=timestamp_to(record.created_at),
        start_time=_time_to(record.started_at),
        end_time=_time_to(record.ended_at),
        attempts=record.attempts,
        worker=record.worker,
        cancel_requested=record.cancel_requested,
        last_sequence=record.last_sequence,
        base_fingerprint=record.base_fingerprint,
    )
    for kept, message in (
        (record.progress, job.progress), (record.data, job.data), (record.evaluation, job.evaluation),
        (record.version, job.version), (record.base, job.base),
    ):  # fmt: skip
        if kept is not None:
            message.SetInParent()
            _read(kept, message)
    return job


def event_to(event: JobEvent) -> training_pb2.JobEvent:
    """Write an event."""
    message = _read(event.body, training_pb2.JobEvent())
    message.sequence = event.sequence
    message.time.CopyFrom(timestamp_to(event.time))
    return message


def event_from(message: training_pb2.JobEvent) -> NewEvent:
    """Read an event that has neither a number nor a time yet."""
    return NewEvent(str(message.WhichOneof("event")), text_of(message))


def published_to(version: AdapterVersion) -> adapter_pb2.AdapterVersion:
    """Write what was published, as it is kept with its job: as its owner sees it, without what may change."""
    message = version_to(version, version.owner, Whereabouts(), with_ranks=False)
    message.ClearField("residency")
    message.ClearField("pinned")
    return message


def worker_to(record: WorkerRecord) -> training_pb2.Worker:
    """Write a worker."""
    return training_pb2.Worker(
        name=record.name,
        methods=[METHOD_NUMBERS[method] for method in record.methods if method in METHOD_NUMBERS],
        device=record.device,
        is_busy=record.is_busy,
        last_seen_time=timestamp_to(record.seen_at),
    )


def _read(text: str, message: M) -> M:
    # A server of another version, on the same database, may have written more.
    json_format.Parse(text, message, ignore_unknown_fields=True)
    return message


def _time_to(time: datetime | None) -> Timestamp | None:
    return None if time is None else timestamp_to(time)
