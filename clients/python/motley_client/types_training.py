"""What is told of training: datasets, jobs, their events, and who is there to do them.

Owns the vocabulary of TrainingService's answers; what a job is asked to do is in `types_training_spec`. Knows neither
protobuf nor gRPC. Instances are immutable and may go from thread to thread; of an enum, None is a value that this
client does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

from motley_client.types_adapters import AdapterVersion
from motley_client.types_training_methods import TrainingMethod
from motley_client.types_training_spec import TrainingSpec


class DatasetFormat(Enum):
    """What the lines of a dataset are: a prompt and its completion, a conversation, or plain text."""

    COMPLETION = "completion"
    CHAT = "chat"
    TEXT = "text"


class JobState(Enum):
    """Where a job is; `rejected` was trained, but its gate was not passed, and nothing is published."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Tell whether nothing follows it."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples that a server has; `digest` is over the file, and its name everywhere."""

    digest: str
    display_name: str
    format: DatasetFormat | None
    size_bytes: int
    num_samples: int
    create_time: datetime


@dataclass(frozen=True, slots=True)
class DatasetStatus:
    """A dataset, None while it is on its way, and how many of its bytes are safe."""

    dataset: Dataset | None
    committed_bytes: int


@dataclass(frozen=True, slots=True)
class StateChange:
    """A job came into a state; `reason` is a stable word where something went wrong."""

    state: JobState | None
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """How far the training has come; memory is that of the process that trains.

    Units: `remaining_seconds`, None where nobody knows yet.
    """

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    remaining_seconds: float | None
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """How the data was read, in samples and tokens."""

    num_samples: int
    num_held_out: int
    num_truncated: int
    num_dropped: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The training can go on from this step, whatever happens to its process."""

    step: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What held-out samples say of the base without the adapter and with it; no exact match where none has an answer.

    Semantics: of LoQT, what they say of the base that it was and of the one that was made. Exact matches are shares of
    the samples that have an answer.
    """

    num_samples: int
    loss_before: float
    loss_after: float
    exact_match_before: float | None
    exact_match_after: float | None


@dataclass(frozen=True, slots=True)
class Stage:
    """What is being done now, in a few words."""

    text: str


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Where tokens went since the last report: by module, the share of each expert, in the experts' order."""

    modules: Mapping[str, tuple[float, ...]] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Merge:
    """LoQT's factors became a part of the weights after so many steps; `digest` is over all weights as they were then.

    Units: `step` in steps taken before it.
    """

    step: int
    digest: str


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The merges since the last report."""

    merges: tuple[Merge, ...]


@dataclass(frozen=True, slots=True)
class TrainedBase:
    """A base that a job has made.

    Semantics: it lies in `directory` at the job's worker. `fingerprint` is as a server that serves it tells it, so that
    adapters of the base before it are refused by it; `original_fingerprint` is of that one, empty if there was none.
    """

    directory: str
    fingerprint: str
    original_fingerprint: str
    num_merges: int
    size_bytes: int


Occurrence = (
    StateChange
    | TrainingProgress
    | DataReport
    | Checkpoint
    | Evaluation
    | AdapterVersion
    | Stage
    | RoutingReport
    | MergeReport
    | TrainedBase
)
"""What can happen to a job; an AdapterVersion is what was published, a TrainedBase what was made."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What happened to a job, and when; `event` is None for something that this client does not know.

    Semantics: sequences grow; between two, old progress may have been left out.
    """

    sequence: int
    time: datetime
    event: Occurrence | None


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A job as it stands; what has not come yet is None, or empty.

    Semantics: `start_time` is that of the first lease, `attempts` counts leases, `worker` had the last one, and
    `last_sequence` is that of the last event. Of `version` and `base` a job has one at most, by its method.
    """

    id: str
    spec: TrainingSpec
    state: JobState | None
    reason: str
    message: str
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    attempts: int
    worker: str
    cancel_requested: bool
    progress: TrainingProgress | None
    data: DataReport | None
    evaluation: Evaluation | None
    version: AdapterVersion | None
    last_sequence: int
    base_fingerprint: str
    base: TrainedBase | None


@dataclass(frozen=True, slots=True)
class Worker:
    """Who trains; methods that this client does not know are left out."""

    name: str
    methods: tuple[TrainingMethod, ...]
    device: str
    is_busy: bool
    last_seen_time: datetime


@dataclass(frozen=True, slots=True)
class TrainingCapabilities:
    """What jobs can ask for at a server, and the workers that were heard of within the last minute."""

    methods: tuple[TrainingMethod, ...]
    workers: tuple[Worker, ...]
    max_dataset_bytes: int
    max_datasets: int
    queued_jobs: int
    running_jobs: int
