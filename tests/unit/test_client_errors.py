"""A status becomes the error of its code, with all that its details say."""

from __future__ import annotations

import pickle

import grpc
import pytest
from fake_motley_server import rich_status
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from motley_client import errors

FAILING_CODES = [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)]


def rpc_error(code: grpc.StatusCode, details: str, status: status_pb2.Status | None = None) -> grpc.aio.AioRpcError:
    trailers = [] if status is None else [("grpc-status-details-bin", status.SerializeToString())]
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


@pytest.mark.parametrize("code", FAILING_CODES, ids=lambda code: code.name)
def test_every_code_has_a_class_of_its_own(code: grpc.StatusCode) -> None:
    status = rich_status(code, "sentence", error_details_pb2.ErrorInfo(reason="WHY", domain="motley.dev"))

    error = errors.from_rpc_error(rpc_error(code, "sentence", status), "host:1")

    assert type(error) is not errors.MotleyClientError
    assert (error.code, error.message, error.reason) == (code.name, "sentence", "WHY")
    assert (error.field, error.retry_after_seconds, error.request_id) == (None, None, None)


def test_details_fill_field_retry_and_request_id() -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sampling.top_p", description="outside (0, 1]")
    status = rich_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        "top_p is 2",
        error_details_pb2.ErrorInfo(reason="OUT_OF_RANGE", domain="motley.dev"),
        bad,
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        error_details_pb2.RequestInfo(request_id="abc"),
    )

    error = errors.from_rpc_error(rpc_error(grpc.StatusCode.INVALID_ARGUMENT, "top_p is 2", status), "host:1")

    assert isinstance(error, errors.InvalidArgumentError)
    assert (error.reason, error.field) == ("OUT_OF_RANGE", "sampling.top_p")
    assert (error.retry_after_seconds, error.request_id) == (1.5, "abc")


def test_a_status_without_details_has_its_code_as_reason() -> None:
    error = errors.from_rpc_error(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large"), "host:1")

    assert isinstance(error, errors.ResourceExhaustedError)
    assert (error.message, error.reason, error.field) == ("too large", "RESOURCE_EXHAUSTED", None)


def test_unavailable_said_by_nobody_is_unreachable_and_names_the_server() -> None:
    details = "failed to connect to all addresses; last error: UNKNOWN: connection refused"
    error = errors.from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, details), "host:1")

    assert isinstance(error, errors.UnavailableError)
    assert error.is_unreachable
    assert error.message == "no server answers at host:1: UNKNOWN: connection refused"


def test_unavailable_said_by_a_server_is_not_unreachable() -> None:
    status = rich_status(
        grpc.StatusCode.UNAVAILABLE, "draining", error_details_pb2.ErrorInfo(reason="DRAINING", domain="motley.dev")
    )
    error = errors.from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "draining", status), "host:1")

    assert isinstance(error, errors.UnavailableError)
    assert (error.is_unreachable, error.reason) == (False, "DRAINING")


def test_damaged_details_leave_the_plain_status() -> None:
    failed = grpc.aio.AioRpcError(
        grpc.StatusCode.NOT_FOUND,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff")),
        "no such adapter",
    )

    error = errors.from_rpc_error(failed, "host:1")

    assert isinstance(error, errors.NotFoundError)
    assert (error.message, error.reason) == ("no such adapter", "NOT_FOUND")


def test_unknown_and_codeless_errors_are_the_root_of_the_tree() -> None:
    unknown = errors.from_rpc_error(rpc_error(grpc.StatusCode.UNKNOWN, "odd"), "host:1")
    codeless = errors.from_rpc_error(grpc.RpcError("odd"), "host:1")

    for error in (unknown, codeless):
        assert type(error) is errors.MotleyClientError
        assert (error.code, error.message, error.reason) == ("UNKNOWN", "odd", "UNKNOWN")


def test_errors_survive_pickling() -> None:
    error = errors.ResourceExhaustedError(
        "full", reason="QUEUE_FULL", field="adapters", retry_after_seconds=2.0, request_id="abc"
    )

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is errors.ResourceExhaustedError
    assert vars(copy) == vars(error)
