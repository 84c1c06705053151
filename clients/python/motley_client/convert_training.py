"""Datasets, jobs and their events: Python values to protobuf requests, protobuf responses to Python values.

Owns both directions of TrainingService as `convert` does those of the other services, but for the spec, which is in
`convert_training_spec`; what an upload says is in `dataset_plan`. Knows nothing of channels. Pure functions but for the
request ids.
"""

from __future__ import annotations

from collections.abc import Iterable

from motley.v1 import training_pb2

from motley_client.convert_adapters import version
from motley_client.convert_fields import checked, fill_page_size, fill_request_id, moment
from motley_client.convert_training_spec import METHODS, spec, spec_message
from motley_client.types_training import (
    Checkpoint,
    DataReport,
    Dataset,
    DatasetFormat,
    DatasetStatus,
    Evaluation,
    JobEvent,
    JobState,
    Merge,
    MergeReport,
    Occurrence,
    RoutingReport,
    Stage,
    StateChange,
    TrainedBase,
    TrainingCapabilities,
    TrainingJob,
    TrainingProgress,
    Worker,
)
from motley_client.types_training_methods import TrainingMethod
from motley_client.types_training_spec import TrainingSpec

_FORMATS = {
    training_pb2.DATASET_FORMAT_COMPLETION: DatasetFormat.COMPLETION,
    training_pb2.DATASET_FORMAT_CHAT: DatasetFormat.CHAT,
    training_pb2.DATASET_FORMAT_TEXT: DatasetFormat.TEXT,
}
_STATES = {
    training_pb2.JOB_STATE_QUEUED: JobState.QUEUED,
    training_pb2.JOB_STATE_RUNNING: JobState.RUNNING,
    training_pb2.JOB_STATE_SUCCEEDED: JobState.SUCCEEDED,
    training_pb2.JOB_STATE_REJECTED: JobState.REJECTED,
    training_pb2.JOB_STATE_FAILED: JobState.FAILED,
    training_pb2.JOB_STATE_CANCELLED: JobState.CANCELLED,
}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}


def get_dataset_request(digest: str) -> training_pb2.GetDatasetRequest:
    """Make a request for a dataset."""
    return checked("digest", training_pb2.GetDatasetRequest, digest=digest)


def list_datasets_request(page_size: int | None) -> training_pb2.ListDatasetsRequest:
    """Make a request for the first page of datasets; None leaves its size to the server."""
    request = training_pb2.ListDatasetsRequest()
    fill_page_size(request, page_size)
    return request


def delete_dataset_request(digest: str, request_id: str | None) -> training_pb2.DeleteDatasetRequest:
    """Make a request to forget a dataset."""
    request = checked("digest", training_pb2.DeleteDatasetRequest, digest=digest)
    fill_request_id(request, request_id)
    return request


def create_job_request(spec: TrainingSpec, request_id: str | None) -> training_pb2.CreateTrainingJobRequest:
    """Make a request to queue a job."""
    request = training_pb2.CreateTrainingJobRequest(spec=spec_message(spec))
    fill_request_id(request, request_id)
    return request


def get_job_request(job_id: str) -> training_pb2.GetTrainingJobRequest:
    """Make a request for one job."""
    return checked("id", training_pb2.GetTrainingJobRequest, id=job_id)


def list_jobs_request(state: JobState | None, page_size: int | None) -> training_pb2.ListTrainingJobsRequest:
    """Make a request for the first page of jobs, in one state or in all; None leaves its size to the server."""
    request = training_pb2.ListTrainingJobsRequest()
    if state is not None:
        request.MergeFrom(checked("state", _of_state, state=state))
    fill_page_size(request, page_size)
    return request


def cancel_job_request(job_id: str, request_id: str | None) -> training_pb2.CancelTrainingJobRequest:
    """Make a request to end a job."""
    request = checked("id", training_pb2.CancelTrainingJobRequest, id=job_id)
    fill_request_id(request, request_id)
    return request


def watch_job_request(job_id: str, after_sequence: int) -> training_pb2.WatchTrainingJobRequest:
    """Make a request for the events of a job behind one of them; 0 is before the first."""
    request = checked("id", training_pb2.WatchTrainingJobRequest, id=job_id)
    request.MergeFrom(checked("after_sequence", training_pb2.WatchTrainingJobRequest, after_sequence=after_sequence))
    return request


def dataset(message: training_pb2.Dataset) -> Dataset:
    """Read a dataset."""
    return Dataset(
        digest=message.digest,
        display_name=message.display_name,
        format=_FORMATS.get(message.format),
        size_bytes=message.size_bytes,
        num_samples=message.num_samples,
        create_time=moment(message.create_time),
    )


