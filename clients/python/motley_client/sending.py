"""How messages go up in a stream, blocking or awaiting, and what becomes of an answer or a failure in the midst.

Owns what gRPC's iterators and its asyncio would otherwise lose. Knows nothing of what is sent, and of going on after a
cut, which is the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import TypeVar, cast

import grpc

from motley_client.endpoint import UNREACHABLE, Endpoint
from motley_client.errors import InternalError, MotleyClientError, UnavailableError, from_rpc_error

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Item = TypeVar("_Item")


def send(
    method: grpc.StreamUnaryMultiCallable[_Request, _Response],
    steps: Iterator[tuple[_Request, int]],
    tell: Callable[[int], None],
    timeout: float | None,
    endpoint: Endpoint,
) -> _Response:
    """Send messages, each with a number that is told once it has gone, and return the answer.

    Effects: `steps` and `tell` run on a thread of gRPC's.
    Raises: MotleyClientError; what `steps` and `tell` raise.
    """
    failures: list[Exception] = []  # of ours: from an iterator, gRPC would turn them into a word of its own

    def messages() -> Iterator[_Request]:
        try:
            for message, done in steps:
                yield message
                tell(done)
        except Exception as error:
            failures.append(error)

    call = method.future(messages(), timeout=timeout, metadata=endpoint.metadata)
    try:
        return call.result()
    except (grpc.RpcError, grpc.FutureCancelledError) as error:
        if failures:
            raise failures.pop() from None
        raise from_rpc_error(cast(grpc.RpcError, call), endpoint.address) from error
    finally:
        call.cancel()


async def send_awaiting(
    method: grpc.aio.StreamUnaryMultiCallable[_Request, _Response],
    steps: Iterator[tuple[_Request, int]],
    tell: Callable[[int], None],
    timeout: float | None,
    endpoint: Endpoint,
) -> _Response:
    """Send messages as `send` does, but each step is taken on a thread, and told on the loop."""
    call = method(timeout=timeout, metadata=endpoint.metadata)
    try:
        with suppress(grpc.RpcError, asyncio.InvalidStateError):  # it ended early: its answer says why
            async for message, done in on_threads(steps):
                await call.write(message)
                tell(done)
            await call.done_writing()
        return await call
    except grpc.RpcError as error:
        raise _failure(error, endpoint.address) from error
    finally:
        call.cancel()


async def on_threads(items: Iterator[_Item]) -> AsyncIterator[_Item]:
    """Yield what a blocking iterator yields, each step of it taken on a thread."""
    while (item := await asyncio.to_thread(next, items, None)) is not None:
        yield item


def _failure(error: grpc.RpcError, server: str) -> MotleyClientError:
    """Read how a stream that was written failed; gRPC's asyncio drops an answer that comes while it writes."""
    failure = from_rpc_error(error, server)
    if isinstance(failure, InternalError) and failure.reason == InternalError.code:  # what it says then
        return UnavailableError(f"{server} ended a stream while it was written to", reason=UNREACHABLE)
    return failure
