"""Services that this server has not turned on: every method of theirs is refused in the same words.

They are there nevertheless, so that whoever may not call them hears that first, and the others why. Runs on the event
loop's thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from motley_server.errors import UnimplementedError


def add_disabled(server: grpc.aio.Server, service: ServiceDescriptor, error: UnimplementedError) -> None:
    """Have a server refuse every method of a service by an error."""
    handlers = {method.name: _handler(method, error) for method in service.methods}
    generic = grpc.method_handlers_generic_handler(service.full_name, handlers)
    server.add_generic_rpc_handlers((generic,))


def _handler(method: MethodDescriptor, error: UnimplementedError) -> Any:
    async def refuse(request: Any, context: Any) -> None:
        raise error

    async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        raise error
        yield  # which makes it a generator

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    behavior: Any = refuse_stream if method.server_streaming else refuse
    return make(behavior)
