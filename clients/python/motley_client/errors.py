"""Every error that a server's answer can become, as one tree of Python exceptions.

Owns the way from a failed call to a typed error; mirrors google.rpc.Status and its details. Knows nothing of requests,
results or the command line. Runs on the caller's thread or event loop. `reason` is the stable word to test for
(UPPER_SNAKE); a status without details has its code's name there.

    MotleyClientError                    anything else                               UNKNOWN
    ├── InvalidArgumentError             a field is wrong                            INVALID_ARGUMENT
    ├── NotFoundError                    unknown, or not the caller's                NOT_FOUND
    ├── AlreadyExistsError               taken, or the same id with other content    ALREADY_EXISTS
    ├── FailedPreconditionError          right in itself, wrong for this base        FAILED_PRECONDITION
    ├── AbortedError                     somebody else was faster (etag)             ABORTED
    ├── OutOfRangeError                  an offset that leaves a gap                 OUT_OF_RANGE
    ├── ResourceExhaustedError           quota, full queue, too large a message      RESOURCE_EXHAUSTED
    ├── DeadlineExceededError            the timeout passed first                    DEADLINE_EXCEEDED
    ├── CancelledRequestError            the call was cancelled                      CANCELLED
    ├── UnauthenticatedError             no key, or a bad one                        UNAUTHENTICATED
    ├── PermissionDeniedError            the key lacks the role                      PERMISSION_DENIED
    ├── UnavailableError                 draining, stopped, or not reachable         UNAVAILABLE
    ├── UnimplementedError               in the surface, not built                   UNIMPLEMENTED
    ├── DataLossError                    bytes arrived damaged                       DATA_LOSS
    └── InternalError                    the server's fault; quote `request_id`      INTERNAL
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from motley_client.endpoint import UNREACHABLE

_STATUS_DETAILS_KEY = "grpc-status-details-bin"


class MotleyClientError(Exception):
    """Carry what a server said when it refused or failed a request."""

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        field: str | None = None,
        retry_after_seconds: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.request_id = request_id

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (
            type(self), self.message, self.reason, self.field, self.retry_after_seconds, self.request_id,
        )  # fmt: skip


def _rebuild(
    kind: type[MotleyClientError],
    message: str,
    reason: str,
    field: str | None,
    retry_after_seconds: float | None,
    request_id: str | None,
) -> MotleyClientError:
    return kind(message, reason=reason, field=field, retry_after_seconds=retry_after_seconds, request_id=request_id)


class InvalidArgumentError(MotleyClientError):
    """Say which field of the request is wrong, and why."""

    code = "INVALID_ARGUMENT"


class NotFoundError(MotleyClientError):
    """Say that a name means nothing to this caller."""

    code = "NOT_FOUND"


class AlreadyExistsError(MotleyClientError):
    """Say that a name is taken, or that a request id was used before, with other content."""

    code = "ALREADY_EXISTS"


class FailedPreconditionError(MotleyClientError):
    """Say that something sound in itself does not fit what is served."""

    code = "FAILED_PRECONDITION"


class AbortedError(MotleyClientError):
    """Say that what the caller last saw has changed since."""

    code = "ABORTED"


class OutOfRangeError(MotleyClientError):
    """Say that an offset lies behind what the server has."""

    code = "OUT_OF_RANGE"


class ResourceExhaustedError(MotleyClientError):
    """Say that a bound was reached, and when to come back."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceededError(MotleyClientError):
    """Say that the timeout passed before the answer was complete."""

    code = "DEADLINE_EXCEEDED"


class CancelledRequestError(MotleyClientError):
    """Say that the call was cancelled."""

    code = "CANCELLED"


class UnauthenticatedError(MotleyClientError):
    """Say that the key is missing or bad."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(MotleyClientError):
    """Say that the key is good, but not for this."""

    code = "PERMISSION_DENIED"


class UnavailableError(MotleyClientError):
    """Say that the server takes no requests just now, or that none answers."""

    code = "UNAVAILABLE"

    @property
    def is_unreachable(self) -> bool:
        """Tell whether it was the connection that failed, rather than a server that said so."""
        return self.reason == UNREACHABLE


class UnimplementedError(MotleyClientError):
    """Say that this part of the surface is not built."""

    code = "UNIMPLEMENTED"


class DataLossError(MotleyClientError):
    """Say that bytes arrived damaged."""

    code = "DATA_LOSS"


class InternalError(MotleyClientError):
    """Say that the fault is the server's, or that its answer breaks the protocol."""

    code = "INTERNAL"


_BY_CODE = {kind.code: kind for kind in MotleyClientError.__subclasses__()}


def from_rpc_error(error: grpc.RpcError, server: str) -> MotleyClientError:
    """Turn a failed call into the error of its code, with every detail that its status carries.

    Semantics: UNAVAILABLE without details was not said by a server but by the connection; its reason is UNREACHABLE and
    its message names `server`.
    """
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return MotleyClientError(str(error) or type(error).__name__, reason=MotleyClientError.code)
    code = error.code().name
    kind = _BY_CODE.get(code, MotleyClientError)
    status = _rich_status(error.trailing_metadata() or ())
    if status is not None:
        return _from_status(kind, status)
    if kind is UnavailableError:
        cause = (error.details() or "").rpartition("last error: ")[2]
        return kind(f"no server answers at {server}" + (f": {cause}" if cause else ""), reason=UNREACHABLE)
    return kind(error.details() or code, reason=code)


def _rich_status(trailers: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status | None:
    for key, value in trailers:
        if key == _STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:  # a proxy's own trailer: the plain code and message still stand
                return None
    return None


def _from_status(kind: type[MotleyClientError], status: status_pb2.Status) -> MotleyClientError:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, request = error_details_pb2.RetryInfo(), error_details_pb2.RequestInfo()
    has_retry = False
    for detail in status.details:
        has_retry |= detail.Unpack(retry)
        for message in (info, bad, request):
            detail.Unpack(message)
    return kind(
        status.message or kind.code,
        reason=info.reason or kind.code,
        field=bad.field_violations[0].field if bad.field_violations else info.metadata.get("field"),
        retry_after_seconds=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        request_id=request.request_id or None,
    )
