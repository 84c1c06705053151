"""What a worker reports of a job: read, checked, and turned into what is kept.

A worker tells of progress and of the end, and of nothing else: which state a job is in is the registry's to write, and
what was published is looked up. Pure; runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from motley.v1 import training_pb2

from motley_server.errors import InvalidArgumentError
from motley_server.registry.job_records import Ending, JobState, NewEvent
from motley_server.registry.records import AdapterVersion
from motley_server.rpc.convert_training import STATES, event_from, published_to, text_of

MAX_EVENTS: Final = 1000
MAX_STAGE_CHARACTERS: Final = 200
MAX_MESSAGE_CHARACTERS: Final = 4000
MAX_REMAINING_SECONDS: Final = 1 << 32
MAX_MODULES: Final = 4096
MAX_PATH_CHARACTERS: Final = 200
MAX_EXPERTS: Final = 4096
SHARES_TOLERANCE: Final = 1e-3  # they may have been written with few digits
ENDINGS: Final = (
    *(JobState.SUCCEEDED, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED),
    JobState.QUEUED,
)

_COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "progress": ("step", "num_steps", "memory_bytes"),
    "data": tuple(one.name for one in training_pb2.DataReport.DESCRIPTOR.fields),
    "evaluation": ("num_samples",),
}


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


def read_report(request: training_pb2.ReportJobRequest) -> Report:
    """Read a report.

    Raises: InvalidArgumentError (reason=OUT_OF_RANGE, INVALID_EVENT or INVALID_ENDING).
    """
    if len(request.events) > MAX_EVENTS:
        message = f"{len(request.events)} items; {MAX_EVENTS} are allowed"
        raise InvalidArgumentError(message, reason="OUT_OF_RANGE", field="events")
    latest: dict[str, str] = {}
    for index, event in enumerate(request.events):
        _check_event(event, f"events[{index}]")
        kind = str(event.WhichOneof("event"))
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
    if kind == "routing":
        _check_routing(event.routing, f"{field}.routing.modules")


def _check_routing(report: training_pb2.RoutingReport, field: str) -> None:
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


def _ending(message: training_pb2.JobEnding) -> Ending:
    state = STATES.get(message.state)
    if state not in ENDINGS:
        text = f"a lease ends with its job {', '.join(one.value for one in ENDINGS)}"
        raise InvalidArgumentError(text, reason="INVALID_ENDING", field="ending.state")
    return Ending(state, message.reason, message.message[:MAX_MESSAGE_CHARACTERS])


def _bad_event(message: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="INVALID_EVENT", field=field)
