"""What `motley train` prints, for people and as JSON.

Owns the shapes of that JSON (scripts rely on them): keys as the protos spell them, a number that is none is null. Knows
no server. Pure functions, of which those that write a spec load protobuf.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from enum import Enum
from typing import Any

from motley_client.cli_adapter_words import version_json
from motley_client.cli_table import moment, table
from motley_client.cli_train_bases import base_words, merges_words
from motley_client.cli_train_routing import routing_words
from motley_client.types_adapters import AdapterVersion
from motley_client.types_training import (
    Checkpoint,
    DataReport,
    Dataset,
    Evaluation,
    JobEvent,
    MergeReport,
    RoutingReport,
    Stage,
    StateChange,
    TrainedBase,
    TrainingCapabilities,
    TrainingJob,
    TrainingProgress,
)

_WIDTH = 14


def dataset_json(dataset: Dataset) -> dict[str, Any]:
    """Return what `--json` prints of a dataset."""
    return asdict(dataset) | {"format": _value(dataset.format), "create_time": moment(dataset.create_time)}


def dataset_table(datasets: Sequence[Dataset]) -> str:
    """Write one line for each dataset."""
    rows = [
        (one.digest, one.display_name, _word(one.format), str(one.num_samples), str(one.size_bytes),
         moment(one.create_time))
        for one in datasets
    ]  # fmt: skip
    return table(("digest", "name", "format", "samples", "size bytes", "created"), rows)


def job_json(job: TrainingJob) -> dict[str, Any]:
    """Return what `--json` prints of a job; its spec is what `submit --spec` takes, and what there is not is null."""
    from motley_client.convert_training_spec import spec_json

    return {
        "id": job.id,
        "spec": spec_json(job.spec),
        "state": _value(job.state),
        "reason": job.reason,
        "message": job.message,
        "create_time": moment(job.create_time),
        "start_time": moment(job.start_time) or None,
        "end_time": moment(job.end_time) or None,
        "attempts": job.attempts,
        "worker": job.worker,
        "cancel_requested": job.cancel_requested,
        "progress": None if job.progress is None else _numbers(job.progress),
        "data": None if job.data is None else _numbers(job.data),
        "evaluation": None if job.evaluation is None else _numbers(job.evaluation),
        "version": None if job.version is None else version_json(job.version),
        "last_sequence": job.last_sequence,
        "base_fingerprint": job.base_fingerprint,
        "base": None if job.base is None else asdict(job.base),
    }


def job_table(jobs: Sequence[TrainingJob]) -> str:
    """Write one line for each job."""
    rows = []
    for one in jobs:
        steps = "" if one.progress is None else f"{one.progress.step}/{one.progress.num_steps}"
        adapter, created = one.spec.adapter_name, moment(one.create_time)
        rows.append((one.id, _word(one.state), _word(one.spec.method), adapter, created, steps, one.worker))
    return table(("id", "state", "method", "adapter", "created", "step", "worker"), rows)


def job_words(job: TrainingJob) -> str:
    """Write all that is known of a job."""
    from motley_client.convert_training_spec import spec_json

    facts = {
        "id": job.id,
        "state": _state_words(StateChange(job.state, job.reason, job.message)),
        "adapter": job.spec.adapter_name,
        "method": _word(job.spec.method),
        "dataset": job.spec.dataset,
        "base": job.base_fingerprint,
        "created": moment(job.create_time),
        "started": moment(job.start_time),
        "ended": moment(job.end_time),
        "attempts": str(job.attempts),
        "worker": job.worker,
        "cancelling": "yes" if job.cancel_requested else "no",
        "data": "" if job.data is None else _data_words(job.data),
        "progress": "" if job.progress is None else progress_words(job.progress),
        "evaluation": "" if job.evaluation is None else _evaluation_words(job.evaluation),
        "published": "" if job.version is None else f"{job.version.name}@{job.version.version} {job.version.digest}",
        "made": "" if job.base is None else base_words(job.base),
        "spec": json.dumps(spec_json(job.spec)),
    }
    return "\n".join(f"{name:<{_WIDTH}}{value}".rstrip() for name, value in facts.items())


def event_json(event: JobEvent) -> dict[str, Any]:
    """Return what `--json` prints of an event: one key besides these two, unless this client does not know it."""
    return {"sequence": event.sequence, "time": moment(event.time)} | _occurrence_json(event)


def event_words(event: JobEvent) -> str:
    """Write an event on a line."""
    return f"{moment(event.time)}  {_occurrence_words(event)}"


def progress_words(progress: TrainingProgress) -> str:
    """Write how far the training has come."""
    words = [
        f"step {progress.step}/{progress.num_steps}",
        f"loss {progress.loss:.4f}",
        f"lr {progress.learning_rate:.2e}",
        f"grad norm {progress.gradient_norm:.3g}",
        f"{progress.tokens_per_second:.0f} tokens/s",
    ]
    if progress.remaining_seconds is not None:
        words.append(f"{timedelta(seconds=round(progress.remaining_seconds))} left")
    return "  ".join([*words, f"{progress.memory_bytes / (1 << 20):.0f} MiB"])


def capabilities_json(found: TrainingCapabilities) -> dict[str, Any]:
    """Return what `--json` prints of what jobs can ask for."""
    workers = [
        {
            "name": one.name,
            "methods": [method.value for method in one.methods],
            "device": one.device,
            "is_busy": one.is_busy,
            "last_seen_time": moment(one.last_seen_time),
        }
        for one in found.workers
    ]
    return asdict(found) | {"methods": [method.value for method in found.methods], "workers": workers}


def capabilities_words(found: TrainingCapabilities) -> str:
    """Write what jobs can ask for, then a line for each worker."""
    facts = {
        "methods": " ".join(method.value for method in found.methods),
        "queued jobs": str(found.queued_jobs),
        "running jobs": str(found.running_jobs),
        "datasets": f"at most {found.max_datasets} of {found.max_dataset_bytes} bytes",
    }
    lines = [f"{name:<{_WIDTH}}{value}".rstrip() for name, value in facts.items()]
    rows = [
        (one.name, " ".join(method.value for method in one.methods), one.device, "busy" if one.is_busy else "free",
         moment(one.last_seen_time))
        for one in found.workers
    ]  # fmt: skip
    return "\n".join([*lines, "", table(("worker", "methods", "device", "", "last seen"), rows)])


def _occurrence_json(event: JobEvent) -> dict[str, Any]:
    match event.event:
        case StateChange(state, reason, message):
            return {"state_change": {"state": _value(state), "reason": reason, "message": message}}
        case TrainingProgress() as progress:
            return {"progress": _numbers(progress)}
        case DataReport() as data:
            return {"data": _numbers(data)}
        case Checkpoint(step):
            return {"checkpoint_step": step}
        case Evaluation() as evaluation:
            return {"evaluation": _numbers(evaluation)}
        case AdapterVersion() as version:
            return {"published": version_json(version)}
        case Stage(text):
            return {"stage": text}
        case RoutingReport(modules):
            return {"routing": {"modules": {path: {"shares": list(shares)} for path, shares in modules.items()}}}
        case MergeReport() as report:
            return {"merges": asdict(report)}
        case TrainedBase() as base:
            return {"base": asdict(base)}
        case None:
            return {}


def _occurrence_words(event: JobEvent) -> str:
    match event.event:
        case StateChange() as change:
            return _state_words(change)
        case TrainingProgress() as progress:
            return progress_words(progress)
        case DataReport() as data:
            return f"data: {_data_words(data)}"
        case Checkpoint(step):
            return f"checkpoint at step {step}"
        case Evaluation() as evaluation:
            return f"evaluation: {_evaluation_words(evaluation)}"
        case AdapterVersion() as version:
            return f"published {version.name}@{version.version} {version.digest}"
        case Stage(text):
            return text
        case RoutingReport() as report:
            return routing_words(report)
        case MergeReport() as report:
            return merges_words(report)
        case TrainedBase() as base:
            return f"base made: {base_words(base)}"
        case None:
            return "something that this version of motley does not know"


def _state_words(change: StateChange) -> str:
    message = f": {change.message}" if change.message else ""
    return _word(change.state) + message + (f" ({change.reason})" if change.reason else "")


def _data_words(data: DataReport) -> str:
    return (
        f"{data.num_samples} samples, {data.num_held_out} held out, {data.num_truncated} truncated, "
        f"{data.num_dropped} dropped, {data.num_tokens} tokens"
    )


def _evaluation_words(found: Evaluation) -> str:
    words = f"loss {found.loss_before:.4f} before, {found.loss_after:.4f} after"
    if found.exact_match_before is not None and found.exact_match_after is not None:
        words += f"; exact match {found.exact_match_before:.1%} before, {found.exact_match_after:.1%} after"
    return f"{words}; {found.num_samples} samples"


def _numbers(found: TrainingProgress | DataReport | Evaluation) -> dict[str, Any]:
    """Return the numbers of a part; standard JSON knows neither NaN nor infinity."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in asdict(found).items()}


def _value(member: Enum | None) -> str | None:
    return None if member is None else str(member.value)


def _word(member: Enum | None) -> str:
    return _value(member) or "unknown"
