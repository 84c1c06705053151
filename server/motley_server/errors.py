"""Every error that a caller of the server can meet, as one tree.

`reason` is a stable machine-readable word (UPPER_SNAKE), `field` the request field at fault, spelled as in the proto.
Which gRPC code a class becomes is `rpc/status.py`'s business alone. Instances pickle, so that they can cross the
engine's mailbox.

    MotleyError
    ├── InvalidArgumentError      a field is wrong                          INVALID_ARGUMENT
    ├── NotFoundError             unknown, or not the caller's              NOT_FOUND
    ├── UnauthenticatedError      no key, or none that counts               UNAUTHENTICATED
    ├── PermissionDeniedError     a good key of the wrong role              PERMISSION_DENIED
    ├── AlreadyExistsError        that name or request id is taken          ALREADY_EXISTS
    ├── AbortedError              changed since the caller looked (etag)    ABORTED
    ├── OutOfRangeError           past what is there to go on from          OUT_OF_RANGE
    ├── FailedPreconditionError   right in itself, wrong for this base      FAILED_PRECONDITION
    ├── ResourceExhaustedError    quota, full queue, reader too slow        RESOURCE_EXHAUSTED
    ├── DeadlineExceededError     the caller's deadline has passed          DEADLINE_EXCEEDED
    ├── CancelledRequestError     the caller is gone                        CANCELLED
    ├── UnavailableError          draining, or the engine has stopped       UNAVAILABLE
    ├── UnimplementedError        in the surface, not built                 UNIMPLEMENTED
    ├── DataLossError             bytes are not those that were announced   DATA_LOSS
    └── InternalError             a fault of ours                           INTERNAL
"""

from __future__ import annotations


class MotleyError(Exception):
    """Carry a reason, the field at fault and a sentence for the caller."""

    def __init__(
        self, message: str, *, reason: str, field: str | None = None, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.reason, self.field, self.retry_after_seconds)


def _rebuild(
    kind: type[MotleyError], message: str, reason: str, field: str | None, retry_after_seconds: float | None
) -> MotleyError:
    return kind(message, reason=reason, field=field, retry_after_seconds=retry_after_seconds)


class InvalidArgumentError(MotleyError):
    """Say which field of the request is wrong, and why."""


class NotFoundError(MotleyError):
    """Say that a name means nothing to this caller."""


class UnauthenticatedError(MotleyError):
    """Say that the caller showed no key, or none that counts."""


class PermissionDeniedError(MotleyError):
    """Say which role a call needs that the caller's key has not."""


class AlreadyExistsError(MotleyError):
    """Say that a name is taken, or a request id was used for something else."""


class AbortedError(MotleyError):
    """Say that something changed since the caller looked."""


class OutOfRangeError(MotleyError):
    """Say that a position is past what is there, and where to go on."""


class FailedPreconditionError(MotleyError):
    """Say that something sound in itself does not fit what is served."""


class ResourceExhaustedError(MotleyError):
    """Say that a bound was reached, and when to come back."""


class DeadlineExceededError(MotleyError):
    """Say that the caller's deadline passed before the answer was complete."""


class CancelledRequestError(MotleyError):
    """Say that the caller went away."""


class UnavailableError(MotleyError):
    """Say that the server takes no requests just now."""


class UnimplementedError(MotleyError):
    """Say that this part of the surface is not built."""


class DataLossError(MotleyError):
    """Say that bytes are not those that were announced or sent before."""


class InternalError(MotleyError):
    """Say that the fault is ours; details stay in the log, under the request id."""
