"""What a worker reports of a job: read, checked, and turned into what is kept.

A worker tells of progress, of a base that it has made, and of the end, and of nothing else: which state a job is in is
the registry's to write, and what was published is looked up. Pure; runs on the event loop's thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from motley.v1 import training_pb2

from motley_server.errors import FailedPreconditionError, InvalidArgumentError
from motley_server.registry.job_records import Ending, JobRecord, JobState, NewEvent
from motley_server.registry.records import AdapterVersion
from motley_server.rpc.convert_training import (
    MAKE_BASES,
    METHODS,
    STATES,
    base_of,
    event_from,
    published_to,
    spec_of,
    text_of,
)

MAX_EVENTS: Final = 1000
MAX_STAGE_CHARACTERS: Final = 200
MAX_MESSAGE_CHARACTERS: Final = 4000
MAX_REMAINING_SECONDS: Final = 1 << 32
MAX_MODULES: Final = 4096
MAX_PATH_CHARACTERS: Final = 200
MAX_EXPERTS: Final = 4096
MAX_MERGES: Final = 10_000
MAX_DIRECTORY_CHARACTERS: Final = 4096
SHARES_TOLERANCE: Final = 1e-3  # they may have been written with few digits
ENDINGS: Final = (
    *(JobState.SUCCEEDED, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED),
    JobState.QUEUED,
)

METHODS_OF_BASES: Final = frozenset(METHODS[number] for number in MAKE_BASES)

_COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "progress": ("step", "num_steps", "memory_bytes"),
    "data": tuple(one.name for one in training_pb2.DataReport.DESCRIPTOR.fields),
    "evaluation": ("num_samples",),
    "base": ("num_merges", "size_bytes"),
}
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Report:
    """What is to be kept of a report.

    Semantics: `latest` is what the job itself shows from now on, by column.
    """

    events: Sequence[NewEvent] = ()
    ending: Ending | None = None
    latest: Mapping[str, str] = field(default_factory=dict)

    def with_published(self, version: AdapterVersion) -> Report:
        """Return it with the news of what its job has become."""
        published = published_to(version)
        event = event_from(training_pb2.JobEvent(published=published))
        return replace(self, events=[*self.events, event], latest={**self.latest, "version": text_of(published)})


def makes_base(job: JobRecord) -> bool:
    """Tell whether a job's end is a base, and no adapter."""
    return job.method in METHODS_OF_BASES


def trains_by_loqt(job: JobRecord) -> bool:
    """Tell whether a job merges: one that makes a base does, and one whose pruned copy is aligned so."""
    return makes_base(job) or spec_of(job.spec).loram.alignment.HasField("loqt")


def made_by(job: JobRecord, report: Report) -> str:
    """Return the fingerprint of the base that a job has told of, in this report or before.

    Raises: FailedPreconditionError (reason=NO_BASE_MADE) if it has told of none, and so has not succeeded.
    """
    told = report.latest.get("base", job.base)
    if told is None:
        message = f"{job.id} has told of no base that it made, and so it has not succeeded"
        raise FailedPreconditionError(message, reason="NO_BASE_MADE", field="ending.state")
    return base_of(told).fingerprint


def read_report(request: training_pb2.ReportJobRequest, job: JobRecord) -> Report:
    """Read a report of a job.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE, INVALID_EVENT or INVALID_ENDING).
    """
    if len(request.events) > MAX_EVENTS:
        message = f"{len(request.events)} items; {MAX_EVENTS} are allowed"
        raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="events")
    latest: dict[str, str] = {}
    for index, event in enumerate(request.events):
        _check_event(event, f"events[{index}]")
        kind = str(event.WhichOneof("event"))
        if kind == "base" and not makes_base(job):
            raise _bad_event(f"a job by {job.method} makes no base", f"events[{index}].base")
        if kind == "merges" and not trains_by_loqt(job):
            raise _bad_event("a job that does not train by loqt merges nothing", f"events[{index}].merges")
        if kind in _COUNTS:
            latest[kind] = text_of(getattr(event, kind))
    events = [event_from(event) for event in request.events]
    return Report(events, _ending(request.ending) if request.HasField("ending") else None, latest)