def dataset_status(response: training_pb2.GetDatasetResponse) -> DatasetStatus:
    """Read a dataset, or how much of it is safe."""
    found = dataset(response.dataset) if response.HasField("dataset") else None
    return DatasetStatus(found, response.committed_bytes)


def job(message: training_pb2.TrainingJob) -> TrainingJob:
    """Read a job."""
    return TrainingJob(
        id=message.id,
        spec=spec(message.spec),
        state=_STATES.get(message.state),
        reason=message.reason,
        message=message.message,
        create_time=moment(message.create_time),
        start_time=moment(message.start_time) if message.HasField("start_time") else None,
        end_time=moment(message.end_time) if message.HasField("end_time") else None,
        attempts=message.attempts,
        worker=message.worker,
        cancel_requested=message.cancel_requested,
        progress=_progress(message.progress) if message.HasField("progress") else None,
        data=_data(message.data) if message.HasField("data") else None,
        evaluation=_evaluation(message.evaluation) if message.HasField("evaluation") else None,
        version=version(message.version) if message.HasField("version") else None,
        last_sequence=message.last_sequence,
        base_fingerprint=message.base_fingerprint,
        base=_base(message.base) if message.HasField("base") else None,
    )


def job_event(message: training_pb2.JobEvent) -> JobEvent:
    """Read an event."""
    return JobEvent(message.sequence, moment(message.time), _event(message))


def capabilities(response: training_pb2.GetTrainingCapabilitiesResponse) -> TrainingCapabilities:
    """Read what jobs can ask for, and who is there."""
    return TrainingCapabilities(
        methods=_methods(response.methods),
        workers=tuple(map(_worker, response.workers)),
        max_dataset_bytes=response.max_dataset_bytes,
        max_datasets=response.max_datasets,
        queued_jobs=response.queued_jobs,
        running_jobs=response.running_jobs,
    )


def _event(message: training_pb2.JobEvent) -> Occurrence | None:
    match message.WhichOneof("event"):
        case "state_change":
            change = message.state_change
            return StateChange(_STATES.get(change.state), change.reason, change.message)
        case "progress":
            return _progress(message.progress)
        case "data":
            return _data(message.data)
        case "checkpoint_step":
            return Checkpoint(message.checkpoint_step)
        case "evaluation":
            return _evaluation(message.evaluation)
        case "published":
            return version(message.published)
        case "stage":
            return Stage(message.stage)
        case "routing":
            return RoutingReport({path: tuple(one.shares) for path, one in message.routing.modules.items()})
        case "merges":
            return MergeReport(tuple(Merge(one.step, one.digest) for one in message.merges.merges))
        case "base":
            return _base(message.base)
        case None:
            return None


def _progress(message: training_pb2.TrainingProgress) -> TrainingProgress:
    remaining = message.remaining.ToTimedelta().total_seconds() if message.HasField("remaining") else None
    return TrainingProgress(
        step=message.step,
        num_steps=message.num_steps,
        loss=message.loss,
        learning_rate=message.learning_rate,
        gradient_norm=message.gradient_norm,
        tokens_per_second=message.tokens_per_second,
        remaining_seconds=remaining,
        memory_bytes=message.memory_bytes,
    )


def _data(message: training_pb2.DataReport) -> DataReport:
    return DataReport(
        num_samples=message.num_samples,
        num_held_out=message.num_held_out,
        num_truncated=message.num_truncated,
        num_dropped=message.num_dropped,
        num_tokens=message.num_tokens,
    )


def _evaluation(message: training_pb2.Evaluation) -> Evaluation:
    return Evaluation(
        num_samples=message.num_samples,
        loss_before=message.loss_before,
        loss_after=message.loss_after,
        exact_match_before=message.exact_match_before if message.HasField("exact_match_before") else None,
        exact_match_after=message.exact_match_after if message.HasField("exact_match_after") else None,
    )


def _base(message: training_pb2.TrainedBase) -> TrainedBase:
    return TrainedBase(
        directory=message.directory,
        fingerprint=message.fingerprint,
        original_fingerprint=message.original_fingerprint,
        num_merges=message.num_merges,
        size_bytes=message.size_bytes,
    )


def _worker(message: training_pb2.Worker) -> Worker:
    return Worker(
        name=message.name,
        methods=_methods(message.methods),
        device=message.device,
        is_busy=message.is_busy,
        last_seen_time=moment(message.last_seen_time),
    )


def _methods(numbers: Iterable[training_pb2.TrainingMethod.ValueType]) -> tuple[TrainingMethod, ...]:
    return tuple(METHODS[number] for number in numbers if number in METHODS)


def _of_state(state: JobState) -> training_pb2.ListTrainingJobsRequest:
    return training_pb2.ListTrainingJobsRequest(state=_STATE_NUMBERS[JobState(state)])
