"""gRPC handlers that parse requests themselves, so that an error about a field names the field."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from common.rpc.parsing import parse, refuse_unknown_fields

Function = Callable[[Any], Awaitable[Message]] | Callable[[Any], AsyncGenerator[Message, None]]


class ServiceHandler:
    """gRPC method handlers of a service. `functions` maps method names to functions; KeyError if one is missing."""

    def __init__(self, service: ServiceDescriptor, functions: Mapping[str, Function]) -> None:
        self.service_name = str(service.full_name)
        self.methods = {method.name: _handler(method, functions[method.name]) for method in service.methods}


def _handler(method: MethodDescriptor, function: Any) -> grpc.RpcMethodHandler[Any, Any]:
    request_type = GetMessageClass(method.input_type)

    def read(raw: bytes) -> Message:
        request = parse(request_type, raw)
        refuse_unknown_fields("", request)
        return request

    async def answer(raw: bytes, _context: object) -> Message:
        return cast(Message, await function(read(raw)))

    async def stream(raw: bytes, _context: object) -> AsyncGenerator[Message, None]:
        async with aclosing(function(read(raw))) as responses:
            async for response in responses:
                yield response

    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(cast(Any, stream), response_serializer=_serialized)
    return grpc.unary_unary_rpc_method_handler(cast(Any, answer), response_serializer=_serialized)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