def _check_event(event: training_pb2.JobEvent, field: str) -> None:
    if event.sequence or event.HasField("time"):
        raise _bad_event("its number and its time are the server's to give", field)
    kind = event.WhichOneof("event")
    if kind is None:
        raise _bad_event("it says nothing", field)
    if kind == "state_change":
        raise _bad_event("a job's state is the server's to change: report how it ends", f"{field}.state_change")
    if kind == "published":
        raise _bad_event("what was published is the server's to say", f"{field}.published")
    for name in _COUNTS.get(kind, ()):
        if getattr(getattr(event, kind), name) < 0:
            raise _bad_event("a count is not negative", f"{field}.{kind}.{name}")
    if event.checkpoint_step < 0:
        raise _bad_event("a step is not negative", f"{field}.checkpoint_step")
    remaining = event.progress.remaining
    if not (0 <= remaining.seconds < MAX_REMAINING_SECONDS and 0 <= remaining.nanos < 10**9):
        raise _bad_event("that is no time that could remain", f"{field}.progress.remaining")
    if len(event.stage) > MAX_STAGE_CHARACTERS or not event.stage.isprintable():
        message = f"a stage is at most {MAX_STAGE_CHARACTERS} printable characters"
        raise _bad_event(message, f"{field}.stage")
    if kind in _CHECKS:
        _CHECKS[kind](getattr(event, kind), f"{field}.{kind}")


def _check_routing(report: training_pb2.RoutingReport, field: str) -> None:
    field = f"{field}.modules"
    if len(report.modules) > MAX_MODULES:
        raise _bad_event(f"{len(report.modules)} modules; {MAX_MODULES} are allowed", field)
    for path, experts in report.modules.items():
        if len(path) > MAX_PATH_CHARACTERS or not path.isprintable():
            message = f"a module's path is at most {MAX_PATH_CHARACTERS} printable characters"
            raise _bad_event(message, field)
        shares = experts.shares
        if len(shares) > MAX_EXPERTS:
            raise _bad_event(f"{len(shares)} experts; {MAX_EXPERTS} are allowed", f"{field}[{path}]")
        if not (all(0 <= share <= 1 for share in shares) and abs(sum(shares) - 1) <= SHARES_TOLERANCE):
            raise _bad_event("shares are from 0 to 1, and add up to 1", f"{field}[{path}]")


def _check_merges(report: training_pb2.LoqtMerges, field: str) -> None:
    field = f"{field}.merges"
    if len(report.merges) > MAX_MERGES:
        raise _bad_event(f"{len(report.merges)} merges; {MAX_MERGES} are allowed", field)
    for index, merge in enumerate(report.merges):
        if merge.step < 0:
            raise _bad_event("a step is not negative", f"{field}[{index}].step")
        if not _DIGEST.fullmatch(merge.digest):
            raise _bad_event("a digest is `sha256:` and 64 hex digits", f"{field}[{index}].digest")


def _check_base(base: training_pb2.TrainedBase, field: str) -> None:
    for name in ("fingerprint", "original_fingerprint"):
        text = getattr(base, name)
        if not _DIGEST.fullmatch(text) and (text or name == "fingerprint"):
            raise _bad_event("a fingerprint is `sha256:` and 64 hex digits", f"{field}.{name}")
    if not 0 < len(base.directory) <= MAX_DIRECTORY_CHARACTERS or not base.directory.isprintable():
        message = f"a directory is 1 to {MAX_DIRECTORY_CHARACTERS} printable characters"
        raise _bad_event(message, f"{field}.directory")


_CHECKS: Final[Mapping[str, Callable[[Any, str], None]]] = {
    "routing": _check_routing,
    "merges": _check_merges,
    "base": _check_base,
}


def _ending(message: training_pb2.JobEnding) -> Ending:
    state = STATES.get(message.state)
    if state not in ENDINGS:
        text = f"a lease ends with its job {', '.join(one.value for one in ENDINGS)}"
        raise InvalidArgumentError(text, reason="INVALID_ENDING", field="ending.state")
    return Ending(state, message.reason, message.message[:MAX_MESSAGE_CHARACTERS])


def _bad_event(message: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="INVALID_EVENT", field=field)
