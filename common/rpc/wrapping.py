"""Wraps handlers of all four kinds of gRPC methods: in a context, and with a timeout for the request."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from common.errors import DeadlineExceeded, InvalidInput

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Around = Callable[[Context], AbstractAsyncContextManager[None]]


def split_handler(handler: Handler) -> tuple[Callable[..., Handler], Any]:
    """Return grpc's factory for handlers of this kind, and the behavior of the handler."""
    kinds: Mapping[tuple[bool, bool], tuple[Callable[..., Handler], Any]] = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }
    return kinds[bool(handler.request_streaming), bool(handler.response_streaming)]


def wrap_handler(handler: Handler, around: Around) -> Handler:
    """Return a handler whose calls run in the context `around(context)`.

    The behavior of a handler with streamed responses is an async generator, or a coroutine that writes the responses.
    """
    make, behavior = split_handler(handler)
    wrap = _generator if inspect.isasyncgenfunction(behavior) else _coroutine
    return make(
        wrap(behavior, around),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def waiting_for_request(handler: Handler, seconds: float) -> Handler:
    """Return a handler that reads a unary request itself, with a timeout of `seconds`.

    gRPC would read the request before interceptors run: a client could hold calls open without sending a request, and
    could send large requests before it is authorized. Unary and streamed requests have the same wire format.
    """
    if handler.request_streaming:
        return handler
    kinds = {
        False: (grpc.stream_unary_rpc_method_handler, handler.unary_unary),
        True: (grpc.stream_stream_rpc_method_handler, handler.unary_stream),
    }
    make, behavior = kinds[bool(handler.response_streaming)]
    read = _RequestReader(handler.request_deserializer, seconds)
    wait = _waiting_generator if inspect.isasyncgenfunction(behavior) else _waiting_coroutine
    return make(wait(behavior, read), response_serializer=handler.response_serializer)


class _RequestReader:
    def __init__(self, deserialize: Callable[[bytes], Any] | None, seconds: float) -> None:
        self._deserialize = deserialize
        self._seconds = seconds

    async def __call__(self, context: Context) -> Any:
        """Read the request. Raises DeadlineExceeded after the timeout, and InvalidInput for an invalid request."""
        try:
            async with asyncio.timeout(self._seconds):
                raw: Any = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"no request was received for {self._seconds:g} s") from None
        if raw is grpc.aio.EOF:
            raise InvalidInput("the call ended before its request")
        try:
            return raw if self._deserialize is None else self._deserialize(raw)
        except DecodeError:
            raise InvalidInput("the bytes are not a request of this method") from None


def _waiting_coroutine(behavior: Any, read: _RequestReader) -> Any:
    async def waiting(_: Any, context: Context) -> Any:
        return await behavior(await read(context), context)

    return waiting


def _waiting_generator(behavior: Any, read: _RequestReader) -> Any:
    async def waiting(_: Any, context: Context) -> AsyncIterator[Any]:
        async with aclosing(behavior(await read(context), context)) as responses:
            async for response in responses:
                yield response

    return waiting


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
