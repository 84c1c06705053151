"""The services that are designed but not built: every method answers UNIMPLEMENTED, typed like every other error."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from motley.v1 import adapter_pb2

from motley_server.errors import UnimplementedError

UNBUILT_SERVICES: tuple[ServiceDescriptor, ...] = (adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"],)


def unbuilt_handler(service: ServiceDescriptor) -> grpc.GenericRpcHandler:
    """Make the handler of a service none of whose methods is built."""
    return grpc.method_handlers_generic_handler(
        service.full_name, {method.name: _method_handler(method) for method in service.methods}
    )


def _method_handler(method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: object, context: object) -> NoReturn:
        message = f"{method.full_name} is not built in this version"
        raise UnimplementedError(message, reason="NOT_BUILT")

    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make: Any = makers[method.client_streaming, method.server_streaming]
    handler: grpc.RpcMethodHandler[Any, Any] = make(
        refuse,
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )
    return handler
