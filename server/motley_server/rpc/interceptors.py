"""Around every RPC of every arity: its request id, who calls and may they, its count by code, its line in the audit.

One interceptor, so that the order is plain to see: the request id first, then counting and the audit, then errors as
typed statuses, and identity innermost, where a refusal is counted, written down and typed like any other. Runs on the
event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc

from motley_server.asked import Caller
from motley_server.audit import ControlAction, write_down
from motley_server.errors import MotleyError
from motley_server.rpc.access import OPEN_METHODS, check_roles, rule_of
from motley_server.rpc.audited import target_of
from motley_server.rpc.call import begin_notes, current_subject, set_caller
from motley_server.rpc.identity import Identify
from motley_server.rpc.status import REQUEST_ID_KEY, code_of, to_status, trailers
from motley_server.rpc.wire_checks import check_answer, check_message, lenient

log = logging.getLogger(__name__)

AUTHORIZATION_KEY = "authorization"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # the class takes no parameters at run time
Behavior = Callable[[Any, Context], Any]


class RpcObserver(Protocol):
    """Who counts RPCs."""

    def rpc_finished(self, method: str, code: str, seconds: float) -> None:
        """Take note of an RPC that ended, by its full method name and the name of its code."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Put the same frame around every RPC."""

    def __init__(self, identify: Identify, observer: RpcObserver, max_message_bytes: int) -> None:
        self._identify = identify
        self._observer = observer
        self._max_message_bytes = max_message_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that the rest of the chain found; an unknown method has none."""
        handler = await continuation(handler_call_details)
        return handler if handler is None else self._wrap(handler, str(handler_call_details.method))

    def _wrap(self, handler: Handler, method: str) -> Handler:
        make, behavior = _arity(handler)

        async def run(request: Any, context: Context) -> Any:
            return await self._frame(method, behavior, request, context)

        deserialize = handler.request_deserializer
        return make(
            run,
            request_deserializer=lenient(deserialize) if deserialize is not None else None,
            response_serializer=handler.response_serializer,
        )

    async def _frame(self, method: str, behavior: Behavior, request: Any, context: Context) -> Any:
        headers = [(str(key), value) for key, value in context.invocation_metadata() or ()]
        request_id = _request_id(dict(headers))
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        began, notes = time.monotonic(), begin_notes()
        code, caller, answer = grpc.StatusCode.UNKNOWN, None, None
        try:
            if method not in OPEN_METHODS:
                caller = await self._identified(request_id, headers, context)
                set_caller(caller)
                check_roles(method, caller.roles, has_lease=caller.lease is not None)
            check_message(request)
            answer = await self._answer(behavior, request, context)
            code = grpc.StatusCode.OK
            return answer
        except asyncio.CancelledError:
            late = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = _as_code(context.code())
            raise
        except Exception as error:
            code, failure = code_of(error), error
        finally:
            # Before the caller can see the end, so that who has seen it finds it counted and written down.
            self._observer.rpc_finished(method, code.name, time.monotonic() - began)
            if rule_of(method).is_audited:
                _write_down(method, code, request_id, caller, target_of(current_subject() or request, answer) | notes)
        await _abort(context, failure, method, request_id)

    async def _answer(self, behavior: Behavior, request: Any, context: Context) -> Any:
        """Run a handler to its end, writing the messages of one that yields them.

        The writing happens here, so that a cancelled RPC always finds this coroutine waiting and the generator is
        closed at once, not when it is collected.
        """
        outcome = behavior(request, context)
        if not isinstance(outcome, AsyncIterator):
            answer = await outcome
            check_answer(answer, self._max_message_bytes)
            return answer
        async with aclosing(outcome) as messages:  # type: ignore[type-var]
            async for message in messages:
                check_answer(message, self._max_message_bytes)
                try:
                    await context.write(message)
                except grpc.aio.BaseError as error:  # nobody reads any more, and that is no fault
                    raise asyncio.CancelledError from error
        return None

    async def _identified(
        self, request_id: str, headers: Sequence[tuple[str, str | bytes]], context: Context
    ) -> Caller:
        remaining: float | None = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        found = await self._identify([value for key, value in headers if key == AUTHORIZATION_KEY])
        return Caller(
            request_id,
            found.tenant_id,
            found.roles,
            deadline=deadline,
            quota=found.quota,
            key_id=found.key_id,
            lease=found.lease,
        )


def _write_down(
    method: str, code: grpc.StatusCode, request_id: str, caller: Caller | None, target: Mapping[str, str | int]
) -> None:
    tenant_id, key_id = ("", "") if caller is None else (caller.tenant_id, caller.key_id)
    write_down(ControlAction(method.lstrip("/"), code.name, request_id, tenant_id, key_id, target))


def _arity(handler: Handler) -> tuple[Callable[..., Handler], Behavior]:
    # The stubs know the behaviors of synchronous servers alone.
    one: Any = handler
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler, one.stream_stream
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler, one.stream_unary
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler, one.unary_stream
    return grpc.unary_unary_rpc_method_handler, one.unary_unary


async def _abort(context: Context, error: Exception, method: str, request_id: str) -> NoReturn:
    code, status = to_status(error, request_id)
    if code is grpc.StatusCode.INTERNAL:
        log.error("%s failed, request id %s", method, request_id, exc_info=error)
    elif isinstance(error, MotleyError):
        log.debug("%s refused, request id %s: %s %s: %s", method, request_id, error.reason, error.field, error.message)
    await context.abort(code, status.message, trailers(status, request_id))


def _request_id(metadata: Mapping[str, str | bytes]) -> str:
    given = metadata.get(REQUEST_ID_KEY)
    return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _as_code(code: object) -> grpc.StatusCode:
    """Read a context's code, which is a number once it was set by an abort."""
    return next((one for one in grpc.StatusCode if code in (one, one.value[0])), grpc.StatusCode.UNKNOWN)
