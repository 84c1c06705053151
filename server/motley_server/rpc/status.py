"""The one table from an error's class to a gRPC code, and the details that go with it.

Details are those of google.rpc: ErrorInfo always (reason, domain, the field), RequestInfo always, and one more by
class. Nothing of an exception but its own message, reason and field ever goes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from motley_adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterLoadError,
    AdapterMismatchError,
    CapacityError,
)

from motley_server import errors

DOMAIN = "motley.dev"
REQUEST_ID_KEY = "x-request-id"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
MAX_SENTENCE_BYTES = 1000  # it travels three times in trailers, which readers cut off at 8 KiB

TypedError = errors.MotleyError | AdapterError

CODES: Mapping[type[Exception], grpc.StatusCode] = MappingProxyType({
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.AbortedError: grpc.StatusCode.ABORTED,
    errors.OutOfRangeError: grpc.StatusCode.OUT_OF_RANGE,
    errors.FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CancelledRequestError: grpc.StatusCode.CANCELLED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.DataLossError: grpc.StatusCode.DATA_LOSS,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    AdapterFormatError: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    AdapterLoadError: grpc.StatusCode.FAILED_PRECONDITION,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
})  # fmt: skip


def code_of(error: Exception) -> grpc.StatusCode:
    """Return the code of an error's class, or of the nearest parent that has one; INTERNAL for what has none."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), grpc.StatusCode.INTERNAL)


def to_status(error: Exception, request_id: str) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """Return what a caller is told of an error.

    Semantics: an error that the table does not have, or that is a fault of ours, is told by the request id alone.
    """
    code = code_of(error)
    if not isinstance(error, errors.MotleyError | AdapterError) or code is grpc.StatusCode.INTERNAL:
        reason = error.reason if isinstance(error, errors.MotleyError) else "INTERNAL"
        message = f"a fault of the server; its log has more under request id {request_id}"
        error = errors.InternalError(message, reason=reason)
    number: int = code.value[0]
    sentence = _cut(error.message)
    status = status_pb2.Status(code=number, message=sentence)
    for detail in _details(error, sentence, code, request_id):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return code, status


def trailers(status: status_pb2.Status, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata that carries a status and its request id."""
    return (STATUS_DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, request_id)


def _cut(sentence: str) -> str:
    data = sentence.encode()
    return sentence if len(data) <= MAX_SENTENCE_BYTES else data[:MAX_SENTENCE_BYTES].decode(errors="ignore") + "..."


def _details(error: TypedError, sentence: str, code: grpc.StatusCode, request_id: str) -> list[Message]:
    field = error.field or ""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"field": field} if field else {}),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=sentence, reason=error.reason)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    elif code is grpc.StatusCode.NOT_FOUND:
        kind = error.reason.removesuffix("_NOT_FOUND").lower()
        details.append(error_details_pb2.ResourceInfo(resource_type=kind, description=sentence))
    elif code is grpc.StatusCode.FAILED_PRECONDITION:
        failure = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, subject=field, description=sentence
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[failure]))
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        quota = error_details_pb2.QuotaFailure.Violation(subject=field or error.reason, description=sentence)
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    retry = error.retry_after_seconds if isinstance(error, errors.MotleyError) else None
    if retry is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(round(retry * 1000))
        details.append(info)
    return details
