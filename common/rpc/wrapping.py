"""Puts a context around every call of a handler, whichever of gRPC's four kinds it is."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Around = Callable[[Context], AbstractAsyncContextManager[None]]


def wrap_handler(handler: Handler, around: Around) -> Handler:
    """The same handler, each call of which runs within `around(context)`.

    A handler that streams its replies is a generator, or a coroutine that writes them.
    """
    kinds = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    make, behavior = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    wrap = _generator if inspect.isasyncgenfunction(behavior) else _coroutine
    return make(
        wrap(behavior, around),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _coroutine(behavior: Any, around: Around) -> Any:
    async def wrapped(request: Any, context: Context) -> Any:
        async with around(context):
            return await behavior(request, context)

    return wrapped


def _generator(behavior: Any, around: Around) -> Any:
    async def wrapped(request: Any, context: Context) -> AsyncIterator[Any]:
        async with around(context), aclosing(behavior(request, context)) as responses:
            async for response in responses:
                yield response

    return wrapped
